"""Checkpoints that are quantized already, by every method people have."""

import ml_dtypes
import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.errors import CheckpointError

WEIGHT = "model.layers.1.self_attn.q_proj.weight"
MODULE = WEIGHT.removesuffix(".weight")


def refusal(folder):
    with pytest.raises(CheckpointError, match="quantized") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "block", "method"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
        ),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("compression_config", {"quant_method": "x"}, "x"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX"),
    ],
)
def test_by_the_config(make_checkpoint, key, block, method):
    message = refusal(make_checkpoint(config={key: block}))
    assert f"config.json: {key} says that the checkpoint is quantized by {method};" in message


@pytest.mark.parametrize(
    "name",
    [
        f"{WEIGHT}_scale_inv", f"{WEIGHT}_scale", f"{WEIGHT}_packed", f"{MODULE}.qweight",
        f"{MODULE}.scales", f"{MODULE}.g_idx", f"{WEIGHT}.absmax", f"{WEIGHT}.quant_map",
        f"{WEIGHT}.quant_state.bitsandbytes__nf4", f"{MODULE}.SCB", f"{MODULE}.biases",
        f"{MODULE}.input_scale", f"{MODULE}.weight_zero_point", f"{WEIGHT}:qdata",
        "model.layers.2.feed_forward.experts.gate_up_proj_blocks",
    ],
)  # fmt: skip
def test_by_what_stands_beside_a_weight(make_checkpoint, name):
    folder = make_checkpoint(change=lambda t: t.update({name: np.zeros(4, np.float32)}))
    assert f"{name} belongs to a quantized weight" in refusal(folder)


def test_by_the_dtype(make_checkpoint):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].astype(ml_dtypes.float8_e4m3fn)

    assert f"{WEIGHT} has dtype F8_E4M3, it is quantized" in refusal(
        make_checkpoint(change=change)
    )
    folder = make_checkpoint("i8", lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.int8)}))
    assert "dtype I8, expected BF16, F16 or F32; integers are codes" in refusal(folder)


def test_weights_as_mlx_lays_them_out(make_checkpoint):
    stack = "model.layers.2.feed_forward.switch_mlp.gate_proj.weight"
    folder = make_checkpoint(
        change=lambda t: t.update({stack: np.zeros((6, 64, 128), np.float32)})
    )
    assert f"{stack} is laid out for MLX" in refusal(folder)

    def swap(tensors):
        for name in [n for n in tensors if n.endswith("conv.conv.weight")]:
            tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    with pytest.raises(CheckpointError, match="which is how MLX lays it out"):
        open_checkpoint(make_checkpoint("conv", swap))


def test_an_empty_block_says_nothing(make_checkpoint):
    open_checkpoint(make_checkpoint(config={"quantization_config": None}))
