"""How far one model's predictions and routing are from another's, position by position.

All logarithms are natural. Shapes: W windows, S tokens a window, P scored positions a window,
T = W * P, H hidden size, V vocabulary, k experts a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

# Bytes of float32 logits of one model held at a time.
_LOGIT_BYTES = 2**27


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model's final hidden states and the head that turns them into logits.

    Attributes:
        hidden: [W, S, H].
        head: [V, H], the tied embedding.
    """

    hidden: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, slots=True)
class PositionScores:
    """One value for each scored position, float64 and bool [W, P].

    Attributes:
        reference_nll: nats, of the token that follows, by the reference.
        nll: the same by the build.
        kld: KL divergence of the build's distribution from the reference's, nats.
        same_top: both give the same most likely token.
    """

    reference_nll: NDArray[np.float64]
    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Agreement of one MoE layer's router with the reference's.

    Attributes:
        layer: index in the model.
        exact_set: share of tokens with the same set of experts.
        jaccard: mean intersection over union of the two sets.
        load_shift: Jensen-Shannon divergence of the expert load distributions, nats.
    """

    layer: int
    exact_set: float
    jaccard: float
    load_shift: float


def scored_positions(sequence: int) -> slice:
    """The second half of a window without its last position, whose next token is unknown."""
    return slice(sequence // 2, sequence - 1)


@torch.inference_mode()
def score_positions(
    reference: Predictor, build: Predictor, ids: NDArray[np.int64]
) -> PositionScores:
    """Score every position of the second half of each window.

    Args:
        reference: what the checkpoint computes.
        build: what a build computes on the same windows.
        ids: [W, S], the windows.
    """
    part = scored_positions(ids.shape[1])
    target = torch.from_numpy(ids[:, part.start + 1 : part.stop + 1].reshape(-1))
    ours, theirs = (p.hidden[:, part].flatten(0, 1) for p in (reference, build))
    step = max(1, _LOGIT_BYTES // (4 * reference.head.shape[0]))
    columns: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    for i in range(0, len(target), step):
        rows = slice(i, i + step)
        p = _log_probabilities(ours[rows], reference.head)
        q = _log_probabilities(theirs[rows], build.head)
        wanted = target[rows, None].to(p.device)
        columns[0].append(-p.gather(1, wanted)[:, 0])
        columns[1].append(-q.gather(1, wanted)[:, 0])
        columns[3].append(p.argmax(1) == q.argmax(1))
        columns[2].append((p.exp() * p.sub_(q)).sum(1))
    shape = (ids.shape[0], part.stop - part.start)
    values = [torch.cat(c).cpu().numpy().reshape(shape) for c in columns]
    reference_nll, nll, kld = (v.astype(np.float64) for v in values[:3])
    return PositionScores(reference_nll, nll, kld, values[3])


def _log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(F.linear(hidden, head).float(), dim=-1)


def compare_routing(
    layer: int, reference: torch.Tensor, build: torch.Tensor, num_experts: int
) -> LayerRouting:
    """Agreement of two selections [T, k] of the same tokens."""
    k = reference.shape[1]
    shared = (reference[:, :, None] == build[:, None, :]).any(-1).sum(-1).double()  # [T]
    return LayerRouting(
        layer,
        exact_set=float((shared == k).double().mean()),
        jaccard=float((shared / (2 * k - shared)).mean()),
        load_shift=jensen_shannon(_load(reference, num_experts), _load(build, num_experts)),
    )


def _load(selected: torch.Tensor, num_experts: int) -> NDArray[np.float64]:
    counts = torch.bincount(selected.flatten(), minlength=num_experts)
    return counts.double().cpu().numpy() / selected.numel()


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two distributions, nats (Lin 1991, equal weights)."""
    middle = (p + q) / 2

    def divergence(a: NDArray[np.float64]) -> float:
        seen = a > 0
        return float(np.sum(a[seen] * np.log(a[seen] / middle[seen])))

    return max(0.0, (divergence(p) + divergence(q)) / 2)


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of [W, P] values, by window: positions of one window depend on each other."""
    windows = values.mean(axis=1)
    if len(windows) < 2:
        return float("nan")
    return float(windows.std(ddof=1) / np.sqrt(len(windows)))
