"""Write a checkpoint of the real model's exact shapes with made-up weights.

LFM2.5-8B-A1B by default: 2302 tensors, 16,935,715,072 bytes of bfloat16 in shards of 4.5 GB.
The weights are normal with log-normal row and column scales, which gives the tails trained
weights have. The sample's tokenizer is copied, so every format can be written.

usage: python benchmarks/make_checkpoint.py FOLDER [--layers 24] [--experts 32]
       [--expert-width 1792] [--vocabulary 128000]
"""

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.formats.plan import LayerType, ModelConfig, Role

SHARD_BYTES = 4_500_000_000
ATTENTION = (2, 6, 10, 14, 18, 21, 25, 29, 33, 37)
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def config(layers: int, experts: int, expert_width: int, vocabulary: int) -> ModelConfig:
    """LFM2.5-8B-A1B, with the given counts."""
    types: tuple[LayerType, ...] = tuple(
        "full_attention" if i in ATTENTION else "conv" for i in range(layers)
    )
    return ModelConfig(
        hidden_size=2048,
        intermediate_size=7168,
        moe_intermediate_size=expert_width,
        num_hidden_layers=layers,
        num_dense_layers=2,
        num_experts=experts,
        num_experts_per_tok=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        conv_L_cache=3,
        vocab_size=vocabulary,
        max_position_embeddings=128000,
        norm_eps=1e-5,
        rope_theta=5e6,
        layer_types=types,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    )


def config_json(g: ModelConfig) -> dict[str, object]:
    """The ``config.json`` of a model, in the real checkpoint's style."""
    fields = [
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_dense_layers",
        "num_experts",
        "num_experts_per_tok",
        "num_attention_heads",
        "num_key_value_heads",
        "conv_L_cache",
        "vocab_size",
        "max_position_embeddings",
        "norm_eps",
        "norm_topk_prob",
        "use_expert_bias",
        "routed_scaling_factor",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ]
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "conv_bias": False,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": g.rope_theta, "rope_type": "default"},
        "layer_types": list(g.layer_types),
        **{name: getattr(g, name) for name in fields},
    }


class Weights:
    """Made-up weights, the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._base = torch.randn(1 << 24, generator=self._generator)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def make(self, tensor: Tensor) -> torch.Tensor:
        """One tensor in the dtype the checkpoint stores it in."""
        if tensor.role is Role.EXPERT_BIAS:
            return 0.05 * self._normal(*tensor.shape)
        if tensor.role is Role.NORM:
            return (1 + 0.1 * self._normal(*tensor.shape)).to(torch.bfloat16)
        rows, columns = tensor.shape[0], tensor.size // tensor.shape[0]
        start = int(torch.randint(0, self._base.numel(), (1,), generator=self._generator))
        repeats = -(-tensor.size // self._base.numel())
        values = self._base.roll(start).repeat(repeats)[: tensor.size].view(rows, columns)
        scales = torch.exp(0.35 * self._normal(columns)) * torch.exp(0.15 * self._normal(rows, 1))
        std = 0.3 if tensor.role is Role.CONV_KERNEL else 0.02
        return (values * scales * std).to(torch.bfloat16).view(tensor.shape).contiguous()


def write_checkpoint(folder: Path, g: ModelConfig) -> None:
    """Write config, shards, index and the sample's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(g), indent=1))
    for name in SIDE_FILES:
        shutil.copy(sample_file() / name, folder / name)
    shards = split_shards(expected_tensors(g))
    weights = Weights()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {t.name: weights.make(t) for t in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": sum(map(nbytes, expected_tensors(g)))}}
    text = json.dumps(index | {"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor on disk."""
    return tensor.size * (4 if tensor.role is Role.EXPERT_BIAS else 2)


def split_shards(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Consecutive tensors, at most SHARD_BYTES a shard."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(nbytes, shards[-1])) + nbytes(tensor) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=24, show_default=True)
@click.option("--experts", default=32, show_default=True)
@click.option("--expert-width", default=1792, show_default=True)
@click.option("--vocabulary", default=128000, show_default=True)
def main(folder: Path, layers: int, experts: int, expert_width: int, vocabulary: int) -> None:
    """Write a made-up checkpoint of the real model's shapes into FOLDER."""
    g = config(layers, experts, expert_width, vocabulary)
    write_checkpoint(folder, g)
    tensors = expected_tensors(g)
    click.echo(f"{len(tensors)} tensors, {sum(map(nbytes, tensors)):,} bytes")


if __name__ == "__main__":
    main()
