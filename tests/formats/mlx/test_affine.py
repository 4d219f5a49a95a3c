"""MLX builds on the affine grid, as mlx reads them and mlx-lm computes with them; refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors import container as compressed_tensors
from lfmq.formats.gguf import container as gguf
from lfmq.formats.mlx import container as mlx
from lfmq.formats.mlx.names import module_path
from lfmq.formats.onnx import container as onnx
from lfmq.formats.plan import (
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.registry import check_plan
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")
RandomWeight = Callable[[TensorPlan], Weight]
MakePlan = Callable[..., Plan]

# rows that every group divides
SIZES: dict[str, Any] = {"moe_intermediate_size": 128, "intermediate_size": 256}
# The module cast to float32 leaves the order of sums and mlx's fast exp and rsqrt; as in
# tests/formats/test_mlx.py. Measured 5e-6 on logits of up to 2.4.
FLOAT32_LOGITS = 1e-4
# In the file's own float16, activations have 11 bits through four layers and random routers sit
# near ties. Measured 1e-2.
FLOAT16_LOGITS = 0.1
# mlx dequantizes in the dtype of the scales: product and sum are each rounded to float16, whose
# unit is 2^-11, and the product is at most the value and the offset together.
FLOAT16_UNIT = 2**-11


@pytest.fixture
def affine(random_weight: RandomWeight) -> RandomWeight:
    """Random weights, on the affine grid with offsets of many digits."""

    def make(entry: TensorPlan) -> Weight:
        weight = random_weight(entry)
        scheme = entry.scheme
        if not isinstance(weight, Quantized) or scheme is None or scheme.grid == "symmetric":
            return weight
        rng = np.random.default_rng([len(entry.name), *entry.shape])
        scale = np.abs(weight.scale) * np.float16(0.6)
        middle = rng.uniform(0.3, 0.7, scale.shape) * scheme.highest_code
        return replace(weight, scale=scale, offset=(-middle * scale).astype(np.float16))

    return make


def write(path: Path, plan: Plan, assets: Assets, weight: RandomWeight) -> Path:
    mlx.check(plan, assets)
    with BuildWriter(path, mlx.layout(plan, assets)) as writer:
        for unit in plan.write_groups():
            writer.write({e.name: weight(e) for e in unit})
        writer.commit()
    return path


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_mlx_reads_and_computes_the_same_values(
    bits: int,
    group: int,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    affine: RandomWeight,
    transformers_model: Callable[..., Any],
) -> None:
    scheme = Scheme(bits, group, "affine_bias")
    plan = make_plan(replace(tiny_config, **SIZES), experts=scheme, shared=scheme)
    assets = replace(tiny_assets, config_json=tiny_assets.config_json | SIZES)
    path = write(tmp_path / "a-mlx", plan, assets, affine)
    tensors, reader = mx.load(str(path / "model.safetensors")), mlx.open_reader(path)
    for entry in plan.entries:
        weight = affine(entry)
        if not isinstance(weight, Quantized):
            continue
        expected = dequantize(weight)
        np.testing.assert_array_equal(reader.read(entry.name), expected, err_msg=entry.name)
        module, expert = module_path(entry.name, "lfm2_moe")
        parts = [tensors[f"{module}.{p}"] for p in ("weight", "scales", "biases")]
        code, *grid = parts if expert is None else [p[expert] for p in parts]
        exact = mx.dequantize(
            code, *(p.astype(mx.float32) for p in grid), group_size=group, bits=bits
        )
        np.testing.assert_array_equal(np.array(exact), expected, err_msg=entry.name)
        rounded = np.array(mx.dequantize(code, *grid, group_size=group, bits=bits), np.float32)
        bound = np.abs(expected) + np.repeat(np.abs(np.array(grid[1], np.float32)), group, axis=-1)
        assert (np.abs(rounded - expected) <= 2 * FLOAT16_UNIT * bound).all()
    model, config = mlx_utils.load_model(path)
    assert config["quantization"]["bits"] == bits
    ids = np.random.default_rng(1).integers(0, tiny_config.vocab_size, (1, 24))
    with torch.no_grad():
        reference = transformers_model(assets.config_json, reader.read)
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    found = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.median(np.abs(found - expected).max(-1)) < FLOAT16_LOGITS
    model.set_dtype(mx.float32)
    assert np.abs(np.array(model(mx.array(ids))) - expected).max() < FLOAT32_LOGITS


WEIGHT = TensorPlan(
    "model.some.weight", (1, 32), Role.ATTENTION, 0, None, Scheme(4, 32, "affine_bias")
)


def test_golden_bytes_of_a_row() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    half = np.array([[0.5]], np.float16)
    q = Quantized(codes, half, Scheme(4, 32, "affine_bias"), np.array([[-3.25]], np.float16))
    assert mlx._pack_codes(WEIGHT, q).tobytes().hex() == "1032547698badcfe" * 2
    assert mlx._pack_scales(WEIGHT, q).tobytes().hex() == "0038"  # 0.5
    assert mlx._pack_biases(WEIGHT, q).tobytes().hex() == "80c2"  # -3.25


@given(
    bits=st.sampled_from((4, 5, 6, 8)),
    group=st.sampled_from((32, 64, 128)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_mlx_dequantizes_any_finite_grid_exactly(bits: int, group: int, seed: int) -> None:
    """Scales and offsets of every finite float16, subnormals too, in float32 arithmetic."""
    rng = np.random.default_rng(seed)
    scheme = Scheme(bits, group, "affine_bias")
    codes = rng.integers(0, 2**bits, (2, 2 * group), dtype=np.uint8)
    scale, offset = rng.integers(0, 0x7C00, (2, 2, 2), dtype=np.uint16).view(np.float16)
    offset = offset * rng.choice([-1, 1], offset.shape).astype(np.float16)
    q = Quantized(codes, scale, scheme, offset)
    packed = mlx._pack_codes(WEIGHT, q).view(np.uint32).reshape(2, -1)
    grid = (mx.array(scale.astype(np.float32)), mx.array(offset.astype(np.float32)))
    theirs = mx.dequantize(mx.array(packed), *grid, group_size=group, bits=bits)
    np.testing.assert_array_equal(np.array(theirs), dequantize(q))


@pytest.mark.parametrize(
    ("container", "bits", "grid", "message"),
    [
        (
            gguf,
            4,
            "affine_bias",
            r"symmetric, kquant and codebook, .*'affine_bias'; mlx can hold it$",
        ),
        (
            gguf,
            5,
            "affine_bias",
            r"symmetric, kquant and codebook, .*'affine_bias'; mlx can hold it$",
        ),
        (gguf, 4, "affine_zero_point", r"'affine_zero_point'; onnx can hold it$"),
        (
            gguf,
            6,
            "symmetric",
            r"4 or 8 bits on .*symmetric, .* 6; no other format",
        ),
        (onnx, 5, "affine_bias", r"affine_zero_point, .*'affine_bias'; mlx can hold it$"),
        (onnx, 5, "affine_zero_point", r"4 or 8 bits.* asks for 5; no other format can"),
        (
            compressed_tensors,
            4,
            "affine_bias",
            r"symmetric, .*'affine_bias'; mlx can hold it$",
        ),
        (
            compressed_tensors,
            6,
            "affine_bias",
            r"symmetric, .*'affine_bias'; mlx can hold it$",
        ),
        (
            compressed_tensors,
            4,
            "affine_zero_point",
            r"symmetric, .*; onnx can hold it$",
        ),
        (mlx, 4, "affine_zero_point", r"affine_bias, .*'affine_zero_point'; onnx can hold it$"),
        (mlx, 5, "symmetric", "4 or 8 bits on the grid symmetric.* asks for 5"),
        (mlx, 3, "affine_bias", "4, 5, 6 or 8 bits on the grid affine_bias.* asks for 3"),
    ],
)
def test_other_containers_refuse_the_grid(
    container: Any,
    bits: int,
    grid: str,
    message: str,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    vocabulary: dict[str, Any] = {"vocab_size": 8192}
    assets = replace(tiny_assets, config_json=tiny_assets.config_json | vocabulary)
    name = "model.layers.0.conv.in_proj.weight"
    config = replace(tiny_config, **vocabulary)
    plan = make_plan(config, overrides={name: Scheme(bits, 32, grid)})
    with pytest.raises(UnsupportedError, match=f"{name}: .*{message}") as caught:
        check_plan(container, plan, assets)
    assert "\n" not in str(caught.value)
