"""llama.cpp's importance matrix: what ``llama-imatrix`` writes and ``llama-quantize`` reads.

The layout follows llama.cpp's tools/imatrix/imatrix.cpp (``save_imatrix``): a GGUF file of type
``imatrix`` with, for every matrix of the blocks, ``NAME.in_sum2`` {columns, matrices} and
``NAME.counts`` {1, matrices} in float32; the experts of a layer are one entry. The reader of
``llama-quantize`` divides the sums by the counts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray

from lfmq.formats.gguf.names import ARCHITECTURES, split_expert, tensor_name
from lfmq.formats.gguf.scan import FieldType, TensorInfo, read_run, scan_gguf
from lfmq.formats.writing.temporary import make_way
from lfmq.quant.errors import PlanError, ValidationError
from lfmq.quant.types import InputStats

MAGIC = b"GGUF"
_TABLE = ARCHITECTURES["lfm2_moe"].tensors  # has the names of models without experts too
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_FIELDS = {
    _DATASETS: FieldType.STRING,
    _CHUNKS: FieldType.UINT32,
    _CHUNK_SIZE: FieldType.UINT32,
}


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        inputs: by the checkpoint name of the weight; an expert's own.
        datasets: names of the texts.
        chunks: windows of text.
        chunk_size: tokens of a window.
    """

    inputs: Mapping[str, InputStats]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def write_imatrix(path: Path, imatrix: Imatrix, layers: int) -> None:
    """Write the file under a temporary name and rename it; equal values give equal bytes.

    What the tokens of an expert counted with is divided out: the sums are those of ``tokens``
    tokens of the mean that was seen. An expert without a token has zeros and the count 0.

    Args:
        path: the file.
        imatrix: all experts of a layer, or none of them.
        layers: of the model.

    Raises:
        PlanError: it cannot be written.
    """
    names = get_tensor_name_map(_TABLE, layers)
    part = path.with_name(path.name + ".part")
    try:
        make_way(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(part, "")
        writer.kv_data[0].clear()  # the writer begins with an architecture; this file has none
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, list(imatrix.datasets))
        writer.add_uint32(_CHUNKS, imatrix.chunks)
        writer.add_uint32(_CHUNK_SIZE, imatrix.chunk_size)
        for name, stack in _stacks(imatrix.inputs, names).items():
            counts = np.array([[m.tokens] for m in stack], np.float32)
            sums = np.stack([m.mean * m.tokens for m in stack]).astype(np.float32)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise PlanError(f"{path}: cannot be written ({error.strerror or error})") from error


def _stacks(inputs: Mapping[str, InputStats], names: TensorNameMap) -> dict[str, list[InputStats]]:
    stacks: dict[str, dict[int, InputStats]] = {}
    for name, moments in inputs.items():
        key, expert = split_expert(name)
        stacks.setdefault(tensor_name(key, names), {})[expert or 0] = moments
    return {name: [stack[i] for i in range(len(stack))] for name, stack in stacks.items()}


def read_imatrix(
    path: Path, columns: Mapping[str, int], layers: int, *, optional: Sequence[str] = ()
) -> Imatrix:
    """Read the file of a model that has these weights.

    Args:
        path: the file.
        columns: inputs of each weight by checkpoint name, experts in order.
        layers: of the model.
        optional: weights the file may lack.

    Raises:
        ValidationError: not an importance matrix, of another model, damaged.
    """
    header = scan_gguf(path)
    if header.value(_TYPE) != "imatrix":
        raise ValidationError(
            f"{path}: {_TYPE} is {header.value(_TYPE)!r:.60}, expected 'imatrix' (what "
            "llama-imatrix writes)"
        )
    for key, kind in _FIELDS.items():
        field = header.fields.get(key)
        if field is None:
            raise ValidationError(f"{path}: metadata key {key!r} is missing")
        if field.type is not kind or isinstance(field.value, list) != (key == _DATASETS):
            raise ValidationError(
                f"{path}: {key} is {field.value!r:.60} ({field.type.name}), expected {kind.name}"
            )
    names = get_tensor_name_map(_TABLE, layers)
    experts: dict[str, int] = {}
    for name in columns:
        key, expert = split_expert(name)
        experts[key] = max(experts.get(key, 0), 1 + (expert or 0))
    inputs = dict(_inputs(path, header.tensors, columns, experts, names, frozenset(optional)))
    return Imatrix(
        inputs,
        tuple(header.value(_DATASETS)),
        header.value(_CHUNKS),
        header.value(_CHUNK_SIZE),
    )


def _inputs(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    columns: Mapping[str, int],
    experts: Mapping[str, int],
    names: TensorNameMap,
    optional: frozenset[str],
) -> Iterator[tuple[str, InputStats]]:
    for name, width in columns.items():
        key, expert = split_expert(name)
        stored = tensor_name(key, names)
        if name in optional and f"{stored}.in_sum2" not in tensors:
            continue
        count = experts[key]
        sums = _values(path, tensors, f"{stored}.in_sum2", (count, width))
        counts = _values(path, tensors, f"{stored}.counts", (count, 1))
        tokens = int(counts[expert or 0, 0])
        yield name, InputStats(tokens, float(tokens), sums[expert or 0].astype(np.float64))


def _values(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, int]
) -> NDArray[np.float32]:
    info = tensors.get(name)
    wanted = f"expected float32 {list(shape)}"
    if info is None:
        raise ValidationError(f"{path}: {name} is missing, {wanted}; is it of another model?")
    whole = len(info.shape) <= 2 and math.prod(info.shape) == shape[0] * shape[1]
    if info.type is not GGMLQuantizationType.F32 or not whole:
        kind = "float32" if info.type is GGMLQuantizationType.F32 else info.type.name
        what = f"{kind} {list(info.shape)}"
        raise ValidationError(f"{path}: {name} is {what}, {wanted}; is it of another model?")
    found = read_run(info.path, info.offset, info.nbytes).view(np.float32)
    if not (np.isfinite(found) & (found >= 0)).all():
        raise ValidationError(f"{path}: {name} holds a negative or not finite value")
    return found.reshape(shape)
