"""The search for scale and offset of a group, for the grids that have both, a row a SIMD lane.

``affine_bias``: for weights ``x`` with importance ``h`` the real scale s and offset b minimize
``sum h (x - s q - b)^2`` over candidates that let the group's range span t levels and shift the
levels by a share of a step; for the codes of a candidate they are the weighted linear regression
of x on q. The best candidate is fitted once more, the scale is rounded to float16, the offset is
fitted to it and rounded in turn, and the codes are chosen last.

``affine_zero_point``: the offset is an integer code, so that 0 is exact. Candidates are the zero
points next to that of the range with t levels over it; the rest is the symmetric grid's search.

A group runs down a lane of vectors (``lfmq.quant.simd``): every sum is taken in order in
float32, without fused multiply-add.
"""

import numpy as np

from lfmq.quant.kernels import inner, kernel
from lfmq.quant.line.kernels import load_group, settle
from lfmq.quant.simd import (
    LANES,
    absolute,
    any_above,
    half,
    least,
    load,
    most,
    nearest,
    ratio,
    splat,
    store,
    where_above,
    where_within,
)

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_LARGEST = np.float32(65504)  # largest float16
# A range below 2^-25 has steps that float16 rounds to 0, whatever the candidate.
_FLAT = np.float32(2.0**-25)
# Share of sum h p p below which codes are all the same but for rounding.
_SAME = np.float32(2.0**-16)

# How many levels the range of a group spans. On normal and heavy-tailed weights a search of 400
# candidates has at most 2 % less squared error than these with their moves.
SPANS = {
    ("affine_bias", 4): np.array([14.75, 15.75, 16.75, 17.75, 19.0, 20.25], np.float32),
    ("affine_bias", 5): np.array([30.5, 31.5, 32.5, 33.5, 35.0], np.float32),
    ("affine_bias", 6): np.array([62.5, 63.5, 64.5, 65.5, 67.0], np.float32),
    ("affine_bias", 8): np.array([254.5, 255.5, 256.5, 257.5, 258.75, 260.0], np.float32),
    ("affine_zero_point", 4): np.arange(14.5, 22, 0.75, dtype=np.float32),
    ("affine_zero_point", 8): np.arange(254.25, 262, 1, dtype=np.float32),
}
# Where the levels lie: shares of a step of ``affine_bias``, zero points beside the range's.
MOVES = {
    ("affine_bias", 4): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine_bias", 5): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine_bias", 6): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine_bias", 8): np.array([-0.375, -0.125, 0.125, 0.375], np.float32),
    ("affine_zero_point", 4): np.array([-1.0, 0.0, 1.0], np.float32),
    ("affine_zero_point", 8): np.array([0.0], np.float32),
}


@kernel
def search_rows(w, h, bias, top, spans, moves, scale, offset, u, out, error):
    """Choose scales and offsets of rows [N, n g] and round; False for a weight float16 lacks.

    The last three are those of ``settle``.
    """
    group, sound = w.shape[1] // scale.shape[1], True
    x = np.empty((group, LANES), np.float32)
    e = np.empty((group, LANES), np.float32)
    lowest, highest = splat(_ZERO), splat(top)
    for row in range(0, w.shape[0], LANES):
        for i in range(scale.shape[1]):
            column = i * group
            load_group(w, row, column, x)
            importance = h[column : column + group]
            low, high, finite = _find_range(x)
            if bias:
                s, o = _search_bias(x, importance, low, high, top, spans, moves)
            else:
                s, o = _search_zero(x, importance, low, high, top, spans, moves)
            sound = finite and sound
            store(scale[row // LANES], i, s)
            store(offset[row // LANES], i, o)
            b = o if bias else -(s * o)
            settle(x, e, u, s, b, None, lowest, highest, _ZERO, row, column, out, error)
    return sound


@inner
def _find_range(x):
    low, high, outside = load(x, 0), load(x, 0), splat(_ZERO)
    for j in range(x.shape[0]):
        value = load(x, j)
        low, high = least(value, low), most(value, high)
        outside = where_within(absolute(value), splat(_LARGEST), outside, splat(_ONE))
    return low, high, not any_above(outside, splat(_ZERO))


@inner
def _width(low, high):
    return where_within(splat(_FLAT), high - low, high - low, splat(_ZERO))


@inner
def _search_bias(x, h, low, high, top, spans, moves):
    zero, one = splat(_ZERO), splat(_ONE)
    centre = splat(top * _HALF)
    span, middle = _width(low, high), low + (high - low) * _HALF
    share, sx = _weigh(x, h, middle)
    best, s, b = splat(-_ONE), zero, zero
    for t in range(spans.size):
        inverse = ratio(splat(spans[t]), span)
        for m in range(moves.size):
            sp, spp, spx = _sum_bias(x, h, middle, inverse, centre - moves[m], top)
            fitted, offset, along = _solve(sp, spp, spx, share, sx)
            gain = fitted * along
            s = where_above(gain, best, fitted, s)
            b = where_above(gain, best, offset, b)
            best = where_above(gain, best, gain, best)
    sp = zero
    for _ in range(2):
        inverse = ratio(one, s)
        sp, spp, spx = _sum_bias(x, h, middle, inverse, centre - b * inverse, top)
        s, b, _along = _solve(sp, spp, spx, share, sx)
    s = half(s)
    real = middle + ((sx - s * sp) * share - s * centre)
    return s, half(least(most(real, splat(-_LARGEST)), splat(_LARGEST)))


@inner
def _weigh(x, h, middle):
    """1 / sum h, 0 without any importance, and sum h u of weights u = x - middle."""
    total, sx = _ZERO, splat(_ZERO)
    for j in range(h.size):
        total += h[j]
    for j in range(x.shape[0]):
        sx = sx + (load(x, j) - middle) * h[j]
    return ratio(splat(_ONE), splat(total)), sx


@inner
def _sum_bias(x, h, middle, inverse, shift, top):
    """Sums h p, h p p and h p u of the codes, counted as p from the middle of the grid."""
    sp, spp, spx = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    lowest, highest, centre = splat(_ZERO), splat(top), splat(top * _HALF)
    for j in range(x.shape[0]):
        u = load(x, j) - middle
        p = nearest(u * inverse + shift, lowest, highest) - centre
        hp = p * h[j]
        sp = sp + hp
        spp = spp + hp * p
        spx = spx + hp * u
    return sp, spp, spx


@inner
def _solve(sp, spp, spx, share, sx):
    """The regression of u on p: slope, intercept, and what slope times gives its gain."""
    zero = splat(_ZERO)
    mean = sp * share
    spread, along = spp - mean * sp, spx - mean * sx
    s = where_above(spread, spp * _SAME, most(along, zero) / spread, zero)
    return s, (sx - s * sp) * share, along


@inner
def _search_zero(x, h, low, high, top, spans, moves):
    lowest, highest = splat(_ZERO), splat(top)
    low, high = least(low, lowest), most(high, lowest)
    span = _width(low, high)
    first = nearest(-low * ratio(highest, span), lowest, highest)
    best, s, zero = splat(-_ONE), splat(_ZERO), first
    for m in range(moves.size):
        tried = least(most(first + moves[m], lowest), highest)
        for t in range(spans.size):
            xp, pp = _sum_zero(x, h, ratio(splat(spans[t]), span), tried, top)
            fitted = ratio(xp, pp)
            gain = fitted * xp
            s = where_above(gain, best, fitted, s)
            zero = where_above(gain, best, tried, zero)
            best = where_above(gain, best, gain, best)
    xp, pp = _sum_zero(x, h, ratio(splat(_ONE), s), zero, top)
    return half(ratio(xp, pp)), zero


@inner
def _sum_zero(x, h, inverse, zero, top):
    """Sums h p x and h p p of the levels p = q - zero."""
    xp, pp = splat(_ZERO), splat(_ZERO)
    low, high = -zero, splat(top) - zero
    for j in range(x.shape[0]):
        value = load(x, j)
        p = nearest(value * inverse, low, high)
        hp = p * h[j]
        xp = xp + hp * value
        pp = pp + hp * p
    return xp, pp
