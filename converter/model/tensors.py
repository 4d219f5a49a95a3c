"""The tensors of an LFM2 checkpoint: names, shapes and roles, from its config."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lfmq.formats.plan import ModelConfig, Role


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor the checkpoint must hold."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def expected_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the model in canonical order; the order of all plans and layouts."""
    g = config
    tensors = [
        Tensor("model.embed_tokens.weight", (g.vocab_size, g.hidden_size), Role.EMBEDDING),
        Tensor("model.embedding_norm.weight", (g.hidden_size,), Role.NORM),
    ]
    for layer in range(g.num_hidden_layers):
        tensors += _layer(g, layer)
    return tuple(tensors)


def _layer(g: ModelConfig, layer: int) -> Iterator[Tensor]:
    prefix = f"model.layers.{layer}"
    for norm in ("operator_norm", "ffn_norm"):
        yield Tensor(f"{prefix}.{norm}.weight", (g.hidden_size,), Role.NORM, layer)
    mixer = _conv if g.layer_types[layer] == "conv" else _attention
    for part, shape, role in mixer(g):
        yield Tensor(f"{prefix}.{part}.weight", shape, role, layer)
    if layer < g.num_dense_layers:
        wide, narrow = (g.intermediate_size, g.hidden_size), (g.hidden_size, g.intermediate_size)
        for part, shape in (("w1", wide), ("w3", wide), ("w2", narrow)):
            yield Tensor(f"{prefix}.feed_forward.{part}.weight", shape, Role.DENSE, layer)
    else:
        yield from _experts(g, layer, f"{prefix}.feed_forward")


def _conv(g: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Role]]:
    yield "conv.in_proj", (3 * g.hidden_size, g.hidden_size), Role.CONV
    yield "conv.conv", (g.hidden_size, 1, g.conv_L_cache), Role.CONV_KERNEL
    yield "conv.out_proj", (g.hidden_size, g.hidden_size), Role.CONV


def _attention(g: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Role]]:
    query, key = g.num_attention_heads * g.head_dim, g.num_key_value_heads * g.head_dim
    yield "self_attn.q_proj", (query, g.hidden_size), Role.ATTENTION
    yield "self_attn.k_proj", (key, g.hidden_size), Role.ATTENTION
    yield "self_attn.v_proj", (key, g.hidden_size), Role.ATTENTION
    yield "self_attn.out_proj", (g.hidden_size, query), Role.ATTENTION
    yield "self_attn.q_layernorm", (g.head_dim,), Role.NORM
    yield "self_attn.k_layernorm", (g.head_dim,), Role.NORM


def _experts(g: ModelConfig, layer: int, prefix: str) -> Iterator[Tensor]:
    router_shape = (g.num_experts, g.hidden_size)
    yield Tensor(f"{prefix}.gate.weight", router_shape, Role.ROUTER, layer)
    if g.use_expert_bias:
        yield Tensor(f"{prefix}.expert_bias", (g.num_experts,), Role.EXPERT_BIAS, layer)
    wide = (g.moe_intermediate_size, g.hidden_size)
    narrow = (g.hidden_size, g.moe_intermediate_size)
    parts = (
        ("w1", wide, Role.EXPERT_GATE),
        ("w3", wide, Role.EXPERT_UP),
        ("w2", narrow, Role.EXPERT_DOWN),
    )
    for expert in range(g.num_experts):
        for part, shape, role in parts:
            name = f"{prefix}.experts.{expert}.{part}.weight"
            yield Tensor(name, shape, role, layer, expert)
