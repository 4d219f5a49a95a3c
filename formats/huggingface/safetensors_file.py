"""Reads safetensors headers and tensors by offset, trusting nothing the header says.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Tensors are read with positioned reads, not
through a mapping: a file that shrinks while it is read is then an error and not a dead process.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfmq.formats.huggingface.json_file import refuse_pointer
from lfmq.quant.errors import CheckpointError
from lfmq.quant.types import widened

# The format's own limit on a header; a length beyond it is damage or an attack.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
DTYPES = FLOAT_DTYPES | {
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are: file, dtype (safetensors' name), shape, offset and length."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: unreadable, truncated, overlong, or a header that contradicts the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            _refuse_others(path, start + file.read(40))
            file.seek(8)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: the header claims {length:,} bytes, the file has {size:,}; "
                    "it is damaged or not safetensors, fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
        tensors = {
            name: _tensor(path, name, fields, 8 + length)
            for name, fields in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is not valid ({error}); fetch the file again"
        ) from error
    _check_coverage(path, tensors, 8 + length, size)
    return tensors


def _refuse_others(path: Path, start: bytes) -> None:
    """Files of other kinds under a safetensors name, by how they begin."""
    refuse_pointer(path, start)
    kinds = {b"GGUF": "a GGUF file", b"PK\x03\x04": "a pickle file of torch"}
    for mark, kind in kinds.items():
        if start.startswith(mark):
            raise CheckpointError(
                f"{path}: {kind}, not safetensors; download the safetensors of the checkpoint"
            )


def _tensor(path: Path, name: str, fields: dict[str, Any], base: int) -> StoredTensor:
    begin, end = _integers(name, "data_offsets", fields)
    shape = _integers(name, "shape", fields)
    dtype = str(fields.get("dtype"))
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {dtype} {list(shape)}")
    if begin < 0 or end < begin or any(n < 0 for n in shape):
        raise ValueError(f"{name} has offsets {begin} to {end} and shape {list(shape)}")
    return StoredTensor(path, dtype, shape, base + begin, end - begin)


def _integers(name: str, key: str, fields: dict[str, Any]) -> tuple[int, ...]:
    values = fields.get(key)
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {key} {str(values)[:50]}")
    if not all(type(v) is int and abs(v) < 2**63 for v in values):
        raise ValueError(f"{name} has {key} {str(values)[:50]}")
    return tuple(values)


def _check_coverage(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Tensors must cover the file without gap or overlap, as the format demands."""
    at = start
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if t.offset != at:
            raise CheckpointError(f"{path}: {name} starts at {t.offset}, expected {at}")
        at += t.nbytes
    if at != size:
        kind = "truncated" if at > size else "overlong"
        raise CheckpointError(
            f"{path}: {kind}, the header describes {at:,} bytes and the file has {size:,}; "
            "fetch it again"
        )


def part_of(tensor: StoredTensor, index: int) -> StoredTensor:
    """One slice of the first axis, an expert of a stack."""
    nbytes = tensor.nbytes // tensor.shape[0]
    return StoredTensor(
        tensor.path, tensor.dtype, tensor.shape[1:], tensor.offset + index * nbytes, nbytes
    )


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """A run of slices of the first axis; it ends where the tensor does."""
    stop = min(stop, tensor.shape[0])
    nbytes = tensor.nbytes // tensor.shape[0]
    return StoredTensor(
        tensor.path,
        tensor.dtype,
        (stop - start, *tensor.shape[1:]),
        tensor.offset + start * nbytes,
        (stop - start) * nbytes,
    )


def read_floats(tensor: StoredTensor) -> NDArray[np.float32]:
    """A float tensor as float32, which holds bfloat16 and float16 exactly."""
    return widened(read_tensor(tensor))


def read_tensor(tensor: StoredTensor, into: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """The tensor's values in its own dtype (bfloat16 through ml_dtypes).

    Args:
        tensor: what to read.
        into: memory for its bytes, which the values then lie in; new memory when None.

    Raises:
        CheckpointError: a dtype not known here, the file changed since its header was read, or
            it cannot be read.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{tensor.path}: holds dtype {tensor.dtype}, which is not known")
    content = np.empty(tensor.nbytes, np.uint8) if into is None else into[: tensor.nbytes]
    view = content.data
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < tensor.nbytes:
                n = os.preadv(descriptor, [view[done:]], tensor.offset + done)
                if n == 0:
                    raise CheckpointError(f"{tensor.path}: became shorter while it was read")
                done += n
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read ({error.strerror})") from error
    return content.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
