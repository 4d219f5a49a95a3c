"""What mlx-lm calls modules and config keys, by model type.

Module paths are those that mlx-lm's own ``sanitize`` makes of a checkpoint's names, config keys
those of its ``ModelArgs`` (mlx_lm/models/lfm2_moe.py and lfm2.py, 0.32).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lfmq.formats.plan import ModelConfig, ModelType


@dataclass(frozen=True, slots=True)
class Names:
    """How mlx-lm's module for a model type differs from the checkpoint.

    Attributes:
        config: the keys of ``config.json`` its class needs, from the model's facts.
        projections: what it calls the parts of a feed-forward, where not w1, w3 and w2.
    """

    config: Callable[[ModelConfig], dict[str, Any]]
    projections: dict[str, str] = field(default_factory=dict)


def _routed(g: ModelConfig) -> dict[str, Any]:
    keys = ("norm_topk_prob", "use_expert_bias", "routed_scaling_factor")
    return {key: getattr(g, key) for key in keys}


def _dense(g: ModelConfig) -> dict[str, Any]:
    """The width as it is: mlx-lm adjusts it by a rule that differs in a corner."""
    return {
        "block_dim": g.hidden_size,
        "block_ff_dim": g.intermediate_size,
        "intermediate_size": g.intermediate_size,
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


NAMES: dict[ModelType, Names] = {
    "lfm2_moe": Names(_routed, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
    "lfm2": Names(_dense),
}
_EXPERT = re.compile(r"(.*\.feed_forward)\.experts\.(\d+)\.(w[123])\.weight")
_DENSE = re.compile(r"(.*\.feed_forward)\.(w[123])\.weight")


def module_path(name: str, model_type: ModelType) -> tuple[str, int | None]:
    """The module or parameter that holds a checkpoint tensor, and its place in an expert stack."""
    projections = NAMES[model_type].projections
    if expert := _EXPERT.fullmatch(name):
        prefix, index, part = expert.groups()
        return f"{prefix}.switch_mlp.{projections[part]}", int(index)
    if dense := _DENSE.fullmatch(name):
        return f"{dense[1]}.{projections.get(dense[2], dense[2])}", None
    return name.removesuffix(".weight"), None
