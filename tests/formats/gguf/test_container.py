"""GGUF builds read by gguf-py, by our reader and by llama.cpp itself."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize

from lfmq.formats.build import Assets
from lfmq.formats.gguf import container as gguf
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.formats.registry import FORMATS, check_plan
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError, ValidationError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Storage,
    Weight,
    dequantize,
)
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest

RandomWeight = Callable[[TensorPlan], Weight]


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """the tiny config with a vocabulary that holds the sample's tokenizer, and unused ids."""
    return replace(tiny_config, vocab_size=8200)


@pytest.fixture
def assets(tiny_assets: Assets, config: ModelConfig) -> Assets:
    return replace(
        tiny_assets, config_json={**tiny_assets.config_json, "vocab_size": config.vocab_size}
    )


def write(path: Path, plan: Plan, assets: Assets, random_weight: RandomWeight) -> Path:
    gguf.check(plan, assets)
    with BuildWriter(path, gguf.layout(plan, assets)) as writer:
        for unit in plan.write_groups():
            writer.write({e.name: random_weight(e) for e in unit})
        writer.commit()
    return path


def floats(weight: Weight) -> Any:
    return dequantize(weight) if isinstance(weight, Quantized) else weight


@pytest.mark.parametrize("bits", [4, 8])
def test_reads_back_exactly(
    bits: int,
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    plan = make_plan(config, experts=Scheme(bits), shared=Scheme(bits))
    path = write(tmp_path / "a.gguf", plan, assets, random_weight)
    reader = gguf.open_reader(path)
    for entry in plan.entries:
        np.testing.assert_array_equal(reader.read(entry.name), floats(random_weight(entry)))
    assert path.stat().st_size == gguf.layout(plan, assets).nbytes
    expected = replace(config, norm_eps=float(np.float32(config.norm_eps)), pad_token_id=None)
    assert reader.config == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_py_dequantizes_the_same(
    bits: int,
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    plan = make_plan(config, experts=Scheme(bits), shared=Scheme(bits))
    path = write(tmp_path / "a.gguf", plan, assets, random_weight)
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    entries = {e.name: e for e in plan.entries}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.shortconv.in_proj.weight", "model.layers.0.conv.in_proj.weight"),
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.out_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.feed_forward.w2.weight"),
    ):
        values = gguf_dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        np.testing.assert_array_equal(values, floats(random_weight(entries[ours])))
    for theirs, part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        tensor = tensors[f"blk.3.ffn_{theirs}_exps.weight"]
        values = gguf_dequantize(tensor.data, tensor.tensor_type)
        for expert in range(config.num_experts):
            entry = entries[f"model.layers.3.feed_forward.experts.{expert}.{part}.weight"]
            np.testing.assert_array_equal(values[expert], floats(random_weight(entry)))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_float_weights(
    storage: Storage,
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    plan = make_plan(config, experts=storage, shared=storage)
    reader = gguf.open_reader(write(tmp_path / "a.gguf", plan, assets, random_weight))
    for entry in plan.entries:  # the fixture's values are exact in all three types
        weight = random_weight(entry)
        assert isinstance(weight, np.ndarray)
        np.testing.assert_allclose(reader.read(entry.name), weight, rtol=0, atol=2**-25)


def run_llama_cpp(path: Path, tokens: list[int]) -> Any:
    """Logits of every position [T, V] from llama.cpp, in a process of its own."""
    pytest.importorskip("xllamacpp")
    request = EngineRequest(path, np.array([tokens]), slice(0, len(tokens)))
    (run,) = run_native(request, "gguf")
    return run.logits


@pytest.mark.parametrize("use_expert_bias", [True, False])
def test_llama_cpp_float32_logits_equal_transformers(
    use_expert_bias: bool,
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
    transformers_model: Callable[..., Any],
) -> None:
    """Float weights leave llama.cpp no rounding of activations, so layout errors show.

    3e-2 on logits of size 5: its float32 kernels take exp and sums of half precision tables.
    """
    import torch

    config = replace(config, use_expert_bias=use_expert_bias)
    raw = {**assets.config_json, "use_expert_bias": use_expert_bias}
    plan = make_plan(config, experts="float32", shared="float32")
    path = write(tmp_path / "a.gguf", plan, assets, random_weight)
    tokens = [1, *np.random.default_rng(0).integers(13, 8192, 40).tolist()]
    logits = run_llama_cpp(path, tokens)
    model = transformers_model(raw, gguf.open_reader(path).read)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-2)


def test_metadata(
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    path = write(tmp_path / "a.gguf", make_plan(config), assets, random_weight)
    reader = GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None
        return field.contents()

    assert value("general.architecture") == "lfm2moe"
    assert value("lfm2moe.attention.head_count_kv") == [0, 2, 0, 2]
    assert value("lfm2moe.rope.freq_base") == 5e6
    assert value("lfm2moe.expert_gating_func") == 2
    assert value("tokenizer.ggml.pre") == "lfm2"
    assert value("tokenizer.ggml.bos_token_id") == 1
    assert value("tokenizer.ggml.eos_token_id") == 4
    assert value("tokenizer.ggml.add_bos_token") is False
    assert value("tokenizer.chat_template") == assets.files["chat_template.jinja"].decode()
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == config.vocab_size
    assert tokens[-1] == "[PAD8199]"
    types = value("tokenizer.ggml.token_type")
    assert (types[3], types[100], types[-1]) == (3, 1, 5)
    merges = json.loads(assets.files["tokenizer.json"])["model"]["merges"]
    assert len(value("tokenizer.ggml.merges")) == len(merges)


def test_same_plan_same_bytes(
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    plan = make_plan(config)
    first = write(tmp_path / "a.gguf", plan, assets, random_weight)
    second = write(tmp_path / "b.gguf", plan, assets, random_weight)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
        ({"head_dim": 64}, "head_dim 64"),
        ({"vocab_size": 8000}, "vocabulary has 8000 rows"),
    ],
)
def test_refuses_config(
    change: dict[str, Any],
    message: str,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        gguf.check(make_plan(replace(config, **change)), assets)


def test_refuses_groups_and_single_experts(
    config: ModelConfig, assets: Assets, make_plan: Callable[..., Plan]
) -> None:
    with pytest.raises(UnsupportedError, match="groups of 64"):
        gguf.check(make_plan(config, experts=Scheme(4, 64)), assets)
    one = {"model.layers.2.feed_forward.experts.1.w1.weight": Scheme(8)}
    with pytest.raises(UnsupportedError, match=r"one type$"):
        gguf.check(make_plan(config, overrides=one), assets)


def test_refuses_superblocks_it_cannot_hold(
    config: ModelConfig, assets: Assets, make_plan: Callable[..., Plan]
) -> None:
    with pytest.raises(UnsupportedError, match=r"rows of 128 weights.* 256"):
        gguf.check(make_plan(config, shared=Scheme(4, 32, "kquant")), assets)
    with pytest.raises(
        UnsupportedError, match="4, 5 or 6 bits on the grid kquant, the plan asks for 3"
    ):
        gguf.check(make_plan(config, shared=Scheme(3, 16, "kquant")), assets)


@pytest.mark.parametrize("name", ["mlx", "onnx", "compressed-tensors"])
def test_k_quants_of_short_rows_have_no_format(
    name: str, config: ModelConfig, assets: Assets, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(config, shared=Scheme(6, 16, "kquant"))
    with pytest.raises(UnsupportedError, match=r"'kquant'; no other format can"):
        check_plan(FORMATS[name], plan, assets)


@pytest.mark.parametrize("keep", [0, 10, 3000, -100])
def test_truncated_file(
    keep: int,
    tmp_path: Path,
    config: ModelConfig,
    assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: RandomWeight,
) -> None:
    path = write(tmp_path / "a.gguf", make_plan(config), assets, random_weight)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValidationError, match=r"a\.gguf"):
        gguf.open_reader(path)
