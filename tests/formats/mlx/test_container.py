"""MLX builds read by mlx itself, by the safetensors library, by our reader, and run by mlx-lm."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lfmq.formats.build import Assets
from lfmq.formats.mlx import container as mlx
from lfmq.formats.mlx.names import module_path
from lfmq.formats.plan import (
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
mlx_utils = pytest.importorskip("mlx_lm.utils")
RandomWeight = Callable[[TensorPlan], Weight]
MakePlan = Callable[..., Plan]

# mlx-lm computes in the dtype of the file's scales: activations are float16 (11 bits) through
# four layers; random routers sit near ties, so a flip may move a logit by a few tenths.
FLOAT16_LOGITS = 0.1
# The same module cast to float32 leaves the order of sums and mlx's fast exp and rsqrt.
# Measured 8e-6 on logits of size 3.
FLOAT32_LOGITS = 1e-4


def write(path: Path, plan: Plan, assets: Assets, weight: RandomWeight, **options: int) -> Path:
    mlx.check(plan, assets)
    with BuildWriter(path, mlx.sharded_layout(plan, assets, **options)) as writer:
        for unit in plan.write_groups():
            writer.write({e.name: weight(e) for e in unit})
        writer.commit()
    return path


def floats(weight: Weight) -> Any:
    return dequantize(weight) if isinstance(weight, Quantized) else weight


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> Path:
    return write(tmp_path / "a-mlx", make_plan(tiny_config), tiny_assets, random_weight)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_dequantizes_exactly(
    bits: int,
    group: int,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    # rows that every group divides
    wide: dict[str, Any] = {"moe_intermediate_size": 128, "intermediate_size": 256}
    config = replace(tiny_config, **wide)
    tiny_assets = replace(tiny_assets, config_json=tiny_assets.config_json | wide)
    plan = make_plan(config, experts=Scheme(bits, group), shared=Scheme(bits, group))
    path = write(tmp_path / "a-mlx", plan, tiny_assets, random_weight)
    tensors = mx.load(str(path / "model.safetensors"))
    reader = mlx.open_reader(path)
    assert reader.config == config
    for entry in plan.entries:
        expected = floats(random_weight(entry))
        np.testing.assert_array_equal(reader.read(entry.name), expected, err_msg=entry.name)
        if entry.scheme is None:
            continue
        module, expert = module_path(entry.name, "lfm2_moe")
        parts = (tensors[f"{module}.{p}"] for p in ("weight", "scales", "biases"))
        code, scale, bias = (p if expert is None else p[expert] for p in parts)
        scale, bias = scale.astype(mx.float32), bias.astype(mx.float32)
        theirs = mx.dequantize(code, scale, bias, group_size=group, bits=bits)
        np.testing.assert_array_equal(np.array(theirs), expected, err_msg=entry.name)
    model, _ = mlx_utils.load_model(path)
    assert model.model.embed_tokens.group_size == group


def test_the_config_names_each_module(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    name = "model.layers.0.conv.in_proj.weight"
    plan = make_plan(tiny_config, overrides={name: Scheme(4, 128)})
    path = write(tmp_path / "a-mlx", plan, tiny_assets, random_weight)
    entry = next(e for e in plan.entries if e.name == name)
    np.testing.assert_array_equal(mlx.open_reader(path).read(name), floats(random_weight(entry)))
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"]["model.layers.0.conv.in_proj"]["group_size"] == 128


def test_the_safetensors_library_reads_names_shapes_and_dtypes(
    build: Path, tiny_config: ModelConfig
) -> None:
    with safe_open(build / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
        found = {
            k: (file.get_slice(k).get_dtype(), file.get_slice(k).get_shape())
            for k in file.offset_keys()
        }
    prefix = "model.layers.2."
    assert found[prefix + "feed_forward.switch_mlp.gate_proj.weight"] == ("U32", [6, 64, 16])
    assert found[prefix + "feed_forward.switch_mlp.down_proj.scales"] == ("F16", [6, 128, 2])
    assert found[prefix + "feed_forward.gate.weight"] == ("F32", [6, 128])
    assert found[prefix + "feed_forward.expert_bias"] == ("F32", [6])
    assert found[prefix + "conv.conv.weight"] == ("F16", [128, 3, 1])
    assert found["model.layers.0.feed_forward.up_proj.weight"] == ("U32", [192, 32])
    assert found["model.embedding_norm.weight"] == ("F16", [128])
    assert not any("lm_head" in name for name in found)
    index = json.loads((build / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)


WEIGHT = TensorPlan("model.some.weight", (1, 32), Role.ATTENTION, 0, None, Scheme(4))
NORM = TensorPlan("model.some_norm.weight", (2,), Role.NORM, 0, None, "float32")


def test_golden_bytes_of_a_row() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    q = Quantized(codes, np.array([[0.5]], np.float16), Scheme(4))
    assert mlx._pack_codes(WEIGHT, q).tobytes().hex() == "1032547698badcfe" * 2
    assert mlx._pack_scales(WEIGHT, q).tobytes().hex() == "0038"  # 0.5
    assert mlx._pack_biases(WEIGHT, q).tobytes().hex() == "00c4"  # -4
    q = Quantized(np.arange(32, dtype=np.uint8)[None], q.scale, Scheme(8))
    assert mlx._pack_codes(WEIGHT, q).tobytes() == bytes(range(32))
    assert mlx._pack_biases(WEIGHT, q).tobytes().hex() == "00d4"  # -64


@given(scale=st.floats(-511.75, 511.75, width=16), bits=st.sampled_from((4, 8)))
def test_biases_are_exact(scale: float, bits: int) -> None:
    q = Quantized(np.zeros((1, 32), np.uint8), np.array([[scale]], np.float16), Scheme(bits))
    bias = mlx._pack_biases(WEIGHT, q).view(np.float16)
    assert float(bias[0]) == -(2 ** (bits - 1)) * scale


@pytest.mark.parametrize(("bits", "largest"), [(4, 8188.0), (8, 511.75)])
def test_a_scale_whose_bias_overflows_is_refused(bits: int, largest: float) -> None:
    scale = np.array([[largest]], np.float16)
    q = Quantized(np.zeros((1, 32), np.uint8), scale, Scheme(bits))
    assert mlx._pack_biases(WEIGHT, q).view(np.float16)[0] == np.finfo(np.float16).min
    q = Quantized(q.codes, np.nextafter(scale, np.float16(np.inf)), Scheme(bits))
    with pytest.raises(UnsupportedError, match=r"model\.some\.weight: a scale .* too large"):
        mlx._pack_biases(WEIGHT, q)


def test_a_norm_beyond_float16_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.some_norm\.weight: holds 70000"):
        mlx._pack_float(NORM, np.array([1, -70000], np.float32))


def expected_logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_mlx_lm_computes_what_transformers_does(
    build: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    transformers_model: Callable[..., Any],
) -> None:
    model, _ = mlx_utils.load_model(build)
    ids = np.random.default_rng(2).integers(0, tiny_config.vocab_size, (1, 24))
    expected = expected_logits(
        transformers_model(tiny_assets.config_json, mlx.open_reader(build).read), ids
    )
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.abs(logits - expected).max() < FLOAT16_LOGITS
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(ids)))
    assert np.abs(logits - expected).max() < FLOAT32_LOGITS
    cache = model.make_cache()
    steps = [np.array(model(mx.array(ids[:, i : i + 1]), cache=cache)) for i in range(24)]
    assert np.abs(np.concatenate(steps, 1) - expected).max() < FLOAT32_LOGITS


def test_mlx_lm_loads_and_generates(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    """Tokenizer included; greedy tokens are those that a full pass prefers, in float32."""
    vocabulary: dict[str, Any] = {"vocab_size": 8192}
    assets = replace(tiny_assets, config_json=tiny_assets.config_json | vocabulary)
    plan = make_plan(replace(tiny_config, **vocabulary))
    model, tokenizer = mlx_lm.load(str(write(tmp_path / "a-mlx", plan, assets, random_weight)))
    model.set_dtype(mx.float32)
    chat = [{"role": "user", "content": "What is 17 + 14?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    found = [t.token for t in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=8)]
    logits = np.array(model(mx.array([[*prompt, *found]]))[0])
    assert len(found) == 8
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found


def test_keys_that_mlx_lm_reads_first_agree(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    config = {k: v for k, v in tiny_assets.config_json.items() if k != "rope_parameters"}
    config |= {
        "rope_scaling": {"rope_type": "default", "rope_theta": 5e6},
        "full_attn_idxs": [0],
        "model_file": "other.py",
        "quantization": {"bits": 4, "group_size": 64},
    }
    plan = make_plan(tiny_config, experts="float16", shared="float16")
    assets = replace(tiny_assets, config_json=config)
    path = write(tmp_path / "a-mlx", plan, assets, random_weight)
    model, config = mlx_utils.load_model(path)
    assert model.args.rope_theta == tiny_config.rope_theta
    assert model.args.full_attn_idxs == [1, 3]
    assert not {"quantization", "quantization_config", "model_file"} & set(config)
    reader = mlx.open_reader(path)
    assert reader.config == tiny_config
    for entry in plan.entries:
        np.testing.assert_allclose(
            reader.read(entry.name), floats(random_weight(entry)), rtol=0, atol=2**-25
        )


@pytest.mark.parametrize(
    "change",
    [{"norm_topk_prob": False}, {"routed_scaling_factor": 2.5}, {"use_expert_bias": False}],
    ids=str,
)
def test_router_settings_hold(
    change: dict[str, Any],
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
    transformers_model: Callable[..., Any],
) -> None:
    assets = replace(tiny_assets, config_json=tiny_assets.config_json | change)
    plan = make_plan(replace(tiny_config, **change))
    path = write(tmp_path / "a-mlx", plan, assets, random_weight)
    model, _ = mlx_utils.load_model(path)
    model.set_dtype(mx.float32)
    ids = np.random.default_rng(2).integers(0, tiny_config.vocab_size, (1, 24))
    expected = expected_logits(
        transformers_model(assets.config_json, mlx.open_reader(path).read), ids
    )
    assert np.abs(np.array(model(mx.array(ids))) - expected).max() < FLOAT32_LOGITS


def test_mixed_widths_and_floats_load(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    overrides: dict[str, Any] = {
        f"model.layers.3.feed_forward.experts.{e}.w2.weight": Scheme(8, 64) for e in range(6)
    }
    overrides["model.layers.1.self_attn.q_proj.weight"] = "bfloat16"
    plan = make_plan(tiny_config, overrides=overrides)
    path = write(tmp_path / "a-mlx", plan, tiny_assets, random_weight)
    model, config = mlx_utils.load_model(path)
    assert config["quantization"]["model.layers.1.self_attn.q_proj"] is False
    down = model.layers[3].feed_forward.switch_mlp.down_proj
    assert (down.bits, down.group_size) == (8, 64)
    reader = mlx.open_reader(path)
    for entry in plan.entries:
        np.testing.assert_array_equal(reader.read(entry.name), floats(random_weight(entry)))


def test_shards_hold_the_same_model(
    build: Path,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    plan = make_plan(tiny_config)
    split = write(tmp_path / "b-mlx", plan, tiny_assets, random_weight, shard_nbytes=50_000)
    files = sorted(p.name for p in split.glob("model*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    weight_map = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    whole, parts = mlx.open_reader(build), mlx.open_reader(split)
    for entry in plan.entries:
        np.testing.assert_array_equal(parts.read(entry.name), whole.read(entry.name))
    for file in files:
        with safe_open(split / file, "np") as shard:
            assert all(weight_map[key] == file for key in shard.offset_keys())
    ids = mx.array([[1, 5, 9, 200]])
    one, many = (mlx_utils.load_model(p)[0](ids) for p in (build, split))
    assert mx.array_equal(one, many)


def test_the_same_plan_gives_the_same_bytes(
    build: Path,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    again = write(tmp_path / "b-mlx", make_plan(tiny_config), tiny_assets, random_weight)
    names = sorted(p.name for p in build.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert all((build / n).read_bytes() == (again / n).read_bytes() for n in names)
    assert {"README.md", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        *names
    }


def test_widths_of_single_experts_are_refused(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    name = "model.layers.2.feed_forward.experts.4.w1.weight"
    plan = make_plan(tiny_config, overrides={name: Scheme(8)})
    with pytest.raises(UnsupportedError, match=r"experts\.4.*in one width$"):
        mlx.check(plan, tiny_assets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "which mlx-lm derives it from"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1"),
        ({"layer_types": ("conv",) * 4}, "only one kind"),
        ({"layer_types": ("full_attention",) * 4}, "only one kind"),
    ],
)
def test_geometries_mlx_lm_miscomputes_are_refused(
    change: dict[str, Any],
    message: str,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        mlx.check(make_plan(replace(tiny_config, **change)), tiny_assets)
