"""GPTQ's two steps on one group of columns, for the symmetric grid (``lfmq.quant.gptq``).

With g the gradient and H the moments of a group of levels q and scale s, a step ds of the scale
changes the loss by ``ds^2 q'Hq + 2 ds q'g``, and a weight's best level is ``q - g / (s H[j, j])``.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.columns import refit_codes, round_columns, spread
from lfmq.quant.grid import GridState, by_rows
from lfmq.quant.simd import (
    LANES,
    half,
    load,
    load_columns,
    ratio,
    splat,
    store,
    store_columns,
    where_above,
)
from lfmq.quant.symmetric.search import TARGETS, search_scale
from lfmq.quant.types import Quantized, Scheme

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)

F32 = NDArray[np.float32]


class SymmetricState(GridState):
    """Levels float32 [G, N, g], the codes less the zero point, and scales float32 [G, N]."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        super().__init__(scheme)
        self._level = np.empty((shape[1] // scheme.group, shape[0], scheme.group), np.float32)
        self._scale = np.empty(self._level.shape[:2], np.float32)
        self._low = np.float32(scheme.lowest_code - scheme.zero_point)
        self._high = np.float32(scheme.highest_code - scheme.zero_point)

    def values(self) -> F32:
        """The weights [N, K] that the levels stand for."""
        return by_rows(self._level * self._scale[..., None])

    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Search and round a group of columns."""
        level, scale, targets = self._level[index], self._scale[index], TARGETS[self.scheme.bits]
        low, high = self._low, self._high
        return bool(_round_group(w, factor, cost, low, high, targets, level, scale, error))

    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit a group of columns."""
        level, scale = self._level[index], self._scale[index]
        _descend_group(gradient, h, self._low, self._high, level, scale, change)

    def finish(self) -> Quantized:
        """The weight."""
        codes = by_rows(self._level + np.float32(self.scheme.zero_point)).astype(np.uint8)
        scale = np.ascontiguousarray(self._scale.T).astype(np.float16)
        return Quantized(codes, scale, self.scheme)


@njit(nogil=True, cache=True, error_model="numpy")
def _round_group(w, u, h, low, high, targets, level, scale, error):  # type: ignore[no-untyped-def] # pragma: no cover
    """Search and round a group [N, g]: fill in levels, scale and the error to spread.

    N is a multiple of 16, u [g, g] the factor of the group, h [g] the importance.
    """
    rows, group = w.shape
    x = np.empty((group, LANES), np.float32)
    e = np.empty((group, LANES), np.float32)
    found = np.empty((1, LANES), np.float32)
    lowest, highest = splat(low), splat(high)
    sound = True
    for row in range(0, rows, LANES):
        for j in range(0, group, 2 * LANES):
            load_columns(w, row, j, x, j)
        s, inverse, finite = search_scale(x, h, lowest, highest, targets)
        sound = finite and sound
        round_columns(x, e, u, 0, group, s, inverse, splat(_ZERO), lowest, highest)
        store(found, 0, s)
        for lane in range(LANES):
            scale[row + lane] = found[0, lane]
        for j in range(0, group, 2 * LANES):
            store_columns(level, row, j, x, j)
            store_columns(error, row, j, e, j)
    return sound


@njit(nogil=True, cache=True, error_model="numpy")
def _descend_group(gradient, h, low, high, level, scale, change):  # type: ignore[no-untyped-def] # pragma: no cover
    """Refit scale and levels of a group [N, g] in place; fill in its weights' change.

    N is a multiple of 16.
    """
    rows, group = gradient.shape
    g = np.empty((group, LANES), np.float32)
    q = np.empty((group, LANES), np.float32)
    d = np.empty((group, LANES), np.float32)
    found = np.empty((1, LANES), np.float32)
    lowest, highest = splat(low), splat(high)
    for row in range(0, rows, LANES):
        for j in range(0, group, 2 * LANES):
            load_columns(gradient, row, j, g, j)
            load_columns(level, row, j, q, j)
        for lane in range(LANES):
            found[0, lane] = scale[row + lane]
        s, step = _refit_scale(g, q, h, load(found, 0))
        spread(g, q, d, h, 0, group, step, splat(_ZERO))
        inverse = ratio(splat(_ONE), s)
        refit_codes(g, q, d, h, 0, group, s, inverse, lowest, highest)
        store(found, 0, s)
        for lane in range(LANES):
            scale[row + lane] = found[0, lane]
        for j in range(0, group, 2 * LANES):
            store_columns(level, row, j, q, j)
            store_columns(change, row, j, d, j)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_scale(g, q, h, s):  # type: ignore[no-untyped-def] # pragma: no cover
    """The float16 scale of least loss, when it lowers that, and its step."""
    down, curve = splat(_ZERO), splat(_ZERO)
    for j in range(0, q.shape[0], 4):  # four sums at a time: each waits for itself only
        a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        for k in range(q.shape[0]):
            level = load(q, k)
            a = a + level * h[j, k]
            b = b + level * h[j + 1, k]
            c = c + level * h[j + 2, k]
            d = d + level * h[j + 3, k]
        for i, hq in enumerate((a, b, c, d)):
            level = load(q, j + i)
            down = down - level * load(g, j + i)
            curve = curve + level * hq
    fitted = half(ratio(s * curve + down, curve))
    step = fitted - s
    change = step * (step * curve - down * _TWO)
    step = where_above(splat(_ZERO), change, step, splat(_ZERO))
    return s + step, step
