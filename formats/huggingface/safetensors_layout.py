"""Lays out safetensors files: header and offsets from names, dtypes and shapes, shards, floats.

Layout: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes, then the
tensors without gaps (https://github.com/huggingface/safetensors#format). Sharded checkpoints name
each tensor's file in ``model.safetensors.index.json``, as the Hugging Face libraries write it.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfmq.formats.build import Bytes, FileLayout, Segment, as_bytes, as_json, text_file
from lfmq.formats.huggingface.safetensors_file import DTYPES
from lfmq.formats.plan import TensorPlan
from lfmq.quant.errors import UnsupportedError

# The size at which mlx-lm and transformers start a new file.
SHARD_NBYTES = 5 * 2**30
INDEX_FILE = "model.safetensors.index.json"
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a file.

    Attributes:
        name: its key in the file.
        dtype: safetensors' name of it, ``F16`` or ``U32``.
        shape: as stored.
        segments: what fills it in, offsets counted from the tensor's first byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Its length, bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def shard_files(
    tensors: Sequence[TensorLayout],
    *,
    metadata: Mapping[str, str],
    total_parameters: int,
    shard_nbytes: int = SHARD_NBYTES,
) -> tuple[FileLayout, ...]:
    """The files that hold ``tensors`` in order, and their index.

    Args:
        tensors: in the order of the file.
        metadata: text values of the header's ``__metadata__``.
        total_parameters: number of weights, for the index.
        shard_nbytes: a file is closed before its tensors exceed this.
    """
    shards = _split(tensors, shard_nbytes)
    names = [_file_name(i, len(shards)) for i in range(len(shards))]
    files = [_file(n, s, metadata) for n, s in zip(names, shards, strict=True)]
    index = {
        "metadata": {
            "total_size": sum(t.nbytes for t in tensors),
            "total_parameters": total_parameters,
        },
        "weight_map": {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        },
    }
    return (*files, text_file(INDEX_FILE, as_json(index)))


def _split(tensors: Iterable[TensorLayout], shard_nbytes: int) -> list[list[TensorLayout]]:
    shards: list[list[TensorLayout]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_nbytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _file_name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _file(name: str, tensors: list[TensorLayout], metadata: Mapping[str, str]) -> FileLayout:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    segments: list[Segment] = []
    offset = len(start)
    for tensor in tensors:
        segments += [replace(p, offset=offset + p.offset) for p in tensor.segments]
        offset += tensor.nbytes
    return FileLayout(name, offset, ((0, start),), tuple(segments))


def pack_float(entry: TensorPlan, values: NDArray[np.float32], dtype: str, remedy: str) -> Bytes:
    """Floats as ``F32``, ``BF16`` or ``F16``.

    Raises:
        UnsupportedError: a value is beyond float16; ``remedy`` ends the line.
    """
    if dtype == "F32":
        return as_bytes(values.astype(np.float32, copy=False))
    if dtype == "BF16":
        return as_bytes(values.astype(ml_dtypes.bfloat16))
    largest = float(np.abs(values).max(initial=0))
    if largest > FLOAT16_MAX:
        raise UnsupportedError(
            f"{entry.name}: holds {largest:g}, beyond the {FLOAT16_MAX:g} of the float16 {remedy}"
        )
    return as_bytes(values.astype(np.float16))
