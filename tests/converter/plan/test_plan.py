"""Recipes resolved on real geometries, and the sizes that follow without reading a weight."""

import json
import struct
import time
from dataclasses import replace
from fractions import Fraction
from math import prod

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.plan.plan import resolve_plan, token_bytes
from lfmq.converter.plan.presets import PEERS, peer_bytes
from lfmq.converter.plan.recipe import builtin_recipes, load_recipe, parse_recipe
from lfmq.converter.run.convert import plan_builds
from lfmq.formats.plan import (
    EXPERT_ROLES,
    FLOAT_ROLES,
    LayerType,
    ModelConfig,
    Role,
)
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import PlanError, RecipeError
from lfmq.quant.types import Scheme

DOWN_WIDE = (0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23)
ATTENTION = (2, 6, 10, 14, 18, 21)
# llama.cpp's Q4_K_M of LFM2.5-8B-A1B, which `int4` promises not to exceed
Q4_K_M_BYTES = 5_150_000_000


@pytest.fixture(scope="module")
def lfm25() -> ModelConfig:
    """LFM2.5-8B-A1B."""
    types: tuple[LayerType, ...] = tuple(
        "full_attention" if i in ATTENTION else "conv" for i in range(24)
    )
    return ModelConfig(
        hidden_size=2048,
        intermediate_size=7168,
        moe_intermediate_size=1792,
        num_hidden_layers=24,
        num_dense_layers=2,
        num_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        conv_L_cache=3,
        vocab_size=128000,
        max_position_embeddings=128000,
        norm_eps=1e-5,
        rope_theta=5e6,
        layer_types=types,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    )


def plan_of(config, text):
    return resolve_plan(config, parse_recipe(text, "mine", "mine.toml"))


def test_real_models_have_their_tensors_and_weights(lfm25):
    tensors = expected_tensors(lfm25)
    assert len(tensors) == 2302
    assert sum(t.size for t in tensors) == 8_467_856_832
    lfm2 = expected_tensors(replace(lfm25, vocab_size=65536, rope_theta=1e6))
    assert len(lfm2) == 2302
    assert sum(t.size for t in lfm2) == 8_339_930_560
    types = tuple("full_attention" if i % 4 == 2 else "conv" for i in range(40))
    large = replace(
        lfm25, num_hidden_layers=40, layer_types=types, num_experts=64,
        moe_intermediate_size=1536, vocab_size=65536,
    )  # fmt: skip
    experts = [t for t in expected_tensors(large) if t.role in EXPERT_ROLES]
    assert sum(t.size for t in experts) == 22_951_231_488


@pytest.mark.parametrize("name", builtin_recipes())
def test_floats_stay_floats_in_every_recipe(lfm25, name):
    for entry in resolve_plan(lfm25, load_recipe(name)).entries:
        assert (entry.scheme is None) == (entry.role in FLOAT_ROLES)
        if entry.role is Role.EXPERT_BIAS:
            assert entry.storage == "float32"


def sparse_checkpoint(folder, config, sample_folder):
    """The real model's headers over a hole: nothing but names, shapes and dtypes."""
    at, header = 0, {}
    for t in expected_tensors(config):
        size = prod(t.shape) * (4 if t.role is Role.EXPERT_BIAS else 2)
        dtype = "F32" if t.role is Role.EXPERT_BIAS else "BF16"
        header[t.name] = {"dtype": dtype, "shape": t.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    raw = {f: getattr(config, f) for f in config.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "lfm2_moe"}))
    for path in sample_folder.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_real_model_is_planned_in_a_second(lfm25, tmp_path, sample_folder):
    checkpoint = open_checkpoint(sparse_checkpoint(tmp_path, lfm25, sample_folder))
    plan = resolve_plan(lfm25, load_recipe("int4"))
    started = time.process_time()
    builds = {b.format: b for b in plan_builds(checkpoint, plan, FORMATS)}
    seconds = time.process_time() - started
    assert builds["gguf"].nbytes < Q4_K_M_BYTES
    assert builds["gguf"].bits_per_weight == pytest.approx(4.845, abs=0.01)
    # 0.717 B shared weights at 8.5 bits, of 7.751 B expert weights a 32nd times 4 at 4.5
    assert builds["gguf"].bytes_per_token == pytest.approx(1.307e9, rel=0.01)
    assert all(b.refused is None for b in builds.values())
    assert seconds < 20  # a second on a free machine; a bound against reading 17 GB, not a speed


def test_token_bytes_count_a_share_of_experts(tiny_config, tiny_assets, make_plan):
    plan = make_plan(tiny_config)
    layout = FORMATS["mlx"].layout(plan, tiny_assets)
    sizes = {"experts": 0, "others": 0}
    names = {e.name for e in plan.entries if e.expert is not None}
    for file in layout.files:
        for segment in file.segments:
            sizes["experts" if segment.sources[0] in names else "others"] += segment.nbytes
    expected = sizes["others"] + sizes["experts"] * 2 // 6
    assert token_bytes(plan, layout) == expected


def test_the_last_matching_rule_decides(tiny_config):
    plan = plan_of(
        tiny_config,
        """
        [[rule]]
        bits = 8
        [[rule]]
        roles = ["experts"]
        bits = 4
        group = 64
        [[rule]]
        roles = ["expert_down"]
        layers = ["3"]
        experts = [1, "4-5"]
        bits = 8
        [[rule]]
        names = ["*.self_attn.v_proj.weight"]
        float = "bfloat16"
        """,
    )
    found = {e.name: e.storage for e in plan.entries}
    assert found["model.layers.2.feed_forward.experts.1.w2.weight"] == Scheme(4, 64)
    down = [found[f"model.layers.3.feed_forward.experts.{e}.w2.weight"] for e in range(6)]
    assert [s.bits for s in down] == [4, 8, 4, 4, 8, 8]
    assert found["model.layers.1.self_attn.v_proj.weight"] == "bfloat16"
    assert found["model.layers.1.self_attn.k_proj.weight"] == Scheme(8)
    assert found["model.layers.3.feed_forward.gate.weight"] == "float32"


def without_experts(config):
    """As dense models are."""
    return replace(config, num_dense_layers=4, num_experts=0, num_experts_per_tok=0)


@pytest.mark.parametrize(
    ("recipe", "dense", "others"), [("int4", 4, 8), ("int4-all", 4, 4), ("int8", 8, 8)]
)
def test_without_experts_their_rules_are_for_the_dense_feed_forward(
    tiny_config, recipe, dense, others
):
    plan = resolve_plan(without_experts(tiny_config), load_recipe(recipe))
    bits = {(e.role, e.scheme.bits) for e in plan.entries if e.scheme is not None}
    layers = {(Role.DENSE, dense), (Role.ATTENTION, others), (Role.CONV, others)}
    assert bits == layers | {(Role.EMBEDDING, 8)}


def test_rules_for_roles_that_a_model_lacks_are_left_out(tiny_config):
    base, config = "[[rule]]\nbits = 4\n", without_experts(tiny_config)
    plan = plan_of(config, base + '[[rule]]\nroles = ["expert_down"]\nlayers = [2]\nbits = 8\n')
    assert plan.entries == plan_of(config, base).entries
    for rule in ('roles = ["dense"]\nlayers = [9]', 'names = ["*.w9.*"]', "experts = [0]"):
        with pytest.raises(RecipeError, match="rule 2 matches no tensor"):
            plan_of(config, f"{base}[[rule]]\n{rule}\nbits = 8\n")


def test_without_experts_a_token_reads_everything(tiny_config):
    assert tiny_config.expert_share == Fraction(1, 3)
    for peer in PEERS:
        total, token = peer_bytes(peer, without_experts(tiny_config))
        assert total == token > 0


def test_widths_of_single_experts_are_for_onnx(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint())
    text = '[[rule]]\nbits = 4\n[[rule]]\nroles = ["experts"]\nexperts = [0]\nbits = 8'
    plan = plan_of(checkpoint.config, text)
    builds = {b.format: b for b in plan_builds(checkpoint, plan, FORMATS)}
    assert builds["onnx"].refused is None
    for name in ("gguf", "mlx"):
        assert "use onnx or compressed-tensors" in str(builds[name].refused)


def test_settings_gguf_cannot_express_are_refused_by_it_alone(make_checkpoint):
    for change in ({"norm_topk_prob": False}, {"routed_scaling_factor": 2.0}):
        checkpoint = open_checkpoint(make_checkpoint(next(iter(change)), config=change))
        plan = resolve_plan(checkpoint.config, load_recipe("int4"))
        builds = {b.format: b for b in plan_builds(checkpoint, plan, FORMATS)}
        assert next(iter(change)) in str(builds["gguf"].refused)
        assert builds["mlx"].refused is builds["onnx"].refused is None


@pytest.mark.parametrize(("recipe", "bits"), [("q4_k_m", 4), ("q5_k_m", 5), ("q6_k", 6)])
def test_llama_cpps_types_are_those_of_its_quantizer(lfm25, recipe, bits):
    """What ``llama-quantize --dry-run`` lists for LFM2.5-8B-A1B."""
    wide = {f"layers.{i}.feed_forward.{e}w2" for i in DOWN_WIDE for e in ("", "experts.31.")}
    wide |= {f"layers.{i}.self_attn.v_proj" for i in (10, 21)} | {"embed_tokens"}
    for entry in resolve_plan(lfm25, load_recipe(recipe)).entries:
        if entry.scheme is None or entry.expert not in (None, 31):
            continue
        short = entry.name.removeprefix("model.").removesuffix(".weight")
        assert entry.scheme.grid == "superblock"
        assert entry.scheme.bits == (6 if short in wide else bits), entry.name


def test_more_bits_counts_the_layers_that_have_such_a_tensor(lfm25):
    """Value projections among layers of attention, in a model of any depth."""
    types = ("conv", "conv", "full_attention", "conv", "full_attention", "conv")
    small = replace(lfm25, num_hidden_layers=6, layer_types=types)
    wide = {
        (e.role, e.layer)
        for e in resolve_plan(small, load_recipe("q4_k_m")).entries
        if e.scheme is not None and e.scheme.bits == 6
    }
    assert wide == {
        (Role.EMBEDDING, None),
        (Role.ATTENTION, 4),
        (Role.EXPERT_DOWN, 2),
        (Role.EXPERT_DOWN, 5),
    }


def test_groups_that_do_not_divide_a_row_are_refused(tiny_config):
    with pytest.raises(PlanError, match="groups of 128"):
        plan_of(tiny_config, "[[rule]]\nbits = 4\ngroup = 128")


def test_superblocks_that_do_not_divide_a_row_are_refused(tiny_config):
    with pytest.raises(PlanError, match=r"rows of 128 .* groups of 256; .*Q8_0"):
        plan_of(tiny_config, '[[rule]]\nbits = 6\ngrid = "superblock"')
