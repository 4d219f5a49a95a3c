"""The header of a GGUF file, read without trusting a count in it.

gguf-py's reader loops over whatever the header counts; here every count, length and size is held
against the bytes that are there before anything is done with it. What is refused is what
``gguf_init_from_file`` refuses (ggml/src/gguf.cpp): duplicate keys and names, nested arrays, more
than four dimensions, rows that are no whole blocks, data that does not lie one tensor after the
other. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from lfmq.formats.huggingface.safetensors_file import StoredTensor, read_tensor
from lfmq.quant.errors import CheckpointError, ValidationError, quoted

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 63  # GGML_MAX_NAME less its final zero
# Far above any tokenizer or template; beyond them a header fills memory.
_MOST_ITEMS = 2**22
_LONGEST_TEXT = 2**24
_LONGEST_HEADER = 2**28


class FieldType(IntEnum):
    """``gguf_type``."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_NUMBERS = {
    FieldType.UINT8: "<u1",
    FieldType.INT8: "<i1",
    FieldType.UINT16: "<u2",
    FieldType.INT16: "<i2",
    FieldType.UINT32: "<u4",
    FieldType.INT32: "<i4",
    FieldType.FLOAT32: "<f4",
    FieldType.BOOL: "<u1",
    FieldType.UINT64: "<u8",
    FieldType.INT64: "<i8",
    FieldType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A key's value.

    Attributes:
        type: of the value, or of the items of a list.
        value: number, flag, text, or a list of one of them.
    """

    type: FieldType
    value: Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        path: the file, one of several in a split build.
        type: of its blocks.
        shape: outermost dimension first, weights.
        offset: in the file, bytes.
        nbytes: its length.
    """

    path: Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file up to its data: keys and tensors in the order of the file."""

    path: Path
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]

    def value(self, key: str) -> Any:
        """A key's value; None without the key."""
        field = self.fields.get(key)
        return None if field is None else field.value


def scan_gguf(path: Path) -> Header:
    """Keys and tensors of one file; no weight is read.

    Raises:
        ValidationError: it cannot be read, or is not what a GGUF file has to be.
    """
    try:
        with path.open("rb") as file:
            return _Scanner(path, file).header()
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_run(path: Path, offset: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes of a file; a positioned read, so that a file that shrinks is an error and no crash.

    Raises:
        ValidationError: it cannot be read, or became shorter.
    """
    try:
        return read_tensor(StoredTensor(path, "U8", (nbytes,), offset, nbytes))
    except CheckpointError as error:
        raise ValidationError(str(error)) from error


class _Scanner:
    """One pass over a header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0

    def header(self) -> Header:
        magic = self._take(4, "the magic word")
        if magic != MAGIC:
            raise self._wrong(f"starts with {magic!r}, expected {MAGIC!r}")
        version = self._number("<I", "the version")
        if version not in _VERSIONS:
            raise self._wrong(f"GGUF version is {version}, expected 2 or 3 in little-endian order")
        tensors = self._count("<Q", "tensors", least_bytes=24)
        keys = self._count("<Q", "keys", least_bytes=13)
        fields: dict[str, Field] = {}
        for _ in range(keys):
            name = self._text("a key's name")
            if name in fields:
                raise self._wrong(f"has the key {quoted(name)} twice")
            fields[name] = self._field(name)
        alignment = self._alignment(fields.get("general.alignment"))
        rows = [self._row() for _ in range(tensors)]
        return Header(self._path, fields, self._place(rows, alignment))

    def _alignment(self, field: Field | None) -> int:
        if field is None:
            return 32
        value = field.value
        if field.type is not FieldType.UINT32 or isinstance(value, list) or value.bit_count() != 1:
            raise self._wrong(
                f"general.alignment is {quoted(value)}, expected a power of two as UINT32"
            )
        return int(value)

    # ---- keys

    def _field(self, name: str) -> Field:
        kind = self._type(f"the key {quoted(name)}")
        if kind is not FieldType.ARRAY:
            return Field(kind, self._values(name, kind, 1)[0])
        kind = self._type(f"the list {quoted(name)}")
        if kind is FieldType.ARRAY:
            raise self._wrong(f"{quoted(name)} is a list of lists, which GGUF files do not have")
        nbytes = 8 if kind is FieldType.STRING else np.dtype(_NUMBERS[kind]).itemsize
        count = self._count("<Q", f"items of {quoted(name)}", least_bytes=nbytes)
        return Field(kind, self._values(name, kind, count))

    def _type(self, what: str) -> FieldType:
        number = self._number("<I", f"the type of {what}")
        try:
            return FieldType(number)
        except ValueError as error:
            raise self._wrong(f"{what} has type {number}, which GGUF does not have") from error

    def _values(self, name: str, kind: FieldType, count: int) -> list[Any]:
        if kind is FieldType.STRING:
            return [self._text(quoted(name)) for _ in range(count)]
        dtype = np.dtype(_NUMBERS[kind])
        stored = np.frombuffer(self._take(count * dtype.itemsize, quoted(name)), dtype)
        if kind is not FieldType.BOOL:
            return list(stored.tolist())
        if (stored > 1).any():
            raise self._wrong(f"{quoted(name)} has a flag that is neither 0 nor 1")
        return list(stored.astype(bool).tolist())

    # ---- tensors

    def _row(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._text("a tensor's name")
        if len(name.encode()) > _LONGEST_NAME:
            raise self._wrong(f"tensor {quoted(name)} has a name of more than 63 bytes")
        count = self._number("<I", f"dimensions of {quoted(name)}")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self._wrong(f"tensor {quoted(name)} has {count} dimensions, expected 1 to 4")
        sizes = tuple(self._number("<Q", f"the shape of {quoted(name)}") for _ in range(count))
        if not all(0 < n < 2**48 for n in sizes):
            raise self._wrong(f"tensor {quoted(name)} has shape {quoted(sizes[::-1])}")
        number = self._number("<I", f"the type of {quoted(name)}")
        try:
            kind = GGMLQuantizationType(number)
            block, _ = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self._wrong(
                f"tensor {quoted(name)} has type {number}, which this gguf-py does not know"
            ) from error
        if sizes[0] % block:
            raise self._wrong(
                f"tensor {quoted(name)} has rows of {sizes[0]} weights, {kind.name} has blocks of "
                f"{block}"
            )
        return name, sizes[::-1], kind, self._number("<Q", f"the offset of {quoted(name)}")

    def _place(
        self, rows: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], alignment: int
    ) -> dict[str, TensorInfo]:
        """Tensors one after the other, each at a multiple of the alignment, all in the file."""
        start, end, found = _padded(self._at, alignment), 0, dict[str, TensorInfo]()
        for name, shape, kind, offset in rows:
            if name in found:
                raise self._wrong(f"has the tensor {quoted(name)} twice")
            block, nbytes = GGML_QUANT_SIZES[kind]
            nbytes = math.prod(shape) // block * nbytes
            if offset != end:
                raise self._wrong(f"tensor {quoted(name)} is at {offset:,}, expected {end:,}")
            if start + offset + nbytes > self._size:
                raise self._wrong(
                    f"{self._size:,} bytes, but {quoted(name)} ends at "
                    f"{start + offset + nbytes:,}; the file is cut off"
                )
            found[name] = TensorInfo(self._path, kind, shape, start + offset, nbytes)
            end = _padded(offset + nbytes, alignment)
        return found

    # ---- bytes

    def _count(self, form: str, what: str, least_bytes: int) -> int:
        count = self._number(form, f"the number of {what}")
        if count > min(_MOST_ITEMS, (self._size - self._at) // least_bytes):
            raise self._wrong(
                f"the header counts {count:,} {what}, the file has {self._size:,} bytes"
            )
        return count

    def _text(self, what: str) -> str:
        length = self._number("<Q", f"the length of {what}")
        if length > _LONGEST_TEXT:
            raise self._wrong(f"{what} has a length of {length:,} bytes")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} is not UTF-8 text") from error

    def _number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form), what))
        return int(value)

    def _take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self._size - self._at or self._at + nbytes > _LONGEST_HEADER:
            raise self._wrong(
                f"{what} ends at byte {self._at + nbytes:,} of {self._size:,}; the file is cut off"
            )
        content = self._file.read(nbytes)
        if len(content) != nbytes:
            raise self._wrong("became shorter while it was read")
        self._at += nbytes
        return content

    def _wrong(self, what: str) -> ValidationError:
        return ValidationError(
            f"{self._path}: not a readable GGUF file: {what}; fetch it or write it again"
        )


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
