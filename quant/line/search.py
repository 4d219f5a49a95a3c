"""The scale of a group, when that is all a group has, sixteen rows at a time.

For a group ``x`` of one row with importance ``h`` the scale minimizes ``sum h (x - s q)^2`` over
candidates that put the largest weight at level ``-t``; for the levels of a candidate the best real
scale is ``sum h x q / sum h q^2`` (the search of ggml's ``make_qx_quants``, with other candidates
and a second fit, after which the scale is rounded to float16 and the levels are chosen again).

A group runs down a lane (``lfmq.quant.simd``), so that every sum is taken in the group's order
in float32: the same input gives the same codes on every processor. With g the gradient and H the
moments of a group of levels q, a step ds of the scale changes the loss by
``ds^2 q'Hq + 2 ds q'g``.

Scales are float32 [N / 16, n, 16], of n groups.
"""

import numpy as np

from lfmq.quant.columns import to_level
from lfmq.quant.kernels import inlined, inner, kernel
from lfmq.quant.line.kernels import descend, load_group, settle
from lfmq.quant.simd import (
    LANES,
    absolute,
    any_above,
    half,
    load,
    most,
    ratio,
    splat,
    store,
    where_above,
    where_within,
)

_LARGEST = np.float32(65504)  # largest float16
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@kernel
def search_rows(w, h, levels, low, high, zero, targets, scale, u, out, error):
    """Choose the scales of rows [N, n g] and round; False for a weight float16 lacks.

    The last three are those of ``settle``.
    """
    group, sound = w.shape[1] // scale.shape[1], True
    x = np.empty((group, LANES), np.float32)
    e = np.empty((group, LANES), np.float32)
    lowest, highest, nothing = splat(low), splat(high), splat(_ZERO)
    for row in range(0, w.shape[0], LANES):
        for i in range(scale.shape[1]):
            column = i * group
            load_group(w, row, column, x)
            importance = h[column : column + group]
            s, finite = _search(x, importance, levels, lowest, highest, targets)
            sound = finite and sound
            store(scale[row // LANES], i, s)
            settle(x, e, u, s, nothing, levels, lowest, highest, zero, row, column, out, error)
    return sound


@inlined
def _search(x, h, levels, low, high, targets):
    """The best float16 scale of each lane, and False for a weight float16 lacks."""
    peak, sound = _find_peak(x)
    best, scale = splat(-_ONE), splat(_ZERO)
    for t in range(targets.size):
        xq, qq = _fit(x, h, ratio(splat(-targets[t]), peak), levels, low, high)
        fitted = ratio(xq, qq)
        gain = fitted * xq
        scale = where_above(gain, best, fitted, scale)
        best = where_above(gain, best, gain, best)
    xq, qq = _fit(x, h, ratio(splat(_ONE), scale), levels, low, high)
    return half(ratio(xq, qq)), sound


@inlined
def _find_peak(x):
    """The largest weight of each lane with its sign; False when one is no finite float16."""
    peak, size, outside = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for j in range(x.shape[0]):
        value = load(x, j)
        distance = absolute(value)
        peak = where_above(distance, size, value, peak)
        size = most(distance, size)
        outside = where_within(distance, splat(_LARGEST), outside, splat(_ONE))
    return peak, not any_above(outside, splat(_ZERO))


@inlined
def _fit(x, h, inverse, levels, low, high):
    """Sums h x q and h q q of the levels q that an inverse scale gives."""
    xq, qq = splat(_ZERO), splat(_ZERO)
    for j in range(x.shape[0]):
        value = load(x, j)
        q = to_level(value * inverse, levels, low, high)
        hq = q * h[j]
        xq = xq + hq * value
        qq = qq + hq * q
    return xq, qq


@kernel
def refit_rows(gradient, h, level, levels, low, high, scale, change):
    """Refit scales and levels of a group [N, g]; fill in the change of its weights."""
    g = np.empty((gradient.shape[1], LANES), np.float32)
    q = np.empty((gradient.shape[1], LANES), np.float32)
    d = np.empty((gradient.shape[1], LANES), np.float32)
    lowest, highest, nothing = splat(low), splat(high), splat(_ZERO)
    for row in range(0, gradient.shape[0], LANES):
        load_group(gradient, row, 0, g)
        load_group(level, row, 0, q)
        s, step = _refit(g, q, h, load(scale[row // LANES], 0))
        store(scale[row // LANES], 0, s)
        descend(g, q, d, h, s, step, nothing, levels, lowest, highest, row, level, change)


@inner
def _refit(g, q, h, s):
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
