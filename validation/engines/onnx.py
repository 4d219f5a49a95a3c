"""ONNX builds in ONNX Runtime, on the CPU, in float32, with the session's default settings.

The graph that runs is the build's own with more outputs: what each MoE operator (``QMoE``; ``MoE``
where experts are floats) reads to choose its experts. The weights stay where they are, the session
is told the folder. The experts follow from the operator's rule, ONNX Runtime 1.32,
``contrib_ops/cpu/moe/moe_quantization_cpu.cc``: the k columns with the largest router_probs (input
1), of equal ones the last; they are mixed with router_weights (input 14). A layer of several
widths has an operator a width, each with some experts' columns of weights that the graph made: the
layer's experts are then those with the largest weights among the operators' choices.

When the routers' inputs are given, what lies before them is cut off, and what lies behind is too.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lfmq.formats.onnx.reader import MODEL_FILE, open_reader
from lfmq.validation.engines.protocol import EngineRequest, WindowRun

NAME = "onnxruntime"
EXTRA = ""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class _Experts:
    """What one MoE operator of the graph reads.

    Attributes:
        layer: of the model.
        k: experts it chooses for a token.
        tokens: hidden states [T, H], read by the router as well.
        probabilities: [T, C], the largest are chosen.
        weights: [T, C], of the mixture of the chosen; ``MoE`` gets their logarithms.
        columns: int64 [C], the experts of the columns.
    """

    layer: int
    k: int
    tokens: str
    probabilities: str
    weights: str
    columns: NDArray[np.int64]


def version() -> str:
    """The installed runtime's name and version; ImportError without it."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def run_windows(request: EngineRequest) -> Iterator[WindowRun]:
    """Every window of the request, in order."""
    config = open_reader(request.path).config
    model = onnx.load(request.path / MODEL_FILE, load_external_data=False)
    experts = _find_experts(model.graph, config.num_experts)
    names = [*dict.fromkeys(n for e in experts for n in (e.probabilities, e.weights))]
    if request.router_inputs is not None:
        _cut_out_routers(model.graph, {e.tokens for e in experts}, set(names))
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    session = _open_session(model, request)
    for window, ids in enumerate(request.ids):
        logits = None
        if request.router_inputs is None:
            logits, *found = session.run(["logits", *names], _feed(session, ids))
            logits = np.array(logits[0, request.scored])
        else:
            feed = {e.tokens: request.router_inputs[e.layer][window] for e in experts}
            found = session.run(names, feed)
        read = dict(zip(names, found, strict=True))
        k, num_experts = config.num_experts_per_tok, config.num_experts
        yield WindowRun(logits, _selected(experts, read, k, num_experts))


def _open_session(model: onnx.ModelProto, request: EngineRequest) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.threads
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(request.path))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _feed(session: Any, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """One window and an empty past: no keys and values, zeros as convolution states."""
    feed: dict[str, NDArray[Any]] = {}
    for i in session.get_inputs():
        shape = [d if isinstance(d, int) else int(axis == 0) for axis, d in enumerate(i.shape)]
        if i.name.startswith("past"):
            feed[i.name] = np.zeros(shape, np.float32)
    return feed | {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}


def _find_experts(graph: onnx.GraphProto, num_experts: int) -> list[_Experts]:
    """The graph's MoE operators."""
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {t.name: t for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type not in ("QMoE", "MoE"):
            continue
        probabilities = node.input[1]
        weights = node.input[14] if node.op_type == "QMoE" else probabilities
        while made_by[weights].op_type in ("Log", "Max"):
            weights = made_by[weights].input[0]
        columns = np.arange(num_experts)
        if made_by[weights].op_type == "Gather":
            columns = numpy_helper.to_array(constants[made_by[weights].input[1]])
        layer = re.search(r"layers\.(\d+)\.", node.input[2])
        assert layer is not None
        k = next(a.i for a in node.attribute if a.name == "k")
        found.append(_Experts(int(layer[1]), k, node.input[0], probabilities, weights, columns))
    return found


def _cut_out_routers(graph: onnx.GraphProto, given: set[str], wanted: set[str]) -> None:
    """Leave of the graph what leads from ``given``, its new inputs, to ``wanted``."""
    needed, nodes = set(wanted), []
    for node in reversed(graph.node):
        if (needed - given).intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    constants = [t for t in graph.initializer if t.name in needed]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in sorted(given)]
    kept = helper.make_graph(nodes[::-1], graph.name, inputs, [], constants)
    graph.CopyFrom(kept)


def _selected(
    experts: list[_Experts], read: dict[str, NDArray[np.float32]], k: int, num_experts: int
) -> dict[int, NDArray[np.int64]]:
    """The experts [T, k] of each layer, from what its operators read."""
    mixed: dict[int, NDArray[np.float32]] = {}
    for e in experts:
        weights = read[e.weights]
        chosen = _largest(read[e.probabilities], e.k)
        layer = mixed.setdefault(e.layer, np.full((len(weights), num_experts), -np.inf, "f4"))
        values = np.take_along_axis(weights, chosen, axis=1)
        np.put_along_axis(layer, e.columns[chosen], values, axis=1)
    return {layer: _largest(weights, k) for layer, weights in mixed.items()}


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The columns of the k largest values of each row; of equal ones the last."""
    return np.argsort(values, axis=1, kind="stable")[:, -k:]
