"""Reads an ONNX build back under checkpoint names: the graph with onnx, weights by offset."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.onnx.check import check_graph
from lfmq.formats.onnx.genai import MODEL_FILE as MODEL_FILE
from lfmq.formats.onnx.genai import check_genai
from lfmq.formats.onnx.placement import DATA_FILE as DATA_FILE
from lfmq.formats.onnx.tensors import unpack
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.quant.errors import CheckpointError, ValidationError, quoted
from lfmq.quant.types import Scheme, Storage

# The graph and its small constants; weights lie in the data file.
_LARGEST_GRAPH = 2**26
_EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.(\d+)\.(w[123])\.weight")
_STACK = re.compile(r"(.*\.experts)\.([^.]+)\.(gate_up|down)(?:\.codes)?")
_BITS, _GROUPS = (4, 8), (32, 64, 128)
# where an operator takes quantized weights
_QUANTIZED_INPUTS = {"MatMulNBits": (1,), "GatherBlockQuantized": (0,), "QMoE": (2, 5)}
_DTYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.UINT8: np.uint8,
}
_FLOATS: dict[int, Storage] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor of the data file, its place checked."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class OnnxReader:
    """An opened ONNX build; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._graph = path / MODEL_FILE
        self._model = _load_model(self._graph)
        self._data = _map_data(path)
        self._tensors = {
            t.name: self._placed(t)
            for t in self._model.graph.initializer
            if t.data_location == TensorProto.EXTERNAL
        }
        try:
            self.config = parse_config(read_config(path), path / "config.json")
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        self._schemes = _schemes_of(self._model.graph.node)
        self._stacks = self._find_stacks()

    def _placed(self, tensor: TensorProto) -> _Placed:
        """Where a tensor lies, after checking that it is inside the data file of the folder."""
        entries = [(e.key, e.value) for e in tensor.external_data]
        place = dict(entries)
        whole = len(place) == len(entries) and place.keys() == {"location", "offset", "length"}
        if not whole or not all(isinstance(value, str) for value in place.values()):
            raise self._wrong(
                tensor, f"is at {quoted(entries)}, expected location, offset, length"
            )
        if place["location"] != DATA_FILE:
            raise self._wrong(
                tensor,
                f"lies in {quoted(place['location'])}, expected {DATA_FILE!r} in the folder",
            )
        if not all(re.fullmatch(r"[0-9]{1,15}", place[key]) for key in ("offset", "length")):
            raise self._wrong(
                tensor, f"is at {quoted(place)}, expected offset and length in bytes"
            )
        offset, length = int(place["offset"]), int(place["length"])
        shape = tuple(tensor.dims)
        dtype = _DTYPES.get(tensor.data_type)
        if dtype is None or not shape or not all(0 < n < 2**40 for n in shape):
            raise self._wrong(tensor, f"has type {tensor.data_type} and shape {quoted(shape)}")
        count = np.dtype(dtype).itemsize
        for n in shape:
            count *= n
        if count != length:
            raise self._wrong(tensor, f"has {length:,} bytes, its shape takes {count:,}")
        if offset + length > len(self._data):
            raise ValidationError(
                f"{self._path / DATA_FILE}: {len(self._data):,} bytes, but {quoted(tensor.name)} "
                f"ends at {offset + length:,}; the file is truncated, write or copy it again"
            )
        return _Placed(tensor.name, tensor.data_type, shape, offset, length)

    def _wrong(self, tensor: TensorProto, what: str) -> ValidationError:
        return ValidationError(
            f"{self._graph}: tensor {quoted(tensor.name)} {what}; write the build again"
        )

    def _find_stacks(self) -> dict[str, dict[int, tuple[str, int]]]:
        """For the two stacks of each layer, the tensor that holds an expert, and its row there."""
        members = {t.name: t for t in self._model.graph.initializer if t.name.endswith(".members")}
        stacks: dict[str, dict[int, tuple[str, int]]] = {}
        for name, tensor in self._tensors.items():
            found = _STACK.fullmatch(name)
            if found is None:
                continue
            experts, label, part = found.groups()
            listed = members.get(f"{experts}.{label}.members")
            rows = list(range(tensor.shape[0])) if listed is None else self._members(listed)
            if len(rows) != tensor.shape[0]:
                raise ValidationError(
                    f"{self._graph}: {quoted(name)} holds {tensor.shape[0]} experts, its list "
                    f"has {len(rows)}; write the build again"
                )
            stack = stacks.setdefault(f"{experts}.{part}", {})
            for row, expert in enumerate(rows):
                stack[expert] = (name, row)
        return stacks

    def _members(self, tensor: TensorProto) -> list[int]:
        if tensor.data_type != TensorProto.INT64 or len(tensor.dims) != 1:
            raise self._wrong(tensor, "is not a list of experts")
        if (
            tensor.data_location == TensorProto.EXTERNAL
            or len(tensor.raw_data) != 8 * tensor.dims[0]
        ):
            raise self._wrong(tensor, "is not a list of experts")
        return [int(n) for n in numpy_helper.to_array(tensor)]

    def check(self, model: Plan) -> None:
        """The graph is the one that the writer makes of this config and these storages.

        Raises:
            ValidationError: the first node, tensor or input that is not the writer's.
        """
        entries = tuple(replace(e, storage=self._storage(e)) for e in model.entries)
        producer = self._model.producer_name
        if producer != "lfmq":
            raise ValidationError(
                f"{self._graph}: made by {quoted(producer)}, only graphs that lfmq writes can be "
                "checked; convert the checkpoint to onnx"
            )
        plan = Plan(self.config, entries, model.recipe)
        check_graph(self._graph, self._model, self._data, plan)
        check_genai(self._path, self.config)

    def is_float(self, name: str) -> bool:
        """Whether the tensor is stored as floats, not as integers with scales."""
        return not self._source(name)[0].endswith(".codes")

    def _source(self, name: str) -> tuple[str, int | None]:
        """The tensor that holds a weight, and the expert's row in it."""
        match = _EXPERT.fullmatch(name)
        if match is None:
            kinds = (f"{name}.codes", f"{name}.transposed", name)
            return next((n for n in kinds if n in self._tensors), name), None
        part = "down" if match[3] == "w2" else "gate_up"
        found = self._stacks.get(f"{match[1]}.{part}", {}).get(int(match[2]))
        if found is None:
            raise ValidationError(f"{self._path}: {match[1]}.{match[2]} is missing")
        return found

    def _storage(self, entry: TensorPlan) -> Storage:
        """How a weight is stored, by the shapes of its tensors."""
        name, _ = self._source(entry.name)
        tensor = self._tensor(name)
        if not name.endswith(".codes"):
            storage = _FLOATS.get(tensor.kind)
            if storage is None:
                raise ValidationError(
                    f"{self._graph}: {name} has type {tensor.kind}, expected floats"
                )
            return storage
        return self._scheme(name)

    def _scheme(self, codes: str) -> Scheme:
        """The grid, bits and group that the operators which read the codes give them."""
        found = self._schemes.get(codes, set())
        if len(found) != 1:
            raise ValidationError(
                f"{self._graph}: no one operator says how {quoted(codes)} is quantized (found "
                f"{quoted(sorted(found))}); write the build again"
            )
        bits, group = next(iter(found))
        if bits not in _BITS or group not in _GROUPS:
            raise ValidationError(
                f"{self._graph}: {quoted(codes)} has {bits} bits in groups of {group}, expected "
                f"{_BITS} bits in groups of {_GROUPS}; write the build again"
            )
        zeros = _zero_name(codes) in self._tensors
        return Scheme(bits, group, "affine_zero_point" if zeros else "symmetric")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The dequantized tensor or a run of its rows, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it or is damaged.
        """
        source, row = self._source(name)
        part = slice(start, stop)
        if source.endswith(".transposed"):
            return np.ascontiguousarray(self._array(source).T[part], np.float32)
        if row is not None and not name.endswith(".w2.weight"):  # rows of w1 and w3 take turns
            first, last = (
                2 * start + name.endswith(".w3.weight"),
                None if stop is None else 2 * stop,
            )
            part = slice(first, last, 2)
        if source.endswith(".codes"):
            return self._dequantize(source, row, part)
        values = self._array(source)
        return (values if row is None else values[row])[part].astype(np.float32)

    def _dequantize(self, name: str, row: int | None, part: slice) -> NDArray[np.float32]:
        scheme = self._scheme(name)
        names = [name, f"{name.removesuffix('.codes')}.scale"]
        if scheme.has_offset:
            names.append(_zero_name(name))
        arrays = (self._array(n) if row is None else self._array(n)[row] for n in names)
        codes, scale, *zero = (np.ascontiguousarray(a[part]) for a in arrays)
        try:
            return unpack(codes, scale, scheme, *zero)
        except (ValueError, IndexError) as error:
            raise ValidationError(f"{self._graph}: {name} is damaged ({error!s:.100})") from error

    def _tensor(self, name: str) -> _Placed:
        if name not in self._tensors:
            raise ValidationError(f"{self._path}: tensor {name!r} is missing")
        return self._tensors[name]

    def _array(self, name: str) -> NDArray[Any]:
        """A tensor of the data file, as a view."""
        tensor = self._tensor(name)
        data = self._data[tensor.offset : tensor.offset + tensor.nbytes]
        array: NDArray[Any] = data.view(_DTYPES[tensor.kind]).reshape(tensor.shape)
        return array


def _zero_name(codes: str) -> str:
    """The tensor of zero points beside one of codes."""
    return f"{codes.removesuffix('.codes')}.zero"


def open_reader(path: Path) -> OnnxReader:
    """Open a finished build for reading.

    Raises:
        ValidationError: a file is missing, damaged or too short.
    """
    return OnnxReader(path)


def _load_model(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if size > _LARGEST_GRAPH:
            raise ValidationError(
                f"{path}: {size:,} bytes, expected a graph whose weights lie in {DATA_FILE}; "
                "another exporter made it, convert the checkpoint to onnx"
            )
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (DecodeError, ValueError) as error:
        raise ValidationError(
            f"{path}: not a readable ONNX model ({error!s:.100}); write or copy the build again"
        ) from error
    named = (*model.graph.initializer, *model.graph.node)
    if not all(isinstance(part.name, str) for part in named):
        raise ValidationError(f"{path}: a name in it is not UTF-8 text; write the build again")
    if not model.graph.initializer:
        raise ValidationError(f"{path}: holds no tensors; write or copy the build again")
    return model


def _map_data(folder: Path) -> NDArray[np.uint8]:
    """The data file, which has to be the folder's own."""
    path = folder / DATA_FILE
    try:
        if path.resolve(strict=True).parent != folder.resolve():
            raise ValidationError(
                f"{path}: a link to a file outside of the build; copy the file into the folder"
            )
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise ValidationError(f"{path}: cannot be read ({error})") from error
    return data


def _schemes_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, set[tuple[int, int]]]:
    """Bits and groups by the tensor of codes that operators read."""
    found: dict[str, set[tuple[int, int]]] = {}
    for node in nodes:
        for index in _QUANTIZED_INPUTS.get(node.op_type, ()):
            facts = {a.name: a.i for a in node.attribute}
            bits = facts.get("expert_weight_bits" if node.op_type == "QMoE" else "bits", 0)
            if index < len(node.input):
                pairs = found.setdefault(node.input[index], set())
                pairs.add((bits, facts.get("block_size", 0)))
    return found
