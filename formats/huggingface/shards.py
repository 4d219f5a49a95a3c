"""The safetensors files of a build and their index, all of them accounted for.

Engines differ in which files they open: mlx-lm every ``model*.safetensors``, vLLM every
``*.safetensors`` that the index names, transformers ``model.safetensors`` before an index. A build
is read only where all of them find the same tensors.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path

from lfmq.formats.huggingface.safetensors_file import StoredTensor, read_header
from lfmq.formats.huggingface.safetensors_layout import INDEX_FILE
from lfmq.quant.errors import CheckpointError, ValidationError, quoted


def read_build_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder of ``model*.safetensors``, by name.

    Raises:
        ValidationError: a file is damaged, holds what another does, or is not what the index
            says; the index names a file outside, or one that is not there.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("model"):
            raise ValidationError(
                f"{path}: a file of tensors that is no part of the build; expected "
                "model*.safetensors alone, take it away"
            )
        try:
            tensors = read_header(path)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        for name in tensors:
            if name in found:
                raise ValidationError(
                    f"{path}: {quoted(name)} is also in {found[name].path.name}; engines differ "
                    "in which they take"
                )
        found |= tensors
    index = folder / INDEX_FILE
    if index.exists():
        _check_index(index, found)
    elif len({tensor.path for tensor in found.values()}) > 1:
        raise ValidationError(
            f"{index}: missing; the tensors are in several files, which engines find by it"
        )
    return found


def refuse_others(found: Mapping[str, StoredTensor], expected: Set[str]) -> None:
    """Refuse a tensor that the model does not have.

    Raises:
        ValidationError: the first one.
    """
    for name, tensor in found.items():
        if name not in expected:
            raise ValidationError(
                f"{tensor.path}: has a tensor {quoted(name)} that the model does not have; "
                "it is of another model, write the build again"
            )


def _check_index(index: Path, found: Mapping[str, StoredTensor]) -> None:
    """The index has each tensor in its file, and no other."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except OSError as error:
        raise ValidationError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValidationError(
            f"{index}: not a valid safetensors index ({error!r:.100})"
        ) from error
    if not isinstance(weight_map, dict):
        raise ValidationError(f"{index}: weight_map is {quoted(weight_map)}, expected an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValidationError(
                f"{index}: {quoted(name)} is in {quoted(file)}, expected the name of a file in "
                "the build's folder"
            )
        if name not in found:
            raise ValidationError(
                f"{index.parent}: tensor {name[:80]} is missing, {INDEX_FILE} has it in "
                f"{file[:80]}; write the build again"
            )
        if found[name].path.name != file:
            raise ValidationError(
                f"{index}: says that {quoted(name)} is in {quoted(file)}, it is in "
                f"{found[name].path.name}; write the build again"
            )
    for name, tensor in found.items():
        if name not in weight_map:
            raise ValidationError(
                f"{tensor.path}: {quoted(name)} is not in {INDEX_FILE}; write the build again"
            )
