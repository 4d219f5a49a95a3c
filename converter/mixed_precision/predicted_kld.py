"""What a plan costs in KL divergence, from statistics.

An error in a part of the model costs in two ways. It moves the predictions directly, which costs
by its square. And it makes routers choose other experts, the oftener the larger it is, which
costs by its size. Both are measured together, for each part at 4 bits. With ``e`` the direct
divergence of a part, ``n`` the share of the routers that are behind it (a fourth of that for
experts, whose errors reach their own tokens alone) and one number ``r`` for the model, the part
costs ``e + r n sqrt(e)``. Errors of several parts are independent, so that their squares add up: a
plan costs ``sum e + r sqrt(sum n^2 e)``. ``r`` is what gives the two terms of all shared weights
the proportion that their divergence has at 4 and at 8 bits, measured both.

Inside a part the error of each weight is known, and on another grid than the one measured it is
that times what rounding errors of the weight itself are there, relative to the measured one. GPTQ
gains less on some grids than on the measured one, by a factor that is the same for all weights.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.converter.statistics.statistics import SCHEMES, WHOLE, Statistics, part_of
from lfmq.formats.plan import (
    SHARED_ROLES,
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.quant.types import Scheme

_INDEX = {scheme: index for index, scheme in enumerate(SCHEMES)}
# Bounds of what is fitted: the number ``r``, and the share of the divergence that is by routing.
_MOST, _SHARES = 10.0, (0.05, 0.95)
_HALVINGS = 60
# An expert's error reaches the tokens routed to it alone and turns fewer routers: with a fourth
# of ``r`` the order and the sum of the sample's twelve stacks come out (docs/statistics.md).
_OF_EXPERTS = 0.25
_EXPERT_PARTS = ("inner", "down")
# GPTQ's error on a grid, relative to that at the measured one, over the same to nearest
# (benchmarks/grid_ratios.py). Embedding and head are rounded to nearest.
_FED_BACK = {"affine_bias": 1.03, "kquant": 1.07}


@dataclass(frozen=True, slots=True)
class Cost:
    """What rounding errors cost: nats, and squared nats that routing adds up in.

    Attributes:
        direct: mean KL divergence, adds up.
        routed: the square of the mean KL divergence by other experts; adds up.
    """

    direct: float = 0.0
    routed: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """That of both."""
        return Cost(self.direct + other.direct, self.routed + other.routed)

    @property
    def kld(self) -> float:
        """Mean KL divergence, nats."""
        return self.direct + float(np.sqrt(self.routed))


@dataclass(frozen=True)
class Prediction:
    """Statistics of a model as costs of its weights."""

    statistics: Statistics
    config: ModelConfig

    def cost(self, tensor: Tensor | TensorPlan, scheme: Scheme) -> Cost | None:
        """What a weight on a grid costs; None for a grid that was not measured."""
        index = _INDEX.get(scheme)
        if index is None:
            return None
        ratio = self.statistics.grids[tensor.name][index]
        if tensor.role not in (Role.EMBEDDING, Role.HEAD):
            ratio *= _FED_BACK.get(scheme.grid, 1.0)
        parts = [part_of(tensor)]
        if tensor.role is Role.EMBEDDING and self.config.tie_word_embeddings:
            parts.append("head")
        found = Cost()
        for part in parts:
            share = self._share(tensor, part) * ratio
            direct = self._direct[part] * share
            found += Cost(direct, (self._routing * self._behind(part)) ** 2 * direct)
        return found

    def kld(self, plan: Plan) -> float | None:
        """Mean KL divergence of a plan, nats; None where a grid was not measured."""
        total = Cost()
        for entry in plan.entries:
            if entry.scheme is not None:
                cost = self.cost(entry, entry.scheme)
                if cost is None:
                    return None
                total += cost
        return total.kld

    def _share(self, tensor: Tensor | TensorPlan, part: str) -> float:
        error = self.statistics.parts[part].error * self.statistics.tokens
        return self.statistics.losses[tensor.name] / error if error else 0.0

    def _behind(self, part: str) -> float:
        """The share of routers that an error of the part turns as a shared weight's does."""
        routers = self.config.moe_layers
        if part == "head" or not routers:
            return 0.0
        if part == "embedding":
            return 1.0
        layer, kind = part.split(".")
        own = kind in ("mixer", "dense")
        behind = sum(r > int(layer) or (own and r == int(layer)) for r in routers) / len(routers)
        return behind if own else _OF_EXPERTS * behind

    @cached_property
    def _routing(self) -> float:
        """The number that gives direct and routed divergence their measured proportion."""
        if not self.config.moe_layers:
            return 0.0
        wide, narrow = (self.statistics.parts[name].kld for name in WHOLE)
        left = _INDEX[Scheme(8)]
        ratios = [self.statistics.grids[t.name][left] for t in self._shared]
        ratio = float(np.mean(ratios))
        # narrow = direct + routed, wide = ratio direct + sqrt(ratio) routed
        routed = (wide - ratio * narrow) / (np.sqrt(ratio) - ratio) if ratio < 1 else 0.0
        wanted = float(np.clip(routed / narrow if narrow else 0.0, *_SHARES))
        low, high = 0.0, _MOST
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._routed_share(middle) < wanted:
                low = middle
            else:
                high = middle
        return high

    @cached_property
    def _direct(self) -> dict[str, float]:
        return self._evened(self._direct_at(self._routing))

    def _evened(self, direct: dict[str, float]) -> dict[str, float]:
        """The same, an error in gate and up against one in down costing alike in all layers.

        What a layer's experts cost together is measured well, how it divides between the two
        is not: the proportion is that of all layers.
        """
        pairs = {}
        for layer in self.config.moe_layers:
            errors = [self.statistics.parts[f"{layer}.{kind}"].error for kind in _EXPERT_PARTS]
            costs = [direct[f"{layer}.{kind}"] for kind in _EXPERT_PARTS]
            if min(errors) > 0 and min(costs) > 0:
                pairs[layer] = errors, sum(costs), costs[0] / errors[0] * errors[1] / costs[1]
        if not pairs:
            return direct
        proportion = float(np.exp(np.mean([np.log(found) for *_, found in pairs.values()])))
        evened = dict(direct)
        for layer, (errors, total, _) in pairs.items():
            each = total / (proportion * errors[0] + errors[1])
            evened[f"{layer}.inner"] = proportion * errors[0] * each
            evened[f"{layer}.down"] = errors[1] * each
        return evened

    def _direct_at(self, routing: float) -> dict[str, float]:
        """The direct divergence of each part at the measured grid, from the whole one."""
        found = {}
        for part, measured in self.statistics.parts.items():
            if part not in WHOLE:
                slope = routing * self._behind(part)
                root = (np.sqrt(slope**2 + 4 * measured.kld) - slope) / 2
                found[part] = float(root**2)
        return found

    @property
    def _shared(self) -> list[Tensor]:
        tensors = expected_tensors(self.config)
        return [t for t in tensors if t.role in SHARED_ROLES]

    def _routed_share(self, routing: float) -> float:
        """What share of the divergence of all shared weights at 4 bits comes by routing."""
        direct = self._direct_at(routing)
        total = Cost()
        for part in {"head", *map(part_of, self._shared)}:
            total += Cost(direct[part], (routing * self._behind(part)) ** 2 * direct[part])
        return 1 - total.direct / total.kld if total.kld else 0.0
