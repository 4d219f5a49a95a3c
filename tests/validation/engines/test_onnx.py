"""ONNX builds of the sample in ONNX Runtime against the same weights in the reference forward.

With int4 all 16,384 (token, layer) pairs of 16 windows of 256 tokens go to the reference's
experts, with a mean KLD of 2e-12 nats. With int8 99.76 % do, 2e-4 nats: ONNX Runtime 1.32 rounds
the activations of 8-bit experts to 8 bits. Where it is told not to, int8 is as exact as int4.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lfmq.formats.onnx.reader import DATA_FILE, MODEL_FILE
from lfmq.validation.engines import onnx as native_onnx
from lfmq.validation.engines.child_process import native_version, run_native

# A group of one expert, of several, and of floats, which another operator takes.
MIXED = """
[[rule]]
bits = 4
[[rule]]
roles = ["experts"]
layers = 3
experts = [0, 3, 4, 9]
float = "float32"
[[rule]]
roles = ["experts"]
layers = [4, 5]
experts = 3
bits = {bits}
group = {group}
"""
RECIPES = {
    "int4": "int4",
    "int8": "int8",
    "int4 of two groups, floats": MIXED.format(bits=4, group=64),
    "int4, int8, floats": MIXED.format(bits=8, group=32),
    "floats": '[[rule]]\nfloat = "float32"',
}
# Smallest share of pairs with the same experts, largest mean KLD in nats and logit difference.
# Sums in another order: measured 2e-5. Means of KL divergences have float32's noise, 1e-8 nats.
EXACT = (1.0, 1e-7, 1e-3)
EIGHT_BITS = (0.99, 2e-3, 3.0)
CUMULATIVE = {"int8": EIGHT_BITS, "int4, int8, floats": EIGHT_BITS}


@pytest.fixture(scope="module")
def ids(sample_ids: Callable[[int, int], NDArray[np.int64]]) -> Any:
    return sample_ids(4, 256)


@pytest.fixture(scope="module")
def int4(convert_sample: Callable[[str, str], Path]) -> Path:
    return convert_sample("int4", "onnx")


@pytest.fixture(scope="module")
def expected_int4(int4: Path, expect: Any, ids: Any) -> Any:
    return expect(int4, "onnx", ids)


@pytest.mark.parametrize("recipe", RECIPES)
def test_routing_and_predictions(
    recipe: str, convert_sample: Callable[[str, str], Path], expect: Any, ids: Any
) -> None:
    expected = expect(convert_sample(RECIPES[recipe], "onnx"), "onnx", ids)
    found = expected.compare(run_native(expected.request, "onnx"))
    exact_set, kld, logit = CUMULATIVE.get(recipe, EXACT)
    assert found.exact_set >= exact_set
    assert found.kld <= kld
    assert found.largest.max() <= logit
    assert expected.compare(run_native(expected.local, "onnx")).exact_set == 1


def test_rounded_activations_are_what_int8_differs_by(
    convert_sample: Callable[[str, str], Path],
    expect: Any,
    ids: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")
    expected = expect(convert_sample("int8", "onnx"), "onnx", ids)
    found = expected.compare(run_native(expected.request, "onnx"))
    assert found.exact_set == 1
    assert found.kld <= EXACT[1]
    assert found.largest.max() <= EXACT[2]


def test_the_build_is_run_as_it_is(int4: Path, expected_int4: Any) -> None:
    request = replace(expected_int4.request, ids=expected_int4.request.ids[:1])
    (run,) = native_onnx.run_windows(request)
    session = onnxruntime.InferenceSession(str(int4 / MODEL_FILE))
    (logits,) = session.run(["logits"], native_onnx._feed(session, request.ids[0]))
    np.testing.assert_array_equal(run.logits, logits[0, request.scored])


def test_given_inputs_are_what_the_router_reads(expected_int4: Any) -> None:
    """Inputs of other tokens give the experts of other tokens."""
    inputs = {k: x[:, ::-1] for k, x in expected_int4.local.router_inputs.items()}
    selected = {k: chosen[:, ::-1] for k, chosen in expected_int4.selected.items()}
    runs = native_onnx.run_windows(replace(expected_int4.local, router_inputs=inputs))
    assert replace(expected_int4, selected=selected).compare(runs).exact_set == 1


def test_the_operators_rule_for_equal_probabilities() -> None:
    """Its output is that of experts chosen beyond doubt, the ones ``_largest`` names."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((50, 32)).astype(np.float32)
    probabilities = rng.integers(0, 3, (50, 8)).astype(np.float32)
    sure = np.zeros_like(probabilities)
    np.put_along_axis(sure, native_onnx._largest(probabilities, 3), 1, axis=1)
    session = onnxruntime.InferenceSession(one_qmoe(rng).SerializeToString())
    feed = {"tokens": tokens, "weights": rng.random((50, 8), np.float32)}
    found, expected = (
        session.run(None, feed | {"probabilities": p})[0] for p in (probabilities, sure)
    )
    np.testing.assert_array_equal(found, expected)


def one_qmoe(rng: np.random.Generator) -> onnx.ModelProto:
    """A model of one operator: 8 experts, 3 chosen, hidden size 32."""
    codes, scales = ["wide", "narrow"], ["wide_scale", "narrow_scale"]
    shapes = [(8, 64, 16), (8, 32, 16)]
    tensors = [
        onnx.numpy_helper.from_array(rng.integers(0, 256, s, np.uint8), n)
        for n, s in zip(codes, shapes, strict=True)
    ] + [
        onnx.numpy_helper.from_array(rng.random((*s[:2], 1), np.float32), n)
        for n, s in zip(scales, shapes, strict=True)
    ]
    inputs = ["tokens", "probabilities", codes[0], scales[0], "", codes[1], scales[1]]
    node = helper.make_node(
        "QMoE", [*inputs, *[""] * 7, "weights"], ["y"], domain="com.microsoft",
        k=3, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        expert_weight_bits=4, block_size=32, normalize_routing_weights=0,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
        for n in ("tokens", "probabilities", "weights", "y")
    ]
    graph = helper.make_graph([node], "one", values[:3], values[3:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_version() -> None:
    assert native_version("onnx") == "onnxruntime 1.32.0"


# ---- planted faults


def change_nodes(folder: Path, change: Callable[[onnx.NodeProto], None]) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    for node in model.graph.node:
        change(node)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def softmax_router(folder: Path) -> None:
    def change(node: onnx.NodeProto) -> None:
        if node.name.endswith("/router/sigmoid"):
            node.op_type = "Softmax"

    change_nodes(folder, change)


def biased_weights(folder: Path) -> None:
    """The right experts, mixed with the scores they were chosen by."""

    def change(node: onnx.NodeProto) -> None:
        if node.name.endswith("/router/picked"):
            node.input[0] = node.input[0].replace("sigmoid", "scores")

    change_nodes(folder, change)


def experts_of_another_order(folder: Path) -> None:
    """Neighbours of layer 3 change places; the router does not know."""
    change_stacks(folder, "model.layers.3.", ("gate_up", "down"), (8, 2))


def rows_in_two_halves(folder: Path) -> None:
    """All rows of w1, then all of w3."""
    change_stacks(folder, "", ("gate_up",), (16, 256, 2))


def change_stacks(
    folder: Path, prefix: str, parts: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    """Codes and scales of experts as [..., a, b, bytes]: turn b round, or a and b."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    content: NDArray[np.uint8] = np.memmap(folder / DATA_FILE, np.uint8, "r+")
    changed = 0
    for tensor in graph.initializer:
        if ".experts." in tensor.name and tensor.name.startswith(prefix):
            if tensor.name.split(".")[-2] not in parts:
                continue
            place = {e.key: int(e.value) for e in tensor.external_data if e.key != "location"}
            stack = content[place["offset"] :][: place["length"]]
            rows = stack.reshape(*shape, -1)
            turned = rows[:, ::-1] if len(shape) == 2 else rows.swapaxes(1, 2)
            stack[:] = turned.reshape(-1).copy()
            changed += 1
    assert changed


# What each does to local routing (at most), the experts chosen (at most) and the mean KLD (at
# least); 1, 1 and less than 1e-7 without it. Measured 0.48, 0.46, 0.045; 1, 0.956, 0.013; 1,
# 0.871, 0.091; 1, 0.715, 0.57.
@pytest.mark.parametrize(
    ("plant", "local", "cumulative", "kld"),
    [
        (softmax_router, 0.6, 0.6, 0.01),
        (biased_weights, 1, 0.98, 1e-3),
        (experts_of_another_order, 1, 0.92, 0.03),
        (rows_in_two_halves, 1, 0.8, 0.2),
    ],
)
def test_a_planted_fault_shows(
    plant: Callable[[Path], None],
    local: float,
    cumulative: float,
    kld: float,
    int4: Path,
    expected_int4: Any,
    tmp_path: Path,
) -> None:
    faulty = tmp_path / "faulty"
    shutil.copytree(int4, faulty)
    plant(faulty)
    given = expected_int4.compare(run_native(replace(expected_int4.local, path=faulty), "onnx"))
    found = expected_int4.compare(run_native(replace(expected_int4.request, path=faulty), "onnx"))
    assert given.exact_set <= local
    assert found.exact_set <= cumulative
    assert found.kld >= kld
