"""Reads an ONNX build back under checkpoint names: proto with onnx, data file memory-mapped."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.onnx.tensors import unpack
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError, ValidationError
from lfmq.quant.types import Scheme

MODEL_FILE = "model.onnx"
# transformers.js finds the data file by this name, other runtimes by the graph's own reference
DATA_FILE = "model.onnx_data"
_EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.(\d+)\.(w[123])\.weight")
# where an operator takes quantized weights
_QUANTIZED_INPUTS = {"MatMulNBits": (1,), "GatherBlockQuantized": (0,), "QMoE": (2, 5)}


class OnnxReader:
    """An opened ONNX build; tensors stay on disk until read.

    What the graph itself says (codes' width and group, experts per token, heads, epsilon) is
    taken from the graph, since that is what a runtime computes with.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._graph = _load_graph(path / MODEL_FILE)
        self._tensors = {t.name: t for t in self._graph.initializer}
        self._data = self._map_data()
        self._schemes: dict[str, Scheme] = {}
        self._stacks: dict[str, dict[int, tuple[str, int]]] = {}
        for node in self._graph.node:
            self._note(node)
        self.config = self._graph_facts(_model_config(path))

    def _map_data(self) -> NDArray[np.uint8]:
        """The data file, after checking that every tensor lies inside it."""
        path = self._path / DATA_FILE
        try:
            size = path.stat().st_size
            data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ValidationError(f"{path}: cannot be read ({error})") from error
        for tensor in self._tensors.values():
            if tensor.data_location == TensorProto.EXTERNAL:
                offset, length = _place(tensor)
                if offset + length > size:
                    raise ValidationError(
                        f"{path}: {size:,} bytes, but {tensor.name} ends at "
                        f"{offset + length:,}; the file is truncated, write or copy it again"
                    )
        return data

    def _note(self, node: onnx.NodeProto) -> None:
        """Remember the grid of the node's weights, and which experts its stacks hold."""
        if node.op_type not in (*_QUANTIZED_INPUTS, "MoE"):
            return
        facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for index in _QUANTIZED_INPUTS.get(node.op_type, ()):
            bits = facts["expert_weight_bits" if node.op_type == "QMoE" else "bits"]
            codes = node.input[index]
            grid = "affine_zero_point" if _zero_name(codes) in node.input else "symmetric"
            self._schemes[codes] = Scheme(bits, facts["block_size"], grid)
        if node.op_type in ("QMoE", "MoE"):
            wide, narrow = (2, 5) if node.op_type == "QMoE" else (2, 4)
            self._note_experts(node.input[wide], node.input[narrow])

    def _note_experts(self, wide: str, narrow: str) -> None:
        wide, narrow = (n.removeprefix("/").removesuffix("/cast/output") for n in (wide, narrow))
        experts, _, label = wide.partition(".experts.")
        experts, label = f"{experts}.experts", label.split(".")[0]
        members: list[int] = list(range(self._tensors[wide].dims[0]))
        if (listed := self._tensors.get(f"{experts}.{label}.members")) is not None:
            members = numpy_helper.to_array(listed).tolist()
        for row, expert in enumerate(members):
            self._stacks.setdefault(f"{experts}.gate_up", {})[expert] = (wide, row)
            self._stacks.setdefault(f"{experts}.down", {})[expert] = (narrow, row)

    def _graph_facts(self, config: ModelConfig) -> ModelConfig:
        """The folder's config with what the graph's operators say in its place."""
        for node in self._graph.node:
            facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "TopK":
                k = int(numpy_helper.to_array(self._tensors[node.input[1]])[0])
                config = replace(config, num_experts_per_tok=k)
            elif node.op_type == "GroupQueryAttention":
                heads, kv_heads = facts["num_heads"], facts["kv_num_heads"]
                config = replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)
            elif node.op_type == "RMSNormalization":
                # the attribute is float32: give 1e-5 back as 1e-5
                epsilon = float(str(np.float32(facts["epsilon"])))
                config = replace(config, norm_eps=epsilon)
        return config

    def read(self, name: str) -> NDArray[np.float32]:
        """The dequantized tensor, float32, in the checkpoint's shape."""
        match = _EXPERT.fullmatch(name)
        if match is not None:
            return self._read_expert(match[1], int(match[2]), match[3])
        if f"{name}.codes" in self._tensors:
            return self._dequantize(f"{name}.codes")
        if f"{name}.transposed" in self._tensors:
            return np.ascontiguousarray(self._array(f"{name}.transposed").T, np.float32)
        return self._array(name).astype(np.float32)

    def _read_expert(self, experts: str, expert: int, projection: str) -> NDArray[np.float32]:
        stack = self._stacks.get(f"{experts}.{'down' if projection == 'w2' else 'gate_up'}", {})
        if expert not in stack:
            raise ValidationError(f"{self._path}: {experts}.{expert} is missing")
        name, row = stack[expert]
        if name.endswith(".codes"):
            values = self._dequantize(name, row)
        else:
            values = self._array(name)[row].astype(np.float32)
        if projection == "w2":
            return values
        return values[0 if projection == "w1" else 1 :: 2].copy()

    def _dequantize(self, name: str, row: int | None = None) -> NDArray[np.float32]:
        scheme = self._schemes[name]
        names = [name, f"{name.removesuffix('.codes')}.scale"]
        if scheme.grid == "affine_zero_point":
            names.append(_zero_name(name))
        codes, scale, *zero = (
            self._array(n) if row is None else self._array(n)[row] for n in names
        )
        return unpack(codes, scale, scheme, *zero)

    def _array(self, name: str) -> NDArray[Any]:
        """A tensor of the data file, as a view."""
        if name not in self._tensors:
            raise ValidationError(f"{self._path}: tensor {name!r} is missing")
        tensor = self._tensors[name]
        offset, length = _place(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return self._data[offset : offset + length].view(dtype).reshape(tuple(tensor.dims))


def _zero_name(codes: str) -> str:
    """The tensor of zero points beside one of codes."""
    return f"{codes.removesuffix('.codes')}.zero"


def open_reader(path: Path) -> OnnxReader:
    """Open a finished build for reading.

    Raises:
        ValidationError: a file is missing, damaged or too short.
    """
    return OnnxReader(path)


def _load_graph(path: Path) -> onnx.GraphProto:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ValidationError(f"{path}: not a readable ONNX model ({error})") from error
    if not graph.initializer:
        raise ValidationError(f"{path}: holds no tensors; write or copy the build again")
    return graph


def _place(tensor: TensorProto) -> tuple[int, int]:
    """Offset and length in the data file, bytes."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    return int(place["offset"]), int(place["length"])


def _model_config(path: Path) -> ModelConfig:
    try:
        return parse_config(read_config(path), path / "config.json")
    except CheckpointError as error:
        raise ValidationError(str(error)) from error
