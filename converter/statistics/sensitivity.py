"""Weights rounded for a look at what they cost: at 4 bits, and the error of other grids."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.workers import Workers
from lfmq.converter.model.forward import Model, ReadWeight
from lfmq.converter.quantize.experts import FinishedExpert, LayerInputs
from lfmq.converter.quantize.rtn import not_finite
from lfmq.converter.statistics.input_stats import StatsByName, importance_of, moments_of
from lfmq.converter.statistics.statistics import MEASURED, SCHEMES
from lfmq.quant import gptq, rtn
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

# Rows of a weight that tell its error on every grid.
_ROWS = 64
# Positions whose predictions are compared at once.
_HEAD_TOKENS = 512


def grid_errors(
    w: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> tuple[float, ...]:
    """Squared error of rounding some rows of [N, K] to each of ``SCHEMES``, over ``MEASURED``'s.

    Raises:
        ValueError: a weight is NaN, Inf or beyond float16.
    """
    rows = np.ascontiguousarray(w[:: max(1, len(w) // _ROWS)])
    h = np.ones(w.shape[1], np.float32) if importance is None else importance

    def error(scheme: Scheme) -> float:
        if w.shape[1] % scheme.span:
            return float("inf")
        change = dequantize(rtn.quantize(rows, scheme, importance)) - rows
        return float((np.square(change, dtype=np.float64) * h).sum())

    least = error(MEASURED)
    return tuple(error(scheme) / least if least else 0.0 for scheme in SCHEMES)


def round_narrow(
    checkpoint: Checkpoint, name: str, w: NDArray[np.float32], moments: gptq.FactorizedHessian
) -> Quantized:
    """GPTQ at ``MEASURED``.

    Args:
        checkpoint: named in the error.
        name: of the weight.
        w: float32 [N, K].
        moments: of its inputs.

    Raises:
        CheckpointError: the weight is not finite.
    """
    try:
        return gptq.quantize(np.ascontiguousarray(w), moments, MEASURED)
    except ValueError as error:
        raise not_finite(checkpoint, name, "float16") from error


@dataclass(frozen=True, slots=True)
class MeasuredExpert:
    """What was found of an expert with n tokens.

    Attributes:
        moments: of the inputs of its weights.
        losses: squared error of the layer's output with one weight rounded, by its name.
        grids: :func:`grid_errors`, by the name of a weight.
        inner: [n, H], changes of its tokens' outputs by rounded gate and up.
        down: the same by rounded down.
    """

    moments: StatsByName
    losses: dict[str, float]
    grids: dict[str, tuple[float, ...]]
    inner: torch.Tensor
    down: torch.Tensor


def measure_expert(
    model: Model, inputs: LayerInputs, expert: int, found: FinishedExpert
) -> MeasuredExpert:
    """Moments, losses and errors of one expert's weights.

    Args:
        model: the reference.
        inputs: of its layer.
        expert: its number.
        found: it at ``MEASURED``.
    """
    branch = inputs.block.branches[expert]
    weights = {name: model.weight(name) for name in branch.weights}
    *readers, w_out = weights.values()
    token, affinity = inputs.routing.tokens_of(expert)
    x = inputs.x[token]
    inner = inputs.inner(x, readers)
    seen = moments_of(x, affinity)
    moments = dict.fromkeys(branch.readers, seen) | {branch.writer: moments_of(inner, affinity)}
    changes, change_in = {}, torch.zeros_like(x)
    for place, name in enumerate(branch.readers):
        rounded = list(readers)
        rounded[place] = _values(found.weights[name], w_out)
        changes[name] = F.linear(inputs.inner(x, rounded) - inner, w_out) * affinity[:, None]
        change_in += changes[name]
    change = _values(found.weights[branch.writer], w_out) - w_out
    changes[branch.writer] = F.linear(inner, change) * affinity[:, None]
    return MeasuredExpert(
        moments,
        {name: float(change.double().square().sum()) for name, change in changes.items()},
        {
            name: grid_errors(w.cpu().numpy(), importance_of(moments[name]))
            for name, w in weights.items()
        },
        change_in,
        changes[branch.writer],
    )


def _values(weight: Weight, like: torch.Tensor) -> torch.Tensor:
    assert isinstance(weight, Quantized)
    return torch.from_numpy(dequantize(weight)).to(like.device)


def overridden(model: Model, weights: Mapping[str, NDArray[np.float32]]) -> Model:
    """The model with some weights replaced."""
    read: ReadWeight = model.read
    return Model(
        model.config,
        lambda name: weights[name] if name in weights else read(name),
        model.dtype,
        model.device,
    )


def mean_divergences(
    workers: Workers,
    wanted: torch.Tensor,
    head: torch.Tensor,
    states: Mapping[str, torch.Tensor],
    own: torch.Tensor,
) -> dict[str, float]:
    """Mean KL divergence of predictions, nats.

    Args:
        workers: do the work.
        wanted: [T, H], final hidden states of the reference.
        head: [V, H], of the reference.
        states: [T, H] of each stream by name.
        own: [V, H], the head of the streams.
    """
    parts = [slice(i, i + _HEAD_TOKENS) for i in range(0, len(wanted), _HEAD_TOKENS)]

    def divergences(part: slice) -> list[float]:
        expected = F.log_softmax(F.linear(wanted[part], head), -1)
        sums = []
        for stream in states.values():
            found = F.log_softmax(F.linear(stream[part], own), -1)
            sums.append(
                float(F.kl_div(found, expected, log_target=True, reduction="sum").double())
            )
        return sums

    total = np.sum(list(workers.map(divergences, parts)), axis=0) / len(wanted)
    return {name: max(0.0, float(kld)) for name, kld in zip(states, total, strict=True)}
