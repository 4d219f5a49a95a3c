"""How far one model's predictions are from another's, position by position.

All logarithms are natural. Shapes: W windows, S tokens a window, P scored positions a window,
T = W * P, H hidden size, V vocabulary.
"""

from collections.abc import Iterable
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

    @property
    def delta_p(self) -> NDArray[np.float64]:
        """Probability of the token that follows, the build's less the reference's, [W, P]."""
        found: NDArray[np.float64] = np.exp(-self.nll) - np.exp(-self.reference_nll)
        return found


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
    ours, theirs = (p.hidden[:, part].flatten(0, 1) for p in (reference, build))
    target = _next_tokens(ids)
    columns = _Columns()
    for rows in _blocks(len(target), reference.head):
        q = F.linear(theirs[rows], build.head)
        columns.add(F.linear(ours[rows], reference.head), q, target[rows])
    return columns.scores(ids)


@torch.inference_mode()
def score_logits(
    reference: Predictor, logits: Iterable[NDArray[np.float32]], ids: NDArray[np.int64]
) -> PositionScores:
    """The same for a build whose logits [P, V] come window by window; one window is held.

    Args:
        reference: what the checkpoint computes.
        logits: of the scored positions of each window, in order.
        ids: [W, S], the windows.
    """
    part = scored_positions(ids.shape[1])
    target = _next_tokens(ids).view(len(ids), -1)
    columns = _Columns()
    for window, found in enumerate(logits):
        hidden = reference.hidden[window, part]
        for rows in _blocks(len(hidden), reference.head):
            q = torch.from_numpy(found[rows]).to(hidden.device)
            columns.add(F.linear(hidden[rows], reference.head), q, target[window, rows])
    return columns.scores(ids)


class _Columns:
    """Values of positions, a block of rows at a time."""

    def __init__(self) -> None:
        self._columns: tuple[list[torch.Tensor], ...] = ([], [], [], [])

    def add(self, reference: torch.Tensor, build: torch.Tensor, target: torch.Tensor) -> None:
        """Take logits [n, V] of both and the tokens [n] that follow."""
        p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (reference, build))
        wanted = target[:, None].to(p.device)
        same = p.argmax(1) == q.argmax(1)
        nll = [-x.gather(1, wanted)[:, 0] for x in (p, q)]
        kld = (p.exp() * p.sub_(q)).sum(1)
        for column, values in zip(self._columns, (*nll, kld, same), strict=True):
            column.append(values.cpu())

    def scores(self, ids: NDArray[np.int64]) -> PositionScores:
        values = [torch.cat(c).numpy().reshape(len(ids), -1) for c in self._columns]
        reference_nll, nll, kld = (v.astype(np.float64) for v in values[:3])
        return PositionScores(reference_nll, nll, kld, values[3])


def _next_tokens(ids: NDArray[np.int64]) -> torch.Tensor:
    """What follows each scored position, [T]."""
    part = scored_positions(ids.shape[1])
    return torch.from_numpy(ids[:, part.start + 1 : part.stop + 1].reshape(-1))


def _blocks(rows: int, head: torch.Tensor) -> list[slice]:
    step = max(1, _LOGIT_BYTES // (4 * head.shape[0]))
    return [slice(i, i + step) for i in range(0, rows, step)]
