"""ONNX builds on the asymmetric grid: exact weights, ONNX Runtime's logits, refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lfmq.formats.build import Assets
from lfmq.formats.onnx import container as onnx_format
from lfmq.formats.onnx.tensors import pack_scale, pack_weights, pack_zero, unpack, zero_nbytes
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

# float32 rounding of two runtimes over four layers; measured up to 4e-6 on logits of up to 2.9
EXACT = 2e-5
# ONNX Runtime 1.32 computes 8-bit block QMoE with int8 activations unless told otherwise; measured
# 3.4e-3 on logits of up to 2.7 (tests/formats/test_onnx.py: 1.4e-2 on the symmetric grid)
INT8_ACTIVATIONS = 5e-2
# the switch ONNX Runtime 1.32 reads when a session is made; "fp32" keeps activations as floats
QMOE_GEMM = "ORT_QMOE_CPU_QNBIT_GEMM"
SCHEMES = [Scheme(bits, group, "affine_zero_point") for bits in (4, 8) for group in (32, 64, 128)]
# rows that every group divides, of an odd number of groups too
SIZES: dict[str, Any] = {"intermediate_size": 384, "moe_intermediate_size": 128}
IDS = np.random.default_rng(5).integers(5, 320, (1, 24))

MakePlan = Callable[..., Plan]
Weights = dict[str, NDArray[np.float32]]
Build = Callable[..., tuple[Path, Assets, Weights]]


@pytest.fixture
def asymmetric(random_weight: Callable[[TensorPlan], Weight]) -> Callable[[TensorPlan], Weight]:
    """Random weights, on the asymmetric grid with zero points over its whole range."""

    def make(entry: TensorPlan) -> Weight:
        weight = random_weight(entry)
        scheme = entry.scheme
        if not isinstance(weight, Quantized) or scheme is None or scheme.grid == "symmetric":
            return weight
        rng = np.random.default_rng([len(entry.name), *entry.shape])
        middle, reach = 2 ** (scheme.bits - 1), 2 ** (scheme.bits - 2)
        zero = rng.integers(middle - reach, middle + reach, weight.scale.shape, dtype=np.uint8)
        zero.reshape(-1)[:2] = 0, scheme.highest_code
        return replace(weight, scale=np.abs(weight.scale) * np.float16(0.5), offset=zero)

    return make


@pytest.fixture
def build(
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    asymmetric: Callable[[TensorPlan], Weight],
    tmp_path: Path,
) -> Build:
    def write(name: str = "build", **storages: object) -> tuple[Path, Assets, Weights]:
        assets = replace(tiny_assets, config_json=tiny_assets.config_json | SIZES)
        plan = make_plan(replace(tiny_config, **SIZES), **storages)
        onnx_format.check(plan, assets)
        weights: Weights = {}
        with BuildWriter(tmp_path / name, onnx_format.layout(plan, assets)) as writer:
            for unit in plan.write_groups():
                values = {entry.name: asymmetric(entry) for entry in unit}
                writer.write(values)
                for tensor, w in values.items():
                    weights[tensor] = dequantize(w) if isinstance(w, Quantized) else w
            writer.commit()
        return tmp_path / name, assets, weights

    return write


def logits(path: Path, chunks: list[int]) -> NDArray[np.float32]:
    """ONNX Runtime's over the tokens, states carried from chunk to chunk."""
    session = onnxruntime.InferenceSession(str(path / "model.onnx"))
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    states = {
        i.name: np.zeros([sizes.get(d, d) for d in i.shape], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    names, seen, found = [o.name for o in session.get_outputs()], 0, []
    for ids in np.split(IDS, np.cumsum(chunks)[:-1], axis=1):
        seen += ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **states}
        outputs = dict(zip(names, session.run(names, feed), strict=True))
        for name in states:
            present = name.replace("past_key_values", "present").replace("past_", "present_")
            states[name] = outputs[present]
        found.append(outputs["logits"])
    return np.concatenate(found, axis=1)


def assert_logits(
    build: tuple[Path, Assets, Weights], model: Callable[..., Any], tolerance: float
) -> None:
    path, assets, weights = build
    with torch.no_grad():
        expected = model(assets.config_json, weights.__getitem__)(
            torch.from_numpy(IDS)
        ).logits.numpy()
    assert np.abs(expected).max() > 1
    for chunks in ([24], [7, 2, 14, 1], [1] * 24):
        assert np.abs(logits(path, chunks) - expected).max() <= tolerance


def assert_weights(path: Path, weights: Weights) -> None:
    reader = onnx_format.open_reader(path)
    for name, expected in weights.items():
        np.testing.assert_array_equal(reader.read(name), expected, name)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_exact_and_logits_equal_transformers(
    scheme: Scheme,
    build: Build,
    transformers_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    made = build(experts=scheme, shared=scheme)
    onnx.checker.check_model(made[0] / "model.onnx")
    assert_weights(made[0], made[2])
    assert_logits(made, transformers_model, EXACT)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, EXACT), (8, INT8_ACTIVATIONS)])
def test_experts_without_the_switch(
    bits: int,
    tolerance: float,
    build: Build,
    transformers_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(QMOE_GEMM, raising=False)
    made = build(experts=Scheme(bits, 32, "affine_zero_point"))
    assert_logits(made, transformers_model, tolerance)


def test_grids_of_single_experts(
    build: Build, transformers_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of either grid and of floats in one layer, a QMoE for each."""
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    storages = {1: Scheme(4), 3: Scheme(8, 32, "affine_zero_point"), 4: "float32"}
    overrides = {
        f"model.layers.2.feed_forward.experts.{e}.{w}.weight": storage
        for e, storage in storages.items()
        for w in ("w1", "w2", "w3")
    }
    made = build(experts=Scheme(4, 64, "affine_zero_point"), overrides=overrides)
    assert_weights(made[0], made[2])
    assert_logits(made, transformers_model, EXACT)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_mean_what_the_operators_document(bits: int, build: Build) -> None:
    """The formula of ONNX Runtime's ContribOperators.md, one bit field at a time."""
    path, _, weights = build(shared=Scheme(bits, 128, "affine_zero_point"))
    model = onnx.load(path / "model.onnx")
    raw = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}

    def fields(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        rows = packed.reshape(len(packed), -1).astype(np.int64)
        parts = [(rows >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        return np.stack(parts, axis=-1).reshape(len(packed), -1)

    for name in ("model.layers.0.feed_forward.w2.weight", "model.embed_tokens.weight"):
        codes, scale = fields(raw[f"{name}.codes"]), raw[f"{name}.scale"]
        zero = fields(raw[f"{name}.zero"])[:, : scale.shape[1]]
        values = (codes - np.repeat(zero, 128, axis=1)) * np.repeat(scale, 128, axis=1)
        np.testing.assert_array_equal(values.astype(np.float32), weights[name])
    nodes = {n.name: n for n in model.graph.node}
    assert nodes["/lm_head"].input[3] == "model.embed_tokens.weight.zero"
    assert nodes["/model.embed_tokens"].input[3] == "model.embed_tokens.weight.zero"


def test_golden_bytes_of_zero_points() -> None:
    scheme = Scheme(4, 32, "affine_zero_point")
    zero = np.array([[1, 2, 15], [4, 0, 6]], np.uint8)
    q = Quantized(np.zeros((2, 96), np.uint8), np.ones((2, 3), np.float16), scheme, zero)
    assert pack_zero(q).tobytes().hex() == "210f" + "0406"
    assert pack_zero(q, q).tobytes().hex() == "210f210f" + "04060406"
    eight = Quantized(q.codes, q.scale, Scheme(8, 32, "affine_zero_point"), zero)
    assert pack_zero(eight).tobytes() == zero.tobytes()


@given(bits=st.sampled_from((4, 8)), groups=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_packing_is_lossless(bits: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scheme = Scheme(bits, 32, "affine_zero_point")
    codes = rng.integers(0, 2**bits, (3, 32 * groups), dtype=np.uint8)
    zero = rng.integers(0, 2**bits, (3, groups), dtype=np.uint8)
    q = Quantized(codes, rng.random((3, groups)).astype(np.float16), scheme, zero)
    scale = pack_scale(q).view(np.float32).reshape(3, -1)
    packed = pack_zero(q).reshape(3, -1)
    assert packed.shape[1] == zero_nbytes(groups, bits)
    values = unpack(pack_weights(q).reshape(3, -1), scale, scheme, packed)
    np.testing.assert_array_equal(values, dequantize(q))


def test_the_affine_grid_is_refused(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    plan = make_plan(tiny_config, shared=Scheme(4, 64, "affine_bias"))
    with pytest.raises(
        UnsupportedError, match=r"embed_tokens.*affine_zero_point, .*'affine_bias'$"
    ):
        onnx_format.check(plan, tiny_assets)
