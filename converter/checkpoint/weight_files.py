"""Which files of a folder hold the weights: those that transformers loads, in its order.

The order is that of ``_get_resolved_checkpoint_files`` (modeling_utils.py, 5.23): the file that
the config names, ``model.safetensors``, the shards of ``model.safetensors.index.json``. Of the
index only the names of files count there: their tensors are what their headers say. Shards without
an index, which transformers refuses, are taken when they are one complete set.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint.folder_kinds import refuse_without_weights
from lfmq.formats.huggingface.json_file import parse_object
from lfmq.quant.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# How transformers names what it saves of a model that is spread over devices.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files to read.

    Attributes:
        paths: safetensors files in the order in which transformers reads them; a tensor that
            several hold is the last one's.
        places: the index's word on which file a tensor is in, by its name there.
        index: the index, when one was read.
        notes: what a user should know of the choice.
    """

    paths: tuple[Path, ...]
    places: dict[str, str]
    index: Path | None = None
    notes: tuple[str, ...] = ()


def find_weight_files(folder: Path, config: dict[str, Any]) -> WeightFiles:
    """Choose the files that hold the weights.

    Args:
        folder: of the checkpoint.
        config: its ``config.json``, which may name the file.

    Raises:
        CheckpointError: there are none, one is missing, or it is not clear which count.
    """
    present = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if spread := [name for name in present if _DISTRIBUTED.fullmatch(name)]:
        raise CheckpointError(
            f"{folder / spread[0]}: part of a distributed checkpoint, whose files hold slices of "
            "tensors; load it with transformers and save it with save_pretrained"
        )
    named = config.get("transformers_weights")
    if named:
        return _named(folder, named)
    if (folder / SINGLE).is_file():
        return WeightFiles((folder / SINGLE,), {}, notes=_beside(folder, present))
    if (folder / INDEX).is_file():
        return _indexed(folder, folder / INDEX)
    if sets := _shard_sets(present):
        return _complete_set(folder, sets)
    refuse_without_weights(folder, present)


def _named(folder: Path, name: object) -> WeightFiles:
    """What the config's ``transformers_weights`` names, inside the folder."""
    if not isinstance(name, str) or not _is_inside(
        name, (".safetensors", ".safetensors.index.json")
    ):
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights is {str(name)[:60]!r}, expected the "
            "name of a safetensors file or index in the checkpoint folder"
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: named by config.json (transformers_weights), not found")
    note = f"{name} is read: config.json names it (transformers_weights)"
    if name.endswith(".json"):
        found = _indexed(folder, path)
        return WeightFiles(found.paths, found.places, found.index, (note,))
    return WeightFiles((path,), {}, notes=(note,))


def _beside(folder: Path, present: Iterable[str]) -> tuple[str, ...]:
    """A line when other weights lie beside the single file."""
    others = [name for name in present if _SHARD.fullmatch(name)]
    if not others and not (folder / INDEX).is_file():
        return ()
    what = f"{len(others)} shards" if others else INDEX
    return (f"{SINGLE} is read, as transformers does; {what} beside it are not",)


def _indexed(folder: Path, index: Path) -> WeightFiles:
    places = _weight_map(index)
    paths = []
    for name in sorted(set(places.values())):
        if not _is_inside(name, (".safetensors",)):
            raise CheckpointError(
                f"{index}: names the file {name[:80]!r}; only safetensors files inside the "
                "checkpoint folder are read"
            )
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: named by {index.name} but not found; fetch it")
        paths.append(path)
    return WeightFiles(tuple(paths), places, index)


def _is_inside(name: str, endings: tuple[str, ...]) -> bool:
    return Path(name).name == name and name not in (".", "..") and name.endswith(endings)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from error
    places = parse_object(content, index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is empty or not an object")
    return {str(k): str(v) for k, v in places.items()}


_Sets = dict[tuple[str, int], dict[int, str]]


def _shard_sets(present: Iterable[str]) -> _Sets:
    """Shards by what they are called and how many there should be, then by number."""
    sets: _Sets = {}
    for name in present:
        if found := _SHARD.fullmatch(name):
            sets.setdefault((found[1], int(found[3])), {})[int(found[2])] = name
    return sets


def _complete_set(folder: Path, sets: _Sets) -> WeightFiles:
    if len(sets) > 1:
        first, second = (next(iter(shards.values())) for shards in list(sets.values())[:2])
        raise CheckpointError(
            f"{folder}: {INDEX} not found, and the shards are of several sets ({first}, "
            f"{second}); keep one, or fetch the index"
        )
    ((stem, count), shards) = next(iter(sets.items()))
    missing = [i for i in range(1, min(count, len(shards) + 1) + 1) if i not in shards]
    if missing or len(shards) != count:
        lost = f"{stem}-{(missing or [count])[0]:05d}-of-{count:05d}.safetensors"
        raise CheckpointError(
            f"{folder / lost}: not found, and neither is {INDEX}; fetch both ({len(shards)} of "
            f"{count} shards are there)"
        )
    paths = tuple(folder / shards[i] for i in sorted(shards))
    note = f"no {INDEX}: the {count} shards in the folder are read, which are one complete set"
    return WeightFiles(paths, {}, notes=(note,))
