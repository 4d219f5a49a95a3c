"""Scale and offset of a group that lower GPTQ's loss, for the grids with an offset.

With weights ``w = s q + b`` for codes q, g the gradient and H the moments of a group, a step
(ds, db) changes the loss by ``ds^2 q'Hq + 2 ds db q'H1 + db^2 1'H1 + 2 (ds q'g + db 1'g)``. With
``affine_zero_point`` ``b = -s zero``: the scale moves along ``q - zero``, then the zero by whole
codes.
"""

import numpy as np

from lfmq.quant.kernels import inner, kernel
from lfmq.quant.line.kernels import descend, load_group
from lfmq.quant.simd import (
    LANES,
    half,
    least,
    load,
    most,
    nearest,
    splat,
    store,
    where_above,
    where_within,
)

_ZERO, _TWO = np.float32(0), np.float32(2)
_LARGEST = np.float32(65504)  # largest float16
# Share of the product of curvatures below which scale and offset have the same effect.
_ALIKE = np.float32(2.0**-16)


@kernel
def refit_rows(gradient, h, level, bias, top, scale, offset, change):
    """Refit scales, offsets and codes of a group [N, g]; fill in the change of its weights."""
    g = np.empty((gradient.shape[1], LANES), np.float32)
    q = np.empty((gradient.shape[1], LANES), np.float32)
    d = np.empty((gradient.shape[1], LANES), np.float32)
    lowest, highest = splat(_ZERO), splat(top)
    for row in range(0, gradient.shape[0], LANES):
        load_group(gradient, row, 0, g)
        load_group(level, row, 0, q)
        block = row // LANES
        s, o = load(scale[block], 0), load(offset[block], 0)
        zero = lowest if bias else o
        sums = _measure(g, q, h, zero)
        if bias:
            s, o, along, up = _refit_bias(s, o, sums)
        else:
            s, o, along, up = _refit_zero(s, o, top, zero, sums)
        store(scale[block], 0, s)
        store(offset[block], 0, o)
        descend(g, q, d, h, s, along, up, None, lowest, highest, row, level, change)


@inner
def _measure(g, q, h, zero):
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


@inner
def _refit_bias(s, o, sums):
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


@inner
def _refit_zero(s, o, top, zero, sums):
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
