"""Kernels on one group of sixteen rows at a time, shared by the quantizers of every grid.

A row is a SIMD lane and a group of its weights runs down the lane, so that every sum is taken in
the group's order in float32 without reassociation or fused multiply-add: the same input gives the
same codes on every processor.
"""

import numpy as np
from numba import njit

LANES = 16
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even
_LARGEST = np.float32(65504)  # largest float16
_TINY = np.float32(2.0**-14)  # smallest normal float16
_SUBNORMAL = np.float32(0.75)  # adding and subtracting it rounds to a multiple of 2^-24

# Levels tried for the largest weight of a group; docs/quantization.md describes the search.
TARGETS = {
    4: np.arange(18, 28, dtype=np.float32) / np.float32(3),
    8: np.array([126.0, 126.5, 127.0, 127.4], np.float32),
}


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def load_group(w, row, column, lanes, x):  # type: ignore[no-untyped-def] # pragma: no cover
    """Copy a group of up to sixteen rows into lanes, zeros beside them."""
    for lane in range(lanes):
        for j in range(x.shape[0]):
            x[j, lane] = w[row + lane, column + j]
    for lane in range(lanes, LANES):
        for j in range(x.shape[0]):
            x[j, lane] = np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def find_peak(x, peak):  # type: ignore[no-untyped-def] # pragma: no cover
    """The largest weight of each lane with its sign; False when one is no finite float16."""
    for lane in range(LANES):
        peak[lane] = np.float32(0)
    outside = np.int32(0)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            peak[lane] = value if abs(value) > abs(peak[lane]) else peak[lane]
            outside |= np.int32(not abs(value) <= _LARGEST)
    return outside == 0


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def invert(divisor, numerator, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """Numerator / divisor, 0 where the divisor is 0."""
    for lane in range(LANES):
        d = divisor[lane]
        out[lane] = np.float32(0) if d == np.float32(0) else numerator / d


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def fit_scale(x, h, inverse, low, high, xq, qq):  # type: ignore[no-untyped-def] # pragma: no cover
    """Sums h x q and h q q of the levels q that an inverse scale gives."""
    for lane in range(LANES):
        xq[lane] = np.float32(0)
        qq[lane] = np.float32(0)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            q = nearest_level(x[j, lane] * inverse[lane], low, high)
            hq = h[j] * q
            xq[lane] += hq * x[j, lane]
            qq[lane] += hq * q


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def keep_best(xq, qq, best, best_scale):  # type: ignore[no-untyped-def] # pragma: no cover
    """Keep the scale xq / qq where it lowers the loss below the best so far."""
    for lane in range(LANES):
        s = np.float32(0) if qq[lane] == np.float32(0) else xq[lane] / qq[lane]
        gain = s * xq[lane]
        better = gain > best[lane]
        best[lane] = gain if better else best[lane]
        best_scale[lane] = s if better else best_scale[lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def round_scale(xq, qq, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    """The fitted scale, rounded to the nearest float16, kept as float32."""
    for lane in range(LANES):
        scale[lane] = np.float32(0) if qq[lane] == np.float32(0) else xq[lane] / qq[lane]
    round_half(scale)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def round_half(values):  # type: ignore[no-untyped-def] # pragma: no cover
    """Round to the nearest float16 in place, ties to even, kept as float32."""
    bits = values.view(np.int32)
    for lane in range(LANES):
        v = values[lane]
        small = (v + _SUBNORMAL) - _SUBNORMAL
        b = bits[lane]
        bits[lane] = (b + np.int32(0xFFF) + ((b >> np.int32(13)) & np.int32(1))) & np.int32(-8192)
        if abs(v) < _TINY:
            values[lane] = small


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def nearest_level(value, low, high):  # type: ignore[no-untyped-def] # pragma: no cover
    """The nearest integer, ties to even, within the grid's levels."""
    return min(max((value + _ROUND) - _ROUND, low), high)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def search_scale(x, h, low, high, targets, peak, best, scale, inverse, xq, qq):  # type: ignore[no-untyped-def] # pragma: no cover
    """The best float16 scale of each lane and its inverse; False for a weight float16 lacks."""
    sound = find_peak(x, peak)
    best[:] = np.float32(-1)
    scale[:] = np.float32(0)
    for t in range(targets.size):
        invert(peak, -targets[t], inverse)
        fit_scale(x, h, inverse, low, high, xq, qq)
        keep_best(xq, qq, best, scale)
    invert(scale, np.float32(1), inverse)
    fit_scale(x, h, inverse, low, high, xq, qq)
    round_scale(xq, qq, scale)
    invert(scale, np.float32(1), inverse)
    return sound
