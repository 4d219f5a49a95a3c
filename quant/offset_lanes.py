"""The search for scale and offset of a group, for the grids that have both, a row a SIMD lane.

``affine``: for weights ``x`` with importance ``h`` the real scale s and offset b minimize
``sum h (x - s q - b)^2`` over candidates that let the group's range span t levels and shift the
levels by a share of a step; for the codes of a candidate they are the weighted linear regression
of x on q. The best candidate is fitted once more, the scale is rounded to float16, the offset is
fitted to it and rounded in turn, and the codes are chosen last.

``asymmetric``: the offset is an integer code, so that 0 is exact. Candidates are the zero points
next to that of the range with t levels over it; the rest is the symmetric grid's search.

As in ``lfmq.quant.lanes`` every sum is taken in order in float32, without fused multiply-add.
"""

import numpy as np
from numba import njit

from lfmq.quant.lanes import invert, nearest_level, round_half
from lfmq.quant.vector import LANES

_LARGEST = np.float32(65504)  # largest float16
# A range below 2^-25 has steps that float16 rounds to 0, whatever the candidate.
_FLAT = np.float32(2.0**-25)
# Share of sum h p p below which codes are all the same but for rounding.
_SAME = np.float32(2.0**-16)

# How many levels the range of a group spans. On normal and heavy-tailed weights a search of 400
# candidates has at most 2 % less squared error than these with their moves.
SPANS = {
    ("affine", 4): np.array([14.75, 15.75, 16.75, 17.75, 19.0, 20.25], np.float32),
    ("affine", 5): np.array([30.5, 31.5, 32.5, 33.5, 35.0], np.float32),
    ("affine", 6): np.array([62.5, 63.5, 64.5, 65.5, 67.0], np.float32),
    ("affine", 8): np.array([254.5, 255.5, 256.5, 257.5, 258.75, 260.0], np.float32),
    ("asymmetric", 4): np.arange(14.5, 22, 0.75, dtype=np.float32),
    ("asymmetric", 8): np.arange(254.25, 262, 1, dtype=np.float32),
}
# Where the levels lie: shares of a step on the affine grid, zero points beside the range's.
MOVES = {
    ("affine", 4): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine", 5): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine", 6): np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32),
    ("affine", 8): np.array([-0.375, -0.125, 0.125, 0.375], np.float32),
    ("asymmetric", 4): np.array([-1.0, 0.0, 1.0], np.float32),
    ("asymmetric", 8): np.array([0.0], np.float32),
}
WORK = 13  # rows of lanes that a search needs


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def search_offset(x, h, affine, top, spans, moves, s, b, zero, inverse, work):  # type: ignore[no-untyped-def] # pragma: no cover
    """The best float16 scale and offset of each lane; False for a weight float16 lacks.

    Fills in the scale ``s``, its inverse, ``b`` with ``w = s q + b``, and ``zero``, the zero point
    of the asymmetric grid.
    """
    sound = _find_range(x, work[0], work[1])
    if affine:
        _search_affine(x, h, top, spans, moves, s, b, inverse, work)
    else:
        _search_zero(x, h, top, spans, moves, s, b, zero, inverse, work)
    return sound


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _find_range(x, low, high):  # type: ignore[no-untyped-def] # pragma: no cover
    low[:] = x[0]
    high[:] = x[0]
    outside = np.int32(0)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            low[lane] = min(low[lane], value)
            high[lane] = max(high[lane], value)
            outside |= np.int32(not abs(value) <= _LARGEST)
    return outside == 0


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _search_affine(x, h, top, spans, moves, s, b, inverse, work):  # type: ignore[no-untyped-def] # pragma: no cover
    span, middle, best, shift, sums = work[0], work[1], work[2], work[3], work[4:9]
    fitted, offset, share, sx = work[9], work[10], work[11], work[12]
    centre = top * np.float32(0.5)
    for lane in range(LANES):
        low, high = work[0, lane], work[1, lane]
        span[lane] = high - low if high - low >= _FLAT else np.float32(0)
        middle[lane] = low + (high - low) * np.float32(0.5)
    _weigh(x, h, middle, share, sx)
    best[:] = np.float32(-1)
    s[:] = np.float32(0)
    b[:] = np.float32(0)
    for t in range(spans.size):
        invert(span, spans[t], inverse)
        for m in range(moves.size):
            shift[:] = centre - moves[m]
            _sum_affine(x, h, middle, inverse, shift, top, sums)
            _solve(sums, share, sx, fitted, offset)
            for lane in range(LANES):
                gain = fitted[lane] * sums[3, lane]
                better = gain > best[lane]
                best[lane] = gain if better else best[lane]
                s[lane] = fitted[lane] if better else s[lane]
                b[lane] = offset[lane] if better else b[lane]
    for _ in range(2):
        invert(s, np.float32(1), inverse)
        for lane in range(LANES):
            shift[lane] = centre - b[lane] * inverse[lane]
        _sum_affine(x, h, middle, inverse, shift, top, sums)
        _solve(sums, share, sx, s, b)
    round_half(s)
    for lane in range(LANES):
        real = middle[lane] + (
            (sx[lane] - s[lane] * sums[0, lane]) * share[lane] - s[lane] * centre
        )
        b[lane] = min(max(real, -_LARGEST), _LARGEST)
    round_half(b)
    invert(s, np.float32(1), inverse)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _weigh(x, h, middle, share, sx):  # type: ignore[no-untyped-def] # pragma: no cover
    """1 / sum h, 0 without any importance, and sum h u of weights u = x - middle."""
    total = np.float32(0)
    for j in range(h.size):
        total += h[j]
    share[:] = np.float32(0) if total == np.float32(0) else np.float32(1) / total
    sx[:] = np.float32(0)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            sx[lane] += h[j] * (x[j, lane] - middle[lane])


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sum_affine(x, h, middle, inverse, shift, top, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    """Sums h p, h p p and h p u of the codes, counted as p from the middle of the grid."""
    sums[:3] = np.float32(0)
    centre = top * np.float32(0.5)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            u = x[j, lane] - middle[lane]
            p = nearest_level(u * inverse[lane] + shift[lane], np.float32(0), top) - centre
            hp = h[j] * p
            sums[0, lane] += hp
            sums[1, lane] += hp * p
            sums[2, lane] += hp * u


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _solve(sums, share, sx, s, b):  # type: ignore[no-untyped-def] # pragma: no cover
    """The regression of u on p: slope s, intercept b; sums[3] is what s times gives its gain."""
    for lane in range(LANES):
        mean = sums[0, lane] * share[lane]
        spread = sums[1, lane] - mean * sums[0, lane]
        along = sums[2, lane] - mean * sx[lane]
        same = not spread > _SAME * sums[1, lane]
        s[lane] = np.float32(0) if same else max(along, np.float32(0)) / spread
        b[lane] = (sx[lane] - s[lane] * sums[0, lane]) * share[lane]
        sums[3, lane] = along


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _search_zero(x, h, top, spans, moves, s, b, zero, inverse, work):  # type: ignore[no-untyped-def] # pragma: no cover
    span, first, best, tried, xp, pp = work[0], work[1], work[2], work[3], work[4], work[5]
    for lane in range(LANES):
        low, high = min(work[0, lane], np.float32(0)), max(work[1, lane], np.float32(0))
        span[lane] = high - low if high - low >= _FLAT else np.float32(0)
        first[lane] = -low
    invert(span, top, inverse)
    for lane in range(LANES):
        first[lane] = nearest_level(first[lane] * inverse[lane], np.float32(0), top)
    best[:] = np.float32(-1)
    s[:] = np.float32(0)
    zero[:] = first
    for m in range(moves.size):
        for lane in range(LANES):
            tried[lane] = min(max(first[lane] + moves[m], np.float32(0)), top)
        for t in range(spans.size):
            invert(span, spans[t], inverse)
            _sum_zero(x, h, inverse, tried, top, xp, pp)
            for lane in range(LANES):
                fitted = np.float32(0) if pp[lane] == np.float32(0) else xp[lane] / pp[lane]
                gain = fitted * xp[lane]
                better = gain > best[lane]
                best[lane] = gain if better else best[lane]
                s[lane] = fitted if better else s[lane]
                zero[lane] = tried[lane] if better else zero[lane]
    invert(s, np.float32(1), inverse)
    _sum_zero(x, h, inverse, zero, top, xp, pp)
    for lane in range(LANES):
        s[lane] = np.float32(0) if pp[lane] == np.float32(0) else xp[lane] / pp[lane]
    round_half(s)
    for lane in range(LANES):
        b[lane] = -s[lane] * zero[lane]
    invert(s, np.float32(1), inverse)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sum_zero(x, h, inverse, zero, top, xp, pp):  # type: ignore[no-untyped-def] # pragma: no cover
    """Sums h p x and h p p of the levels p = q - zero."""
    xp[:] = np.float32(0)
    pp[:] = np.float32(0)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            p = nearest_level(x[j, lane] * inverse[lane], -zero[lane], top - zero[lane])
            hp = h[j] * p
            xp[lane] += hp * x[j, lane]
            pp[lane] += hp * p
