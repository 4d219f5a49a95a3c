"""An ONNX graph held against the one that the writer makes of the same config and storages.

A graph is a program: an operator, an attribute or a wire that is not the writer's computes
something else. So the graph is built again and every node, input, output and initializer compared;
a graph of another exporter cannot be checked and is refused.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lfmq.formats.onnx.graph import GraphBuilder
from lfmq.formats.onnx.placement import external, place_tensors
from lfmq.formats.onnx.tensors import DataTensor
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.errors import ValidationError

# Parts of a model that the writer leaves empty and a runtime would compute with.
_EMPTY = ("functions", "training_info", "configuration")
_EMPTY_OF_GRAPH = ("sparse_initializer", "quantization_annotation", "value_info")
_REMEDY = "only graphs that lfmq writes can be checked; write the build again"


def check_graph(path: Path, model: onnx.ModelProto, data: NDArray[np.uint8], plan: Plan) -> None:
    """Compare a model with the writer's.

    Args:
        path: of the graph, for messages.
        model: as read, without the data file.
        data: the data file.
        plan: the config that the build states, and the storages that its tensors have.

    Raises:
        ValidationError: the first part that differs.
    """
    _check_tables(path, model, plan.config)
    builder = GraphBuilder(plan)
    builder.build()
    offsets = place_tensors(builder.tensors)
    made = builder.model(lambda t: external(t, offsets[t.alias or t.name]))
    _check_model(path, model, made)
    _check_initializers(path, model.graph.initializer, made.graph.initializer)
    for index, (found, wanted) in enumerate(zip(model.graph.node, made.graph.node, strict=False)):
        _check_node(path, index, found, wanted)
    counts = len(model.graph.node), len(made.graph.node)
    if counts[0] != counts[1]:
        raise _wrong(path, f"has {counts[0]} nodes, expected {counts[1]}")
    for kind in ("input", "output"):
        _check_values(path, kind, getattr(model.graph, kind), getattr(made.graph, kind))
    for tensor in builder.tensors:
        _check_constant(path, tensor, offsets, data)


def _check_tables(path: Path, model: onnx.ModelProto, g: ModelConfig) -> None:
    """The rotary tables have the config's size, which is then what memory is taken for."""
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    wanted = (g.max_position_embeddings, g.head_dim // 2)
    for name in ("cos_cache", "sin_cache") if g.attention_layers else ():
        if sizes.get(name) != wanted:
            raise _wrong(path, f"{name} has shape {_short(sizes.get(name))}, expected {wanted}")


def _check_model(path: Path, model: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """What stands around the graph."""
    for key in _EMPTY:
        if len(getattr(model, key, ())):
            raise _wrong(path, f"has {key}, expected none")
    for key in _EMPTY_OF_GRAPH:
        if len(getattr(model.graph, key)):
            raise _wrong(path, f"its graph has {key}, expected none")
    found, wanted = (
        (m.ir_version, sorted((o.domain, o.version) for o in m.opset_import))
        for m in (model, made)
    )
    if found != wanted:
        raise _wrong(path, f"IR version and operator sets are {_short(found)}, expected {wanted}")


def _check_initializers(
    path: Path, found: Iterable[TensorProto], wanted: Iterable[TensorProto]
) -> None:
    there: dict[str, TensorProto] = {}
    for tensor in found:
        if tensor.name in there:
            raise _wrong(path, f"has the tensor {_short(tensor.name)} twice")
        there[tensor.name] = tensor
    expected = {tensor.name: tensor for tensor in wanted}
    for name in expected:
        if name not in there:
            raise _wrong(path, f"tensor {_short(name)} is missing")
    for name, tensor in there.items():
        if name not in expected:
            raise _wrong(path, f"has a tensor {_short(name)} that the model does not have")
        if _words(tensor) != _words(expected[name]):
            raise _wrong(
                path,
                f"tensor {_short(name)} is {_about(tensor)}, expected {_about(expected[name])}",
            )


def _words(tensor: TensorProto) -> bytes:
    """What an initializer says, entries of its place in order."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("doc_string")
    entries = sorted(copy.external_data, key=lambda e: e.key)
    del copy.external_data[:]
    copy.external_data.extend(entries)
    return bytes(copy.SerializeToString(deterministic=True))


def _about(tensor: TensorProto) -> str:
    place = {e.key: e.value for e in tensor.external_data}
    where = f" at {_short(place)}" if place else ""
    return f"type {tensor.data_type} {_short(list(tensor.dims))}{where}"


def _check_node(path: Path, index: int, found: onnx.NodeProto, wanted: onnx.NodeProto) -> None:
    if _said(found) == _said(wanted):
        return
    where = f"node {index} ({_short(found.name)})"
    for part in ("op_type", "domain", "input", "output", "overload"):
        a, b = (_plain(getattr(node, part, "")) for node in (found, wanted))
        if a != b:
            raise _wrong(path, f"{where} has {part} {_short(a)}, expected {_short(b)}")
    attributes = [
        {a.name: _short(str(a).replace('name: "', "").replace('"', "")) for a in node.attribute}
        for node in (found, wanted)
    ]
    for name in {**attributes[1], **attributes[0]}:
        a, b = (facts.get(name) for facts in attributes)
        if a != b:
            raise _wrong(
                path, f"{where} has attribute {a or f'no {name}'}, expected {b or 'none'}"
            )
    raise _wrong(path, f"{where} is not the writer's {_short(wanted.name)}")


def _plain(value: object) -> object:
    return value if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def _said(node: onnx.NodeProto) -> bytes:
    """What a node says, attributes in order."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("doc_string")
    copy.ClearField("metadata_props")
    attributes = sorted(copy.attribute, key=lambda a: a.name)
    for attribute in attributes:
        attribute.ClearField("doc_string")
    del copy.attribute[:]
    copy.attribute.extend(attributes)
    return bytes(copy.SerializeToString(deterministic=True))


def _check_values(
    path: Path,
    kind: str,
    found: Iterable[onnx.ValueInfoProto],
    wanted: Iterable[onnx.ValueInfoProto],
) -> None:
    """Inputs or outputs: names, types and shapes in order."""
    lists = [[(v.name, v.type.SerializeToString(deterministic=True)) for v in values]
             for values in (found, wanted)]  # fmt: skip
    if lists[0] == lists[1]:
        return
    names = [[name for name, _ in values] for values in lists]
    if names[0] != names[1]:
        raise _wrong(path, f"has the {kind}s {_short(names[0])}, expected {_short(names[1])}")
    name = next(a[0] for a, b in zip(*lists, strict=True) if a != b)
    raise _wrong(path, f"{kind} {_short(name)} has another type or shape")


def _check_constant(
    path: Path, tensor: DataTensor, offsets: dict[str, int], data: NDArray[np.uint8]
) -> None:
    """A tensor of the data file that no weight goes into, the rotary tables, byte for byte."""
    if tensor.constant is None:
        return
    offset = offsets[tensor.name]
    if data[offset : offset + tensor.nbytes].tobytes() != tensor.constant:
        raise _wrong(path, f"the values of {tensor.name} are not those of the config's rope_theta")


def _wrong(path: Path, what: str) -> ValidationError:
    return ValidationError(f"{path}: {what}; {_REMEDY}")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}..."
