"""Reads a GGUF build back under checkpoint names, with gguf-py's dequantizers.

A build of several files (``NAME-00001-of-00003.gguf``, llama.cpp's ``gguf-split``) is read whole
from its first one, as llama.cpp does.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray

from lfmq.formats.gguf.keys import read_keys
from lfmq.formats.gguf.names import HEAD, name_map, split_expert, tensor_name
from lfmq.formats.gguf.scan import Header, TensorInfo, read_run, scan_gguf
from lfmq.formats.gguf.splits import split_files
from lfmq.formats.plan import Plan, Role
from lfmq.quant.errors import ValidationError

EMBEDDING = "token_embd.weight"
# Types whose bytes mean a weight each; all others are blocks of integers with scales.
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# What gguf-py has but llama.cpp does not load a weight of.
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


class GgufReader:
    """An opened GGUF build; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        first = scan_gguf(path)
        self._tensors = _all_tensors(first)
        if EMBEDDING not in self._tensors:
            raise ValidationError(f"{path}: tensor {EMBEDDING!r} is missing")
        self.header = first
        tied = HEAD not in self._tensors  # llama.cpp's rule
        config = read_keys(first, self._tensors[EMBEDDING].shape[0])
        self.config = replace(config, tie_word_embeddings=tied)
        self._names = name_map(self.config)

    def check(self, model: Plan) -> None:
        """The file holds the model's tensors in their shapes, and no other.

        Raises:
            ValidationError: a tensor is missing, unexpected, or of another shape or type.
        """
        expected = self._expected(model)
        for name, shape in expected.items():
            tensor = self._tensor(name)
            if tensor.shape != shape:
                raise ValidationError(
                    f"{tensor.path}: tensor {name} is {list(tensor.shape)}, expected "
                    f"{list(shape)}; write the build again"
                )
            if tensor.type.name in _NO_WEIGHTS:
                raise ValidationError(
                    f"{tensor.path}: tensor {name} has type {tensor.type.name}, which holds no "
                    "weights"
                )
        for name, tensor in self._tensors.items():
            if name not in expected:
                raise ValidationError(
                    f"{tensor.path}: has a tensor {name!r} that this model does not have and "
                    "llama.cpp may compute with; the file is of another model, or of a model "
                    "with a head of its own"
                )

    def _expected(self, model: Plan) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the file's tensors; the experts of a projection are one."""
        found: dict[str, tuple[int, ...]] = {}
        for entry in model.entries:
            shape = entry.shape
            if entry.role is Role.CONV_KERNEL:  # [H, 1, L] is stored as [H, L]
                shape = (shape[0], shape[2])
            if entry.expert is not None:
                shape = (model.config.num_experts, *shape)
            found[tensor_name(split_expert(entry.name)[0], self._names)] = shape
        return found

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise ValidationError(f"{self._path}: tensor {name!r} is missing")
        return self._tensors[name]

    def is_float(self, name: str) -> bool:
        """Whether the tensor is stored as floats, not as integers with scales."""
        key, _ = split_expert(name)
        return self._tensor(tensor_name(key, self._names)).type in _FLOATS

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The dequantized tensor or a run of its rows, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it or is damaged.
        """
        key, expert = split_expert(name)
        tensor = self._tensor(tensor_name(key, self._names))
        shape = tensor.shape if expert is None else tensor.shape[1:]
        if expert is not None and not (len(tensor.shape) > 1 and expert < tensor.shape[0]):
            raise ValidationError(f"{self._path}: {name} is missing")
        bytes_of = quant_shape_to_byte_shape(shape, tensor.type)
        row = int(np.prod(bytes_of[1:]))  # of the first dimension; a vector's are its items
        if len(shape) == 1:
            start, stop, row = 0, 1, tensor.nbytes
            rows: tuple[int, ...] = bytes_of
        else:
            stop = shape[0] if stop is None else min(stop, shape[0])
            rows = (stop - start, *bytes_of[1:])
        offset = tensor.offset + (expert or 0) * shape[0] * row + start * row
        data = read_run(tensor.path, offset, (stop - start) * row).reshape(rows)
        values = _floats(data, tensor, name)
        return values[:, None, :] if name.endswith(".conv.conv.weight") else values


def _floats(data: NDArray[np.uint8], tensor: TensorInfo, name: str) -> NDArray[np.float32]:
    try:
        values: NDArray[np.float32] = dequantize(data, tensor.type)
    except (NotImplementedError, ValueError) as error:
        raise ValidationError(
            f"{tensor.path}: {name} has type {tensor.type.name}, which gguf-py cannot dequantize"
        ) from error
    return values.astype(np.float32, copy=False)


# ---- several files


def _all_tensors(first: Header) -> dict[str, TensorInfo]:
    """Those of all files; llama.cpp's ``llama_model_loader`` asks for the same keys and names."""
    count = first.value("split.count")
    if count in (None, 0, 1):
        return dict(first.tensors)
    path, files = first.path, split_files(first.path)
    if first.value("split.no") != 0:
        raise ValidationError(
            f"{path}: part {_part(first)} of a build of several files; give the first one, "
            "...-00001-of-....gguf"
        )
    if count != len(files) or files[0] != path:
        raise ValidationError(
            f"{path}: split.count is {count!r}, expected the number in a name that ends with "
            "-00001-of-0000N.gguf; the files of a split build keep their names"
        )
    tensors = dict(first.tensors)
    for number, header in enumerate(_others(files), 1):
        if header.value("split.no") != number or header.value("split.count") != count:
            raise ValidationError(
                f"{header.path}: part {_part(header)}, expected {number + 1} of {count}; fetch "
                "the parts again"
            )
        if both := tensors.keys() & header.tensors.keys():
            raise ValidationError(f"{header.path}: {min(both)!r} is also in another part")
        tensors |= header.tensors
    total = first.value("split.tensors.count")
    if total != len(tensors):
        raise ValidationError(
            f"{path}: split.tensors.count is {total!r}, the parts have {len(tensors)} tensors"
        )
    return tensors


def _others(files: tuple[Path, ...]) -> Iterator[Header]:
    for file in files[1:]:
        if not file.is_file():
            raise ValidationError(
                f"{file}: missing; a build of {len(files)} files needs all of them beside one "
                "another"
            )
        yield scan_gguf(file)


def _part(header: Header) -> str:
    number, count = header.value("split.no"), header.value("split.count")
    return f"{number + 1 if isinstance(number, int) else number!r} of {count!r}"


def open_reader(path: Path) -> GgufReader:
    """Open a finished GGUF build.

    Raises:
        ValidationError: not a GGUF file, truncated, or a required key or tensor is missing.
    """
    return GgufReader(path)
