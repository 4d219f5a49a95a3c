"""A checkpoint folder: its config, its tensors read one at a time, and the files beside them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint.vocabulary import Vocabulary, parse_vocabulary
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.chat_template import ADDITIONAL, build_files
from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    read_floats,
    read_header,
    read_tensor,
    rows_of,
)
from lfmq.formats.huggingface.side_files import parse_object
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError

INDEX = "model.safetensors.index.json"
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
    """An opened checkpoint; no weight is read until :meth:`read`."""

    folder: Path
    config: ModelConfig
    assets: Assets
    stored: dict[str, StoredTensor]
    vocabulary: Vocabulary | None = None

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

    Args:
        folder: where it is.
        name: what builds are named after; the folder's own name when None.

    Raises:
        CheckpointError: what is missing, damaged, unexpected or of the wrong shape.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    raw = read_config(folder)
    config = parse_config(raw, folder / "config.json")
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        for key, tensor in read_header(path).items():
            if key in stored:
                raise CheckpointError(f"{path}: {key} is also in {stored[key].path.name}")
            stored[key] = tensor
    _check_index(folder, stored)
    if _is_tied_copy(stored):
        del stored["lm_head.weight"]
    _check_tensors(folder, stored, expected_tensors(config))
    assets = _read_assets(folder, raw, name or folder.resolve().name)
    return Checkpoint(folder, config, assets, stored, _read_vocabulary(assets))


def _is_tied_copy(stored: dict[str, StoredTensor]) -> bool:
    """Some tools store the tied head a second time; equal bytes make it redundant."""
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    if head.dtype != embedding.dtype or head.dtype not in FLOAT_DTYPES:
        return False
    return bool(np.array_equal(read_tensor(head), read_tensor(embedding)))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    single = folder / "model.safetensors"
    if index.is_file():
        return tuple(_shard(folder, name) for name in sorted(set(_weight_map(index).values())))
    if single.is_file():
        return (single,)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle file, which is never opened (it can run code); "
            "convert the checkpoint to safetensors first"
        )
    raise CheckpointError(f"{folder}: neither model.safetensors nor {INDEX} found")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a valid safetensors index ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty or not an object")
    return {str(k): str(v) for k, v in weight_map.items()}


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name or name in (".", "..") or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{folder / INDEX}: names the file {name!r}; only safetensors files inside the "
            "checkpoint folder are read"
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: named by {INDEX} but not found; fetch it")
    return path


def _check_index(folder: Path, stored: dict[str, StoredTensor]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in stored or stored[name].path.name != file:
            raise CheckpointError(f"{folder / file}: {name} is not there, though {INDEX} says so")


def _check_tensors(
    folder: Path, stored: dict[str, StoredTensor], expected: Iterable[Tensor]
) -> None:
    wanted = {t.name: t for t in expected}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    extra = sorted(name for name in stored if name not in wanted)
    if extra:
        raise CheckpointError(
            f"{stored[extra[0]].path}: unexpected tensor {extra[0]}"
            + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
            + "; the config describes another model"
        )
    for name, tensor in wanted.items():
        found = stored[name]
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{found.path}: {name} has shape {list(found.shape)}, the config expects "
                f"{list(tensor.shape)}"
            )
        if found.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{found.path}: {name} has dtype {found.dtype}, expected BF16, F16 or F32"
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
    for file in _OBJECTS:
        parse_object(files.get(file, b"{}"), folder / file)
    assets = Assets(name, config, files, folder)
    build_files(assets)  # refuses templates that are none
    return assets


def _read_vocabulary(assets: Assets) -> Vocabulary | None:
    content = assets.files.get("tokenizer.json")
    if content is None:
        return None
    return parse_vocabulary(content, assets.folder / "tokenizer.json")
