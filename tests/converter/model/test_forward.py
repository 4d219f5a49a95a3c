from pathlib import Path

import numpy as np
import pytest
import torch

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.huggingface.config import parse_config
from lfmq.formats.plan import FLOAT_ROLES, ModelConfig, Role
from lfmq.quant.errors import ValidationError
from lfmq.quant.types import Quantized, dequantize

# The bar of the reference: float32 sums in another order differ by some 1e-5 at logits of 20.
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sample(sample_folder) -> Checkpoint:
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def sample_ids(sample) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(0, sample.config.vocab_size, (3, 96), dtype=np.int64)


def logits(model: Model, ids: np.ndarray) -> torch.Tensor:
    head = model.weight("model.embed_tokens.weight")
    return run_model(model, ids).hidden @ head.T


def test_sample_logits_and_experts_equal_transformers(sample, sample_ids, transformers_model):
    theirs = transformers_model(sample.assets.config_json, sample.read)
    chosen = []
    for layer in theirs.model.layers[sample.config.num_dense_layers :]:
        layer.feed_forward.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(sample_ids)).logits
    model = Model(sample.config, sample.read)
    trace = run_model(model, sample_ids)
    found = trace.hidden @ model.weight("model.embed_tokens.weight").T
    assert (found - expected).abs().max() < LOGIT_TOLERANCE
    assert len(chosen) == len(trace.routing) == 4
    for ours, other in zip(trace.routing.values(), chosen, strict=True):
        assert torch.equal(ours.selected.sort(-1).values, other.sort(-1).values)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.5},
        {"use_expert_bias": False},
        {"conv_L_cache": 4},
        {"num_experts_per_tok": 6},
        {"head_dim": 48},
        {"num_key_value_heads": 4},
        {"layer_types": ("full_attention",) * 4},
        {"num_dense_layers": 0},
        {"num_dense_layers": 4},
    ],
    ids=str,
)
def test_every_setting_equals_transformers(
    change, tiny_config, tiny_assets, make_plan, random_weight, transformers_model
):
    config, raw = changed(tiny_config, tiny_assets.config_json, change)
    plan = make_plan(config)
    weights = {e.name: random_weight(e) for e in plan.entries}

    def read(name):
        weight = weights[name]
        return dequantize(weight) if isinstance(weight, Quantized) else weight

    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 24), dtype=np.int64)
    theirs = transformers_model(raw, read)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits
    assert (logits(Model(config, read), ids) - expected).abs().max() < LOGIT_TOLERANCE


def test_dense_sample_logits_equal_transformers(sample_dense_folder, transformers_model):
    dense = open_checkpoint(sample_dense_folder)
    ids = np.random.default_rng(8).integers(0, dense.config.vocab_size, (3, 96), dtype=np.int64)
    theirs = transformers_model(dense.assets.config_json, dense.read)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits
    model = Model(dense.config, dense.read)
    assert (logits(model, ids) - expected).abs().max() < LOGIT_TOLERANCE
    assert run_model(model, ids).routing == {}


DENSE = {
    "model_type": "lfm2",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_multiple_of": 64,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("change", "width"),
    [
        ({}, 128),
        ({"block_auto_adjust_ff_dim": False}, 192),
        ({"block_ff_dim": 300}, 256),
        ({"block_ff_dim": 300, "block_auto_adjust_ff_dim": False}, 300),
        ({"block_ffn_dim_multiplier": 1.7}, 256),
        ({"block_ffn_dim_multiplier": 2, "block_multiple_of": 96}, 288),
        ({"block_ffn_dim_multiplier": 0.9, "block_multiple_of": 1}, 115),
        ({"layer_types": ["conv"] * 4}, 128),
        ({"layer_types": ["full_attention"] * 4}, 128),
        ({"num_key_value_heads": 4}, 128),
        ({"conv_L_cache": 5}, 128),
    ],
    ids=str,
)
def test_every_dense_setting_equals_transformers(change, width, transformers_model):
    """The width of the feed-forward among them, which the config states before its adjustment."""
    raw = DENSE | change
    config = parse_config(raw, Path("config.json"))
    assert config.intermediate_size == width
    rng = np.random.default_rng(3)
    weights = {
        t.name: (rng.standard_normal(t.shape) * 0.05 + (t.role is Role.NORM)).astype(np.float32)
        for t in expected_tensors(config)
    }
    theirs = transformers_model(raw, weights.__getitem__)
    assert theirs.model.layers[0].feed_forward.w1.out_features == width
    ids = rng.integers(0, config.vocab_size, (2, 24), dtype=np.int64)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), use_cache=False).logits
    model = Model(config, weights.__getitem__)
    assert (logits(model, ids) - expected).abs().max() < LOGIT_TOLERANCE


def changed(config, raw, change) -> tuple[ModelConfig, dict]:
    fields = {f: getattr(config, f) for f in config.__dataclass_fields__}
    raw = {**raw, **change}
    if "layer_types" in change:
        raw["layer_types"] = list(change["layer_types"])
    return ModelConfig(**{**fields, **change}), raw


def test_batches_do_not_change_the_result(sample, sample_ids, monkeypatch):
    model = Model(sample.config, sample.read)
    whole = run_model(model, sample_ids).hidden
    monkeypatch.setattr("lfmq.converter.model.forward._TOKENS_AT_ONCE", 96)
    split = run_model(model, sample_ids).hidden
    assert (whole - split).abs().max() < LOGIT_TOLERANCE


def test_bfloat16_is_near(sample, sample_ids):
    full = logits(Model(sample.config, sample.read), sample_ids)
    half = logits(Model(sample.config, sample.read, torch.bfloat16), sample_ids)
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: random text through six layers still agrees on most next tokens
    assert (full.argmax(-1) == half.argmax(-1)).float().mean() > 0.9


def test_observer_sees_the_input_of_every_matrix(sample, sample_ids):
    seen: dict[str, tuple[int, int]] = {}

    def observe(names, x, affinity):
        for name in names:
            tokens, _ = seen.get(name, (0, 0))
            seen[name] = (tokens + len(x), x.shape[1])
            assert (affinity is not None) == (".experts." in name)
            assert affinity is None or len(affinity) == len(x)

    run_model(Model(sample.config, sample.read), sample_ids, observe=observe)
    g = sample.config
    for name, stored in sample.stored.items():
        if name in seen:
            assert seen[name][1] == stored.shape[1]
    routed = [n for n in seen if ".experts." in n and n.endswith("w1.weight")]
    assert sum(seen[n][0] for n in routed) == sample_ids.size * g.num_experts_per_tok * 4
    others = [n for n in seen if ".experts." not in n]
    assert {seen[n][0] for n in others} == {sample_ids.size}
    routers = [f"model.layers.{i}.feed_forward.gate.weight" for i in g.moe_layers]
    assert set(routers) <= set(others)
    assert len(others) == 4 * 2 + 2 * 4 + 2 * 3 + len(routers)
    assert not any(role.value in n for role in FLOAT_ROLES for n in others)


def test_a_damaged_weight_is_named_by_its_layer(sample, sample_ids):
    def read(name):
        weight = sample.read(name)
        if name.startswith("model.layers.3.conv.out_proj"):
            weight = weight.copy()
            weight[0, 0] = np.inf
        return weight

    with pytest.raises(ValidationError, match="layer 3: the output of its convolution"):
        run_model(Model(sample.config, read), sample_ids)


def test_ids_outside_the_vocabulary_are_refused(sample):
    with pytest.raises(ValidationError, match="vocabulary has 8192"):
        run_model(Model(sample.config, sample.read), np.full((1, 8), 9000))
