"""Keys without effect pass, keys that could matter are named, real configs are read."""

import json
from pathlib import Path

import pytest

from lfmq.formats.huggingface.config import parse_config
from lfmq.formats.huggingface.config_keys import HANDLED, IGNORED
from lfmq.quant.errors import CheckpointError

SOURCE = Path("config.json")
CONV, FULL = "conv", "full_attention"
MIXED = [FULL if i in (2, 6, 10, 14, 18, 21) else CONV for i in range(24)]
SHARED = {
    "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "eos_token_id": 7,
    "hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 128000,
    "norm_eps": 1e-05, "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0,
    "use_cache": True,
}  # fmt: skip
ROUTED = {
    **SHARED, "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe",
    "intermediate_size": 7168, "layer_types": MIXED, "moe_intermediate_size": 1792,
    "norm_topk_prob": True, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "routed_scaling_factor": 1.0, "use_expert_bias": True,
}  # fmt: skip
DENSE = {
    **SHARED, "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True,
    "conv_dim": 2048, "conv_use_xavier_init": True, "num_heads": 32, "num_hidden_layers": 16,
    "use_pos_enc": True, "vocab_size": 65536, "rope_theta": 1000000.0,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}  # fmt: skip
# As published: keys and values (docs of ports that quote them), of both styles of transformers.
PUBLISHED = {
    "LFM2-8B-A1B": ROUTED | {
        "vocab_size": 65536, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
        "tie_embedding": True, "transformers_version": "4.57.0",
    },
    "LFM2.5-8B-A1B": ROUTED | {
        "vocab_size": 128000, "dtype": "bfloat16", "output_router_logits": False,
        "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"},
        "tie_word_embeddings": True, "transformers_version": "5.8.0",
    },
    "LFM2-24B-A2B": ROUTED | {
        "vocab_size": 65536, "num_hidden_layers": 40, "layer_types": (MIXED * 2)[:40],
        "num_experts": 64, "moe_intermediate_size": 1536, "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "LFM2-1.2B": DENSE | {"block_ff_dim": 12288, "conv_dim_out": 2048, "torch_dtype": "bfloat16"},
    "LFM2-350M": DENSE | {
        "hidden_size": 1024, "block_ff_dim": 6656, "num_attention_heads": 16, "theta": 1000000.0,
    },
    "LFM2-2.6B": DENSE | {
        "num_hidden_layers": 30, "block_auto_adjust_ff_dim": False, "intermediate_size": 10752,
        "full_attn_idxs": None, "layer_types": (MIXED * 2)[:30], "tie_embedding": True,
        "model_name": "LiquidAI/LFM2-2.6B", "unsloth_version": "2026.1.1",
    },
}  # fmt: skip


@pytest.fixture
def config(tiny_assets):
    return tiny_assets.config_json


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    parsed = parse_config(PUBLISHED[name], SOURCE)
    assert parsed.rope_theta == (5e6 if name == "LFM2.5-8B-A1B" else 1e6)
    assert parsed.tie_word_embeddings


def test_configs_that_transformers_saves_are_read(tmp_path):
    import transformers

    for kind in ("Lfm2Config", "Lfm2MoeConfig"):
        layers = {"num_hidden_layers": 24, "layer_types": MIXED}
        getattr(transformers, kind)(**layers).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        parse_config(saved, SOURCE)
        assert set(saved) <= HANDLED | IGNORED
        whole = getattr(transformers, kind)(**layers).to_dict()
        parse_config(json.loads(json.dumps(whole, default=str)), SOURCE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False), ("sliding_window", 4096), ("attention_bias", True),
        ("hidden_act", "gelu"), ("per_layer_config", {"2": {"norm_eps": 1e-6}}),
        ("num_nextn_predict_layers", 1), ("logit_scale", 0.5),
        ("use_bidirectional_attention", True),
        ("text_config", {"hidden_size": 1}), ("my own\nkey", [1]), ("x" * 300, "y" * 300),
    ],
)  # fmt: skip
def test_a_key_that_could_matter_is_named(config, key, value):
    with pytest.raises(CheckpointError) as caught:
        parse_config(config | {key: value}, SOURCE)
    assert repr(key)[1:-1][:30] in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": None, "use_sliding_window": False, "n_shared_experts": 0},
        {"hidden_act": "silu", "is_causal": True, "attention_dropout": 0.1},
        {"sep_token_id": -1, "decoder_start_token_id": None, "image_token_id": 396},
        {"temperature": 0.3, "top_k": 50, "max_length": 20, "id2label": {"0": "LABEL_0"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}, "_name_or_path": "x/y"},
        {"architectures": ["Lfm2MoeModel"]},
        {"architectures": None},
    ],
    ids=str,
)
def test_keys_without_effect_pass(config, keys):
    assert parse_config(config | keys, SOURCE) == parse_config(config, SOURCE)


def test_a_class_for_another_task_is_refused(config):
    with pytest.raises(CheckpointError, match="architectures has 'Lfm2ForSequenceClassification'"):
        parse_config(config | {"architectures": ["Lfm2ForSequenceClassification"]}, SOURCE)
