"""One expert quantized from the tokens routed to it.

T tokens of the layer, n of them routed to the expert, H hidden size, I inner size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.model.blocks import Block
from lfmq.converter.model.forward import ReadWeight, Routing
from lfmq.converter.model.inner import apply_inner
from lfmq.converter.quantize.settings import QUOTA, ExpertCoverage, Settings
from lfmq.formats.plan import ModelConfig
from lfmq.quant import gptq, rtn
from lfmq.quant.errors import ValidationError
from lfmq.quant.linalg import regression, ridge_factor, second_moments
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

QuantizeWeight = Callable[[str, NDArray[np.float32], gptq.FactorizedHessian], Weight]

# Every eighth row of a weight is judged for the report.
_JUDGED = 8
# Tokens that stand for the layer when moments are pooled through an expert, and at most how many
# of the layer's.
_POOL_TOKENS, _POOL_SHARE = 2048, 8


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a layer's experts share.

    Attributes:
        config: the model's facts.
        block: that sends tokens to them.
        x: [T, H], normed hidden states of the quantized stream.
        wanted: [T, H], those of the reference.
        routing: of the quantized stream.
        target: of the reference.
        pooled: [H, H], mean second moments of a token of ``x``.
        settings: what calibration does.
    """

    config: ModelConfig
    block: Block
    x: torch.Tensor
    wanted: torch.Tensor
    routing: Routing
    target: Routing
    pooled: torch.Tensor
    settings: Settings

    def inner(self, x: torch.Tensor, readers: Sequence[torch.Tensor]) -> torch.Tensor:
        """What an expert with these weights [I, H] makes of tokens [n, H] for its last, [n, I]."""
        return apply_inner(self.block.inner, self.config, [F.linear(x, w) for w in readers])


@dataclass(frozen=True, slots=True)
class FinishedExpert:
    """A quantized expert and its share of the layer's output in both streams.

    Attributes:
        weights: by checkpoint name.
        token: [n], the tokens of the quantized stream routed to it.
        y: [n, H], what it adds to them.
        token_wanted: the same in the reference's stream.
        y_wanted: what the reference's expert adds to those.
        coverage: for the report.
    """

    weights: dict[str, Weight]
    token: torch.Tensor
    y: torch.Tensor
    token_wanted: torch.Tensor
    y_wanted: torch.Tensor
    coverage: ExpertCoverage


def quantize_expert(
    inputs: LayerInputs, expert: int, read: ReadWeight, quantize: QuantizeWeight
) -> FinishedExpert:
    """Quantize what reads the expert's tokens, then what writes for what these make of them.

    Args:
        inputs: of the expert's layer.
        expert: its number.
        read: gives a weight of the checkpoint as float32, by name.
        quantize: rounds a weight for the moments of its inputs.
    """
    branch = inputs.block.branches[expert]
    *readers, writer = (
        torch.from_numpy(np.array(read(name))).to(inputs.x.device) for name in branch.weights
    )
    token, affinity = inputs.routing.tokens_of(expert)
    token_wanted, affinity_wanted = inputs.target.tokens_of(expert)
    # nearly all tokens of one stream are the other's too: what the reference makes of both at once
    both = torch.cat((token, token_wanted)).unique()
    ideal = inputs.wanted[both]
    ideal_inner = inputs.inner(ideal, readers)
    own = torch.searchsorted(both, token)
    fit = _Fit(inputs, expert, affinity, quantize)
    seen = inputs.x[token]
    fit.prepare(seen, ideal[own], lambda: inputs.pooled)
    found = [fit.quantize(n, w) for n, w in zip(branch.readers, readers, strict=True)]
    inner = inputs.inner(seen, found)

    def pooled() -> torch.Tensor:
        stride = max(_POOL_SHARE, len(inputs.x) // _POOL_TOKENS)
        sample = inputs.inner(inputs.x[::stride], found)
        return second_moments(sample).div_(len(sample))

    fit.prepare(inner, ideal_inner[own], pooled)
    y = F.linear(inner, fit.quantize(branch.writer, writer)) * affinity[:, None]
    y_wanted = F.linear(ideal_inner[torch.searchsorted(both, token_wanted)], writer)
    return FinishedExpert(
        fit.weights,
        token,
        y,
        token_wanted,
        y_wanted * affinity_wanted[:, None],
        fit.coverage(inputs.block.layer, expert),
    )


def check_moments(moments: torch.Tensor, what: str) -> None:
    """Refuse inputs that are not finite before anything is fitted to them.

    Raises:
        ValidationError: names ``what``.
    """
    if not torch.isfinite(moments).all():
        raise ValidationError(
            f"{what} are not finite on the calibration text; the weights before are damaged or "
            "overflow"
        )


class _Fit:
    """Quantizes an expert's weights one input after another and sums up how well it went."""

    def __init__(
        self,
        inputs: LayerInputs,
        expert: int,
        affinity: torch.Tensor,
        quantize: QuantizeWeight,
    ) -> None:
        self._where = f"the inputs of layer {inputs.block.layer}, expert {expert}"
        self._damping = inputs.settings.damping
        self._ridge = inputs.settings.expert_ridge
        self._tokens = len(affinity)
        self._quota = QUOTA * inputs.x.shape[1]
        self._quantize = quantize
        self._affinity = torch.ones_like(affinity)
        self._mean = 1.0
        if inputs.settings.affinity:
            self._affinity, self._mean = affinity, float(inputs.routing.affinity.mean())
        self._nearest: list[float] = []
        self._ours: list[float] = []
        self.weights: dict[str, Weight] = {}

    def prepare(
        self, seen: torch.Tensor, ideal: torch.Tensor, pooled: Callable[[], torch.Tensor]
    ) -> None:
        """Moments of the inputs [n, K] to come; ``pooled`` gives the layer's [K, K]."""
        h = second_moments(seen * self._affinity.sqrt()[:, None])
        missing = max(0.0, 1 - self._tokens / self._quota)
        if missing:
            h += (missing * self._quota * self._mean) * pooled()
        check_moments(h, self._where)
        self._moments = gptq.factorize(h, self._damping)
        self._step: torch.Tensor | None = None
        factor = None if self._ridge is None else ridge_factor(h, self._ridge)
        if factor is not None:
            weighted = seen * self._affinity[:, None]
            self._step = regression(factor, (ideal - seen).T @ weighted)

    def quantize(self, name: str, w: torch.Tensor) -> torch.Tensor:
        """The quantized weight's values [N, K]."""
        stepped = w if self._step is None else w + w @ self._step
        weight = self._quantize(name, stepped.cpu().numpy(), self._moments)
        self.weights[name] = weight
        if not isinstance(weight, Quantized):
            return torch.from_numpy(weight).to(w.device)
        values = torch.from_numpy(dequantize(weight)).to(w.device)
        self._judge(w[::_JUDGED], values[::_JUDGED], weight.scheme)
        return values

    def _judge(self, w: torch.Tensor, values: torch.Tensor, scheme: Scheme) -> None:
        """Note the relative output error of some rows, and what rounding to nearest makes."""
        h = self._moments.damped
        total = _loss(w, h)
        if total > 0:
            nearest = torch.from_numpy(dequantize(rtn.quantize(w.cpu().numpy(), scheme)))
            self._ours.append(_loss(values - w, h) / total)
            self._nearest.append(_loss(nearest.to(w.device) - w, h) / total)

    def coverage(self, layer: int, expert: int) -> ExpertCoverage:
        """Tokens, rule, and mean relative errors of the three weights."""
        enough = self._tokens >= self._quota
        rule = "own" if enough else "shrunk" if self._tokens else "pooled"
        errors = (float(np.mean(e)) if e else 0.0 for e in (self._nearest, self._ours))
        return ExpertCoverage(layer, expert, self._tokens, self._quota, rule, *errors)


def _loss(difference: torch.Tensor, h: torch.Tensor) -> float:
    return float(((difference @ h) * difference).sum())
