"""Grids with nothing but a scale for each group, in evenly spaced levels or those of a table.

The search and the refit are those of ``lfmq.quant.line.search``; in torch, sums have another
order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lfmq.quant.grid import F32, Form
from lfmq.quant.line.search import refit_rows, search_rows
from lfmq.quant.line.state import Line, limits_of, nearest_level, table_of
from lfmq.quant.torch_math import divide, half, inverse_of

T = torch.Tensor


class ScaleLine(Line):
    """A grid without offsets.

    Attributes:
        targets: by bits, the levels that are tried for the largest weight of a group, negated.
    """

    def __init__(self, targets: Mapping[int, F32]) -> None:
        self.targets = targets

    def search(self, w: Any, h: F32, form: Form, scale: F32, offset: F32, *target: Any) -> bool:
        """Choose scales and round."""
        (low, high), zero = limits_of(form), np.float32(form.zero_point)
        targets, table = self.targets[form.bits], table_of(form)
        return bool(search_rows(w, h, table, low, high, zero, targets, scale, *target))

    def refit(self, gradient: F32, h: F32, level: F32, form: Form, scale: F32, offset: F32,
              change: F32) -> None:  # fmt: skip
        """Refit scales and levels."""
        refit_rows(gradient, h, level, table_of(form), *limits_of(form), scale, change)

    def search_torch(self, x: T, h: T, form: Form) -> tuple[T, T]:
        """Scales [N] of a group [N, g]."""
        peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
        best, scale = torch.full_like(peak, -1), torch.zeros_like(peak)
        for target in self.targets[form.bits].tolist():
            found, gain = _fit(x, h, divide(torch.full_like(peak, -target), peak), form)
            better = gain > best
            best, scale = torch.where(better, gain, best), torch.where(better, found, scale)
        scale = half(_fit(x, h, inverse_of(scale), form)[0])
        return scale, torch.zeros_like(scale)

    def refit_torch(
        self, gradient: T, h: T, level: T, form: Form, scale: T, offset: T
    ) -> tuple[T, T]:
        """The scales [N] of least loss, where that is less."""
        down, curve = -(level * gradient).sum(1), (level * (level @ h)).sum(1)
        step = half(divide(scale * curve + down, curve)) - scale
        better = step * (step * curve - 2 * down) < 0
        return scale + torch.where(better, step, 0), offset


def _fit(x: T, h: T, inverse: T, form: Form) -> tuple[T, T]:
    """The least-squares scale [N] of the levels an inverse scale gives, and what it gains."""
    q = nearest_level(x * inverse[:, None], form)
    xq, qq = (h * q * x).sum(1), (h * q * q).sum(1)
    scale = divide(xq, qq)
    return scale, scale * xq
