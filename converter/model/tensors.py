"""The tensors of an LFM2 checkpoint: names, shapes, roles and uses, from its config.

This module and :mod:`.blocks`, which groups what stands here, are all that knows the names of a
layer's tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from fractions import Fraction

from lfmq.formats.plan import ModelConfig, Role, TensorPlan

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.embedding_norm.weight"
HEAD = "lm_head.weight"


class Use(Enum):
    """What a block (:mod:`.blocks`) does with one of its tensors."""

    NORM = auto()
    READER = auto()
    INNER = auto()
    WRITER = auto()
    ROUTER = auto()
    ROUTER_BIAS = auto()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor the checkpoint must hold; ``use`` is None outside of layers."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None
    use: Use | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def expected_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the model in canonical order; the order of all plans and layouts."""
    g = config
    tensors = [
        Tensor(EMBEDDING, (g.vocab_size, g.hidden_size), Role.EMBEDDING),
        Tensor(FINAL_NORM, (g.hidden_size,), Role.NORM),
    ]
    for layer in range(g.num_hidden_layers):
        (first, *mixer), (second, *feed_forward) = layer_tensors(g, layer)
        tensors += [first, second, *mixer, *feed_forward]
    if not g.tie_word_embeddings:
        tensors.append(Tensor(HEAD, (g.vocab_size, g.hidden_size), Role.HEAD))
    return tuple(tensors)


def head_of(config: ModelConfig) -> str:
    """The tensor that turns final hidden states into logits: the head, or again the embedding."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def token_share(tensor: Tensor | TensorPlan, config: ModelConfig) -> Fraction:
    """The share of a tensor that is read for a token.

    An expert is read where it is chosen, of an embedding that is not also the head one row.
    """
    if tensor.expert is not None:
        return config.expert_share
    looked_up = tensor.role is Role.EMBEDDING and not config.tie_word_embeddings
    return Fraction(0 if looked_up else 1)


def layer_tensors(
    config: ModelConfig, layer: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of a layer's two blocks, the norm of each first."""
    prefix = f"model.layers.{layer}"
    width = (config.hidden_size,)
    first, second = (
        Tensor(f"{prefix}.{norm}.weight", width, Role.NORM, layer, use=Use.NORM)
        for norm in ("operator_norm", "ffn_norm")
    )
    mixer = _conv if config.layer_types[layer] == "conv" else _attention
    mixing = (
        Tensor(f"{prefix}.{part}.weight", shape, role, layer, use=use)
        for part, shape, role, use in mixer(config)
    )
    feed_forward = _dense if layer < config.num_dense_layers else _experts
    return (first, *mixing), (second, *feed_forward(config, layer, f"{prefix}.feed_forward"))


_Part = tuple[str, tuple[int, ...], Role, Use]


def _conv(g: ModelConfig) -> Iterator[_Part]:
    yield "conv.in_proj", (3 * g.hidden_size, g.hidden_size), Role.CONV, Use.READER
    yield "conv.conv", (g.hidden_size, 1, g.conv_L_cache), Role.CONV_KERNEL, Use.INNER
    yield "conv.out_proj", (g.hidden_size, g.hidden_size), Role.CONV, Use.WRITER


def _attention(g: ModelConfig) -> Iterator[_Part]:
    query, key = g.num_attention_heads * g.head_dim, g.num_key_value_heads * g.head_dim
    yield "self_attn.q_proj", (query, g.hidden_size), Role.ATTENTION, Use.READER
    yield "self_attn.k_proj", (key, g.hidden_size), Role.ATTENTION, Use.READER
    yield "self_attn.v_proj", (key, g.hidden_size), Role.ATTENTION, Use.READER
    yield "self_attn.out_proj", (g.hidden_size, query), Role.ATTENTION, Use.WRITER
    yield "self_attn.q_layernorm", (g.head_dim,), Role.NORM, Use.INNER
    yield "self_attn.k_layernorm", (g.head_dim,), Role.NORM, Use.INNER


def _dense(g: ModelConfig, layer: int, prefix: str) -> Iterator[Tensor]:
    wide = (g.intermediate_size, g.hidden_size)
    for part, _, use in _GATED:
        shape = wide if use is Use.READER else wide[::-1]
        yield Tensor(f"{prefix}.{part}.weight", shape, Role.DENSE, layer, use=use)


def _experts(g: ModelConfig, layer: int, prefix: str) -> Iterator[Tensor]:
    router_shape = (g.num_experts, g.hidden_size)
    yield Tensor(f"{prefix}.gate.weight", router_shape, Role.ROUTER, layer, use=Use.ROUTER)
    if g.use_expert_bias:
        name, shape = f"{prefix}.expert_bias", (g.num_experts,)
        yield Tensor(name, shape, Role.EXPERT_BIAS, layer, use=Use.ROUTER_BIAS)
    wide = (g.moe_intermediate_size, g.hidden_size)
    for expert in range(g.num_experts):
        for part, role, use in _GATED:
            name = f"{prefix}.experts.{expert}.{part}.weight"
            yield Tensor(name, wide if use is Use.READER else wide[::-1], role, layer, expert, use)


# The matrices of a feed-forward; the roles are those they have in an expert.
_GATED = (
    ("w1", Role.EXPERT_GATE, Use.READER),
    ("w3", Role.EXPERT_UP, Use.READER),
    ("w2", Role.EXPERT_DOWN, Use.WRITER),
)
