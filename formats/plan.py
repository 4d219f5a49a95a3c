"""The plan: the model's config and the storage of every tensor, known before a weight is read.

Frozen values that travel from the checkpoint to the writers; a stage makes new ones.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, Literal

from lfmq.quant.types import Scheme, Storage

LayerType = Literal["conv", "full_attention"]
ModelType = Literal["lfm2", "lfm2_moe"]


class Role(StrEnum):
    """What a tensor does in the model; recipes speak of weights by role."""

    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    ATTENTION = "attention"
    CONV = "conv"
    DENSE = "dense"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    EXPERT_BIAS = "expert_bias"
    CONV_KERNEL = "conv_kernel"
    NORM = "norm"


EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
SHARED_ROLES = (Role.ATTENTION, Role.CONV, Role.DENSE, Role.EMBEDDING, Role.HEAD)
FLOAT_ROLES = (Role.ROUTER, Role.EXPERT_BIAS, Role.CONV_KERNEL, Role.NORM)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts of one LFM2 model; the names are those of its ``config.json``.

    A dense model (``lfm2``) has ``num_experts`` 0 and only dense layers; its ``intermediate_size``
    is the width its feed-forward really has, after the config's adjustment.
    ``tie_word_embeddings`` says whether the head is the embedding, as the weights show it:
    transformers uses a stored head that differs whatever the config says.
    """

    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_dense_layers: int
    num_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    conv_L_cache: int  # the config's own spelling
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    layer_types: tuple[LayerType, ...]
    norm_topk_prob: bool = True
    use_expert_bias: bool = True
    routed_scaling_factor: float = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    model_type: ModelType = "lfm2_moe"
    tie_word_embeddings: bool = True

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a router and experts."""
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))

    @property
    def expert_share(self) -> Fraction:
        """The share of a layer's experts that run for one token; 1 where there are none."""
        if not self.num_experts:
            return Fraction(1)
        return Fraction(self.num_experts_per_tok, self.num_experts)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that mix tokens by attention."""
        return tuple(i for i, t in enumerate(self.layer_types) if t == "full_attention")

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Indices of the layers that mix tokens by a gated short convolution."""
        return tuple(i for i, t in enumerate(self.layer_types) if t == "conv")


def without_experts(layers: int) -> dict[str, Any]:
    """The facts of a :class:`ModelConfig` whose layers are all dense."""
    return {
        "num_dense_layers": layers,
        "moe_intermediate_size": 0,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "use_expert_bias": False,
    }


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the plan, under its name in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    expert: int | None
    storage: Storage

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def scheme(self) -> Scheme | None:
        """The integer scheme, or None for a tensor stored as floats."""
        return self.storage if isinstance(self.storage, Scheme) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything known before a weight is read: the model's facts and each tensor's storage."""

    config: ModelConfig
    entries: tuple[TensorPlan, ...]
    recipe: str

    def write_groups(self) -> tuple[tuple[TensorPlan, ...], ...]:
        """Entries that are processed and written together: an expert's three, else one by one."""
        groups: dict[tuple[object, ...], list[TensorPlan]] = {}
        for entry in self.entries:
            key: tuple[object, ...] = (entry.name,)
            if entry.expert is not None:
                key = (entry.layer, entry.expert)
            groups.setdefault(key, []).append(entry)
        return tuple(tuple(group) for group in groups.values())
