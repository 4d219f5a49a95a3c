"""How often a build's routers choose the reference's experts.

W windows, P scored positions a window, k experts a token, E experts of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Gaps between the last chosen and the first rejected score, bounds of the bins: decades.
_MARGIN_EDGES = (0.0, *(10.0**n for n in range(-6, 2)))


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts each MoE layer chose for the scored positions.

    Attributes:
        selected: int64 [W, P, k] by layer, in any order.
        margin: float32 [W, P] by layer, score of the last chosen expert minus that of the first
            rejected; empty where a runtime does not say.
    """

    selected: Mapping[int, NDArray[np.int64]]
    margin: Mapping[int, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Agreement of one MoE layer's router with the reference's.

    Attributes:
        layer: index in the model.
        exact_set: share of tokens with the same set of experts.
        jaccard: mean intersection over union of the two sets.
        load_shift: Jensen-Shannon divergence of the expert load distributions, nats.
        load: share of the build's choices that fell on each expert, [E].
        reference_load: the same of the reference.
        experts: of the tokens the reference sent to each expert, the share the build sent there
            too, [E]; not a number where it sent none.
        local_exact_set: ``exact_set`` with the reference's hidden states as the router's input.
    """

    layer: int
    exact_set: float
    jaccard: float
    load_shift: float
    load: tuple[float, ...] = ()
    reference_load: tuple[float, ...] = ()
    experts: tuple[float, ...] = ()
    local_exact_set: float | None = None


@dataclass(frozen=True, slots=True)
class MarginBin:
    """Agreement where the reference's gap between chosen and rejected is in [low, high)."""

    low: float
    high: float
    pairs: int
    exact_set: float


@dataclass(frozen=True, slots=True)
class RoutingAgreement:
    """Routing compared in every MoE layer; the means weigh layers equally."""

    layers: tuple[LayerRouting, ...]
    margins: tuple[MarginBin, ...] = ()

    @property
    def exact_set(self) -> float:
        """Share of (token, layer) pairs with the reference's set of experts."""
        return float(np.mean([r.exact_set for r in self.layers]))

    @property
    def jaccard(self) -> float:
        """Mean intersection over union of the two sets."""
        return float(np.mean([r.jaccard for r in self.layers]))

    @property
    def local_exact_set(self) -> float | None:
        """``exact_set`` of routers that read the reference's hidden states, if measured."""
        found = [r.local_exact_set for r in self.layers if r.local_exact_set is not None]
        return float(np.mean(found)) if found else None


def compare_routing(
    reference: Choices,
    build: Choices,
    num_experts: int,
    local: Mapping[int, float] | None = None,
) -> RoutingAgreement:
    """Agreement of two selections of the same tokens.

    Args:
        reference: with margins.
        build: of the same layers and positions.
        num_experts: E.
        local: each layer's agreement on the reference's hidden states, if it was measured.
    """
    layers = tuple(
        _compare_layer(layer, chosen, build.selected[layer], num_experts, (local or {}).get(layer))
        for layer, chosen in reference.selected.items()
    )
    return RoutingAgreement(layers, _split_margins(reference, build))


def shared_experts(reference: NDArray[np.int64], build: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many experts two selections [..., k] have in common, [...]."""
    same = reference[..., :, None] == build[..., None, :]
    count: NDArray[np.int64] = same.any(-1).sum(-1)
    return count


def same_sets(reference: Choices, build: Choices, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Share of layers that chose the reference's set, at each position, ``shape`` [W, P]."""
    total = np.zeros(shape)
    for layer, chosen in reference.selected.items():
        total += shared_experts(chosen, build.selected[layer]) == chosen.shape[-1]
    return total / len(reference.selected)


def _compare_layer(
    layer: int,
    reference: NDArray[np.int64],
    build: NDArray[np.int64],
    num_experts: int,
    local: float | None,
) -> LayerRouting:
    k = reference.shape[-1]
    shared = shared_experts(reference, build)
    wanted, found = _load(reference, num_experts), _load(build, num_experts)
    return LayerRouting(
        layer,
        exact_set=float((shared == k).mean()),
        jaccard=float((shared / (2 * k - shared)).mean()),
        load_shift=jensen_shannon(wanted, found),
        load=tuple(found.tolist()),
        reference_load=tuple(wanted.tolist()),
        experts=_expert_agreement(reference, build, num_experts),
        local_exact_set=local,
    )


def _load(selected: NDArray[np.int64], num_experts: int) -> NDArray[np.float64]:
    return np.bincount(selected.reshape(-1), minlength=num_experts) / selected.size


def _expert_agreement(
    reference: NDArray[np.int64], build: NDArray[np.int64], num_experts: int
) -> tuple[float, ...]:
    kept = (reference[..., :, None] == build[..., None, :]).any(-1)
    tokens = np.bincount(reference.reshape(-1), minlength=num_experts)
    same = np.bincount(reference[kept], minlength=num_experts)
    share = np.divide(same, tokens, out=np.full(num_experts, np.nan), where=tokens > 0)
    return tuple(share.tolist())


def _split_margins(reference: Choices, build: Choices) -> tuple[MarginBin, ...]:
    """Agreement by decade of the reference's margin; bins nothing fell in are left out."""
    count = len(_MARGIN_EDGES) - 1
    pairs, same = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for layer, margin in reference.margin.items():
        chosen = reference.selected[layer]
        equal = shared_experts(chosen, build.selected[layer]) == chosen.shape[-1]
        place = np.clip(np.searchsorted(_MARGIN_EDGES, margin, side="right") - 1, 0, count - 1)
        pairs += np.bincount(place.reshape(-1), minlength=count)
        same += np.bincount(place[equal], minlength=count)
    return tuple(
        MarginBin(_MARGIN_EDGES[i], _MARGIN_EDGES[i + 1], int(pairs[i]), float(same[i] / pairs[i]))
        for i in range(count)
        if pairs[i]
    )


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two distributions, nats (Lin 1991, equal weights)."""
    middle = (p + q) / 2

    def divergence(a: NDArray[np.float64]) -> float:
        seen = a > 0
        return float(np.sum(a[seen] * np.log(a[seen] / middle[seen])))

    return max(0.0, (divergence(p) + divergence(q)) / 2)
