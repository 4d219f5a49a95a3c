"""Kernels on one group of sixteen rows at a time, shared by the grids with an offset.

A row is a SIMD lane and a group of its weights runs down the lane, so that every sum is taken in
the group's order in float32 without reassociation or fused multiply-add: the same input gives the
same codes on every processor.
"""

import numpy as np
from numba import njit

from lfmq.quant.vector import LANES

_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even
_TINY = np.float32(2.0**-14)  # smallest normal float16
_SUBNORMAL = np.float32(0.75)  # adding and subtracting it rounds to a multiple of 2^-24


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
def invert(divisor, numerator, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """Numerator / divisor, 0 where the divisor is 0."""
    for lane in range(LANES):
        d = divisor[lane]
        out[lane] = np.float32(0) if d == np.float32(0) else numerator / d


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
