"""What a forward pass shows of the inputs of weights.

n tokens, K inputs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant import gptq
from lfmq.quant.errors import ValidationError
from lfmq.quant.linalg import second_moments
from lfmq.quant.types import InputStats

# By the name of the weight.
StatsByName = dict[str, InputStats]


def moments_of(x: torch.Tensor, affinity: torch.Tensor | None = None) -> InputStats:
    """Moments of the inputs [n, K], each token counting with its affinity [n]."""
    squares = x.double().square()
    if affinity is None:
        return InputStats(len(x), float(len(x)), squares.sum(0).cpu().numpy())
    mass = affinity.double()
    return InputStats(len(x), float(mass.sum()), (mass @ squares).cpu().numpy())


def add_moments(into: StatsByName, name: str, found: InputStats) -> None:
    """Those of more tokens."""
    into[name] = into[name] + found if name in into else found


def importance_of(seen: InputStats | None) -> NDArray[np.float32] | None:
    """What an error in each column costs, [K]; None where nothing was seen."""
    return seen.mean.astype(np.float32) if seen is not None and seen.sums.any() else None


@dataclass
class InputsSeen:
    """Inputs of the weights of one part, as a forward pass shows them; what GPTQ needs of them."""

    moments: dict[str, torch.Tensor]

    def observe(self, names: tuple[str, ...], x: torch.Tensor, _: torch.Tensor | None) -> None:
        """For a forward pass."""
        found = second_moments(x)
        for name in names:
            self.moments[name] = found if name not in self.moments else self.moments[name] + found

    def factorized(self, damping: float) -> dict[str, gptq.FactorizedHessian]:
        """Ready for GPTQ; weights with the same inputs share them.

        Raises:
            ValidationError: an input is not finite.
        """
        ready: dict[int, gptq.FactorizedHessian] = {}
        for name, found in self.moments.items():
            if id(found) in ready:
                continue
            if not torch.isfinite(found).all():
                raise ValidationError(f"the inputs of {name} are not finite on the text")
            ready[id(found)] = gptq.factorize(found, damping)
        return {name: ready[id(found)] for name, found in self.moments.items()}
