"""A checkpoint folder: its config, its tensors read one at a time, and the files beside them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint.folder_kinds import refuse_other_kinds
from lfmq.converter.checkpoint.head import settle_head
from lfmq.converter.checkpoint.locate import checkpoint_name
from lfmq.converter.checkpoint.quantized import refuse_quantized
from lfmq.converter.checkpoint.tensor_names import model_names
from lfmq.converter.checkpoint.vocabulary import Vocabulary, parse_vocabulary
from lfmq.converter.checkpoint.weight_files import find_weight_files
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.chat_template import ADDITIONAL, build_files
from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.huggingface.json_file import as_utf8, parse_object, refuse_pointer
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    read_floats,
    read_header,
    read_tensor,
    rows_of,
)
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError

_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
_OBJECTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; no weight is read until :meth:`read`.

    Attributes:
        folder: where it is.
        config: the model's facts.
        assets: what travels beside the weights.
        stored: where each of the model's tensors is; it may be a part of one in a file.
        vocabulary: of its tokenizer, if it has one.
        notes: what was done to read it that a user should know.
        index: the index of its shards, when one was read.
    """

    folder: Path
    config: ModelConfig
    assets: Assets
    stored: dict[str, StoredTensor]
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()
    index: Path | None = None

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files, by name."""
        return tuple(sorted({t.path for t in self.stored.values()}))

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32, which holds bfloat16 and float16 exactly.

        Raises:
            CheckpointError: the file cannot be read or changed meanwhile.
        """
        return read_floats(self.stored[name])

    def read_rows(
        self, name: str, start: int, stop: int, into: NDArray[np.uint8] | None = None
    ) -> NDArray[Any]:
        """A run of a tensor's rows in its own dtype, in the memory given; see :meth:`read`."""
        return read_tensor(rows_of(self.stored[name], start, stop), into)


def open_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Open a folder with ``config.json`` and safetensors and check every tensor's shape.

    No weight is read, unless a head is stored beside the embedding.

    Args:
        folder: where it is.
        name: what builds are named after; see :func:`.locate.checkpoint_name` when None.

    Raises:
        CheckpointError: what is missing, damaged, unexpected or of the wrong shape.
    """
    refuse_other_kinds(folder)
    raw = read_config(folder)
    files = find_weight_files(folder, raw)
    tensors, doubled = _read_headers(files.paths)
    refuse_quantized(folder, raw, tensors)
    config = parse_config(raw, folder / "config.json")
    named = model_names(tensors, config)
    head = settle_head(folder, named.stored, config)
    config = replace(config, tie_word_embeddings=head.tied)
    _check_tensors(folder, head.stored, expected_tensors(config), files.places)
    assets = _read_assets(folder, _with_tie(raw, head.tied), name or checkpoint_name(folder))
    return Checkpoint(
        folder,
        config,
        assets,
        head.stored,
        _read_vocabulary(assets),
        (*files.notes, *doubled, *named.notes, *head.notes),
        files.index,
    )


def _read_headers(paths: Iterable[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors by their names in the files; of one in several files the last is taken."""
    tensors: dict[str, StoredTensor] = {}
    notes = []
    for path in paths:
        found = read_header(path)
        if twice := sorted(tensors.keys() & found.keys()):
            more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            first = tensors[twice[0]].path.name
            notes.append(
                f"{twice[0]}{more}: in {first} and in {path.name}, whose values transformers takes"
            )
        tensors |= found
    return tensors, notes


def _with_tie(raw: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config as it describes the builds, where the stored head says otherwise."""
    if raw.get("tie_embedding", raw.get("tie_word_embeddings", True)) == tied:
        return raw
    kept = {key: value for key, value in raw.items() if key != "tie_embedding"}
    return kept | {"tie_word_embeddings": tied}


def _check_tensors(
    folder: Path,
    stored: dict[str, StoredTensor],
    expected: Iterable[Tensor],
    places: dict[str, str],
) -> None:
    wanted = {t.name: t for t in expected}
    missing = [name for name in wanted if name not in stored]
    extra = sorted(name for name in stored if name not in wanted)
    if missing:
        name = missing[0]
        line = f"{folder}: tensor {name} is missing"
        if len(missing) > 1:
            line += f" (and {len(missing) - 1} more)"
        if name in places:
            line += f", though the index says that it is in {places[name]}; fetch that file again"
        elif extra:
            line += f"; {extra[0]} is there, whose name is not the model's"
        raise CheckpointError(line)
    if extra:
        raise CheckpointError(
            f"{stored[extra[0]].path}: unexpected tensor {extra[0]}"
            + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
            + "; the config describes another model"
        )
    for name, tensor in wanted.items():
        _check_tensor(name, stored[name], tensor.shape)


def _check_tensor(name: str, found: StoredTensor, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        kind = ""
        if len(shape) == 3 and found.shape == (shape[0], shape[2], shape[1]):
            kind = ", which is how MLX lays it out; convert the checkpoint that it was made from"
        raise CheckpointError(
            f"{found.path}: {name} has shape {list(found.shape)}, the config expects "
            f"{list(shape)}{kind}"
        )
    if found.dtype not in FLOAT_DTYPES:
        kind = "; integers are codes of a quantized checkpoint" if found.dtype[0] in "IU" else ""
        raise CheckpointError(
            f"{found.path}: {name} has dtype {found.dtype}, expected BF16, F16 or F32{kind}"
        )


def _read_assets(folder: Path, config: dict[str, Any], name: str) -> Assets:
    files = {}
    additional = sorted(path.name for path in folder.glob(f"{ADDITIONAL}*.jinja"))
    for file in (*_SIDE_FILES, *(f"{ADDITIONAL}{name}" for name in additional)):
        path = folder / file
        if path.is_file():
            try:
                files[file] = path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            refuse_pointer(path, files[file])
            if path.suffix == ".json":
                files[file] = _in_utf8(path, files[file])
    for file in _OBJECTS:
        parse_object(files.get(file, b"{}"), folder / file)
    assets = Assets(name, config, files, folder)
    build_files(assets)  # refuses templates that are none
    return assets


def _in_utf8(path: Path, content: bytes) -> bytes:
    """The text as builds carry it: without a byte order mark, which runtimes stop at."""
    try:
        return as_utf8(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from error


def _read_vocabulary(assets: Assets) -> Vocabulary | None:
    content = assets.files.get("tokenizer.json")
    if content is None:
        return None
    return parse_vocabulary(content, assets.folder / "tokenizer.json")
