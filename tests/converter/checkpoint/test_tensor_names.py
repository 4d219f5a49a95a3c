"""Names that fit no model, or two of its tensors: refused by name."""

import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.errors import CheckpointError
from lfmq.tests import checkpoint_kinds as kinds

W1 = "model.layers.2.feed_forward.experts.0.w1.weight"
QUERY = "model.layers.1.self_attn.q_proj"


def test_a_stack_of_another_shape(make_checkpoint):
    folder = make_checkpoint()
    tensors = kinds.fused(kinds.load(folder))
    name = "model.layers.3.feed_forward.experts.gate_up_proj"
    kinds.store(folder, tensors | {name: tensors[name][:, :10]})
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj has shape \[6, 10, 128\], the config"
    ):
        open_checkpoint(folder)


def test_one_tensor_under_two_names(make_checkpoint):
    folder = make_checkpoint(
        change=lambda t: t.update({"layers.0.ffn_norm.weight": np.ones(128, "f4")})
    )
    with pytest.raises(CheckpointError, match=r"are both model\.layers\.0\.ffn_norm\.weight"):
        open_checkpoint(folder)


def test_an_expert_in_a_stack_and_alone(make_checkpoint):
    folder = make_checkpoint()
    tensors = kinds.load(folder)
    kinds.store(folder, kinds.fused(tensors) | {W1: tensors[W1]})
    with pytest.raises(
        CheckpointError,
        match=r"gate_up_proj and .*w1\.weight are both|w1\.weight and .*gate_up_proj are both",
    ):
        open_checkpoint(folder)


def test_experts_that_transformers_would_mix_up(make_checkpoint):
    folder = make_checkpoint()
    kinds.experts_mixed_up(folder)
    with pytest.raises(CheckpointError, match="transformers would mix up the experts"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{QUERY}.lora_A.default.weight",
        f"{QUERY}.lora_B.weight",
        f"base_model.model.{QUERY}.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    ],
)
def test_parts_of_an_adapter(make_checkpoint, name):
    folder = make_checkpoint(change=lambda t: t.update({name: np.zeros((8, 8), np.float32)}))
    with pytest.raises(CheckpointError, match=r"part of an adapter \(LoRA\); merge it"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["mtp.layers.0.weight", "lm_head.bias", "model.layers.9.x.weight"]
)
def test_tensors_that_the_model_has_no_place_for(make_checkpoint, name):
    folder = make_checkpoint(change=lambda t: t.update({name: np.zeros(8, np.float32)}))
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name}"):
        open_checkpoint(folder)


def test_a_prefix_that_only_some_tensors_have(make_checkpoint):
    folder = make_checkpoint()
    tensors = kinds.load(folder)
    named = {k if ".1." in k else f"module.{k}": v for k, v in tensors.items()}
    kinds.store(folder, named)
    assert len(open_checkpoint(folder).stored) == len(tensors)
    kinds.store(folder, {k if k != W1 else f"other.{k}": v for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"{W1} is missing; other.{W1} is there"):
        open_checkpoint(folder)


def test_an_expert_bias_that_the_config_does_not_use(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint(config={"use_expert_bias": False}))
    assert not any("expert_bias" in name for name in checkpoint.stored)
    assert "expert_bias and 1 more: not among" in checkpoint.notes[0]
