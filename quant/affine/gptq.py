"""GPTQ's two steps on one group of columns, for the grids with an offset.

As in ``lfmq.quant.gptq``, with weights ``w = s q + b`` for codes q: the group's scale and offset
are searched from the compensated weights, and a sweep of coordinate descent gives scale and
offset, then each code, the value of least loss. With g the gradient and H the moments of a group,
a step (ds, db) changes the loss by ``ds^2 q'Hq + 2 ds db q'H1 + db^2 1'H1 + 2 (ds q'g + db 1'g)``.
On the asymmetric grid ``b = -s zero``: the scale moves along ``q - zero``, then the zero by whole
codes.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.affine.rtn import stored_offset
from lfmq.quant.affine.search import MOVES, SPANS, search_offset
from lfmq.quant.columns import refit_codes, round_columns, spread
from lfmq.quant.grid import GridState, by_rows
from lfmq.quant.simd import (
    LANES,
    half,
    least,
    load,
    load_columns,
    most,
    nearest,
    ratio,
    splat,
    store,
    store_columns,
    where_above,
    where_within,
)
from lfmq.quant.types import Quantized, Scheme

F32 = NDArray[np.float32]

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LARGEST = np.float32(65504)  # largest float16
# Share of the product of curvatures below which scale and offset have the same effect.
_ALIKE = np.float32(2.0**-16)


class OffsetState(GridState):
    """Codes float32 [G, N, g], scales and offsets or zero points float32 [G, N]."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        super().__init__(scheme)
        self._code = np.empty((shape[1] // scheme.group, shape[0], scheme.group), np.float32)
        self._scale = np.empty(self._code.shape[:2], np.float32)
        self._offset = np.empty_like(self._scale)
        self._affine, self._top = scheme.grid == "affine_bias", np.float32(scheme.highest_code)

    def values(self) -> F32:
        """The weights [N, K] that the codes stand for."""
        groups = self._code * self._scale[..., None]
        if self._affine:
            groups += self._offset[..., None]
        else:
            groups -= (self._scale * self._offset)[..., None]
        return by_rows(groups)

    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Search and round a group of columns."""
        code, scale, offset = self._code[index], self._scale[index], self._offset[index]
        affine, top, key = self._affine, self._top, (self.scheme.grid, self.scheme.bits)
        spans, moves = SPANS[key], MOVES[key]
        return bool(
            _round_group(w, factor, cost, affine, top, spans, moves, code, scale, offset, error)
        )

    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit a group of columns."""
        code, scale, offset = self._code[index], self._scale[index], self._offset[index]
        _descend_group(gradient, h, self._affine, self._top, code, scale, offset, change)

    def finish(self) -> Quantized:
        """The weight."""
        codes = by_rows(self._code).astype(np.uint8)
        scale, offset = (np.ascontiguousarray(a.T) for a in (self._scale, self._offset))
        stored = stored_offset(offset, self.scheme)
        return Quantized(codes, scale.astype(np.float16), self.scheme, stored)


@njit(nogil=True, cache=True, error_model="numpy")
def _round_group(w, u, h, affine, top, spans, moves, level, scale, offset, error):  # type: ignore[no-untyped-def] # pragma: no cover
    """Search and round a group [N, g]: fill in codes, scale, offset and the error to spread.

    N is a multiple of 16, as in the next.
    """
    rows, group = w.shape
    x = np.empty((group, LANES), np.float32)
    e = np.empty((group, LANES), np.float32)
    found = np.empty((2, LANES), np.float32)
    lowest, highest = splat(_ZERO), splat(top)
    sound = True
    for row in range(0, rows, LANES):
        for j in range(0, group, 2 * LANES):
            load_columns(w, row, j, x, j)
        s, inverse, b, zero, finite = search_offset(x, h, affine, top, spans, moves)
        sound = finite and sound
        round_columns(x, e, u, 0, group, s, inverse, b, lowest, highest)
        store(found, 0, s)
        store(found, 1, b if affine else zero)
        for lane in range(LANES):
            scale[row + lane], offset[row + lane] = found[0, lane], found[1, lane]
        for j in range(0, group, 2 * LANES):
            store_columns(level, row, j, x, j)
            store_columns(error, row, j, e, j)
    return sound


@njit(nogil=True, cache=True, error_model="numpy")
def _descend_group(gradient, h, affine, top, level, scale, offset, change):  # type: ignore[no-untyped-def] # pragma: no cover
    """Refit scale, offset and codes of a group [N, g] in place; fill in its weights' change."""
    rows, group = gradient.shape
    g = np.empty((group, LANES), np.float32)
    q = np.empty((group, LANES), np.float32)
    d = np.empty((group, LANES), np.float32)
    found = np.empty((2, LANES), np.float32)
    lowest, highest = splat(_ZERO), splat(top)
    for row in range(0, rows, LANES):
        for j in range(0, group, 2 * LANES):
            load_columns(gradient, row, j, g, j)
            load_columns(level, row, j, q, j)
        for lane in range(LANES):
            found[0, lane], found[1, lane] = scale[row + lane], offset[row + lane]
        s, o = load(found, 0), load(found, 1)
        zero = splat(_ZERO) if affine else o
        sums = _measure(g, q, h, zero)
        if affine:
            s, o, along, up = _refit_affine(s, o, sums)
        else:
            s, o, along, up = _refit_zero(s, o, top, zero, sums)
        spread(g, q, d, h, 0, group, along, up)
        inverse = ratio(splat(_ONE), s)
        refit_codes(g, q, d, h, 0, group, s, inverse, lowest, highest)
        store(found, 0, s)
        store(found, 1, o)
        for lane in range(LANES):
            scale[row + lane], offset[row + lane] = found[0, lane], found[1, lane]
        for j in range(0, group, 2 * LANES):
            store_columns(level, row, j, q, j)
            store_columns(change, row, j, d, j)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _measure(g, q, h, zero):  # type: ignore[no-untyped-def] # pragma: no cover
    """Slopes -p'g and -1'g and curvatures p'Hp, p'H1 and 1'H1 of p = q - zero."""
    down_p, down_1, pp, p1, ones = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO), _ZERO
    for j in range(0, q.shape[0], 4):  # four sums at a time: each waits for itself only
        a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        for k in range(q.shape[0]):
            p = load(q, k) - zero
            a = a + p * h[j, k]
            b = b + p * h[j + 1, k]
            c = c + p * h[j + 2, k]
            d = d + p * h[j + 3, k]
            ones += (h[j, k] + h[j + 1, k]) + (h[j + 2, k] + h[j + 3, k])
        for i, hp in enumerate((a, b, c, d)):
            p, slope = load(q, j + i) - zero, load(g, j + i)
            down_p = down_p - p * slope
            down_1 = down_1 - slope
            pp = pp + p * hp
            p1 = p1 + hp
    return down_p, down_1, pp, p1, splat(ones)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_affine(s, o, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    """Scale and offset moved to float16 values of less loss; their steps along q and 1."""
    down_s, down_o, ss, so, oo = sums
    nothing = splat(_ZERO)
    product = ss * oo
    rest = product - so * so
    step = (oo * down_s - so * down_o) / rest
    step = where_above(rest, product * _ALIKE, step, nothing)
    ds = half(where_above(s + step, nothing, s + step, s)) - s
    slope = down_o - so * ds
    real = o + where_above(oo, nothing, slope / oo, nothing)
    do = half(least(most(real, splat(-_LARGEST)), splat(_LARGEST))) - o
    loss = ds * (ds * ss - down_s * _TWO) + do * (do * oo + (ds * so - down_o) * _TWO)
    loss = where_within(s + ds, splat(_LARGEST), loss, nothing)
    ds = where_above(nothing, loss, ds, nothing)
    do = where_above(nothing, loss, do, nothing)
    return s + ds, o + do, ds, do


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_zero(s, o, top, zero, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    """The scale moved, then the zero by whole codes; their steps along q and 1."""
    down_s, down_o, ss, so, oo = sums
    nothing = splat(_ZERO)
    real = s + where_above(ss, nothing, down_s / ss, nothing)
    fitted = half(least(most(real, nothing), splat(_LARGEST)))
    ds = fitted - s
    loss = ds * (ds * ss - down_s * _TWO)
    ds = where_above(fitted, nothing, where_above(nothing, loss, ds, nothing), nothing)
    new_s = s + ds
    curve = oo * new_s
    slope = down_o - so * ds
    move = where_above(curve, nothing, -slope / curve, nothing)
    new_o = nearest(o + move, nothing, splat(top))
    # p = q - zero moves by ds p, then by -s times the zero's step
    return new_s, new_o, ds, -ds * zero - new_s * (new_o - o)
