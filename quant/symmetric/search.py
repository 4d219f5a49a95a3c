"""The search for a group's scale on the symmetric grid, sixteen rows at a time.

For a group ``x`` of one row with importance ``h`` the scale minimizes ``sum h (x - s q)^2`` over
candidates that put the largest weight at level ``-t``; for the codes of a candidate the best real
scale is ``sum h x q / sum h q^2`` (the search of ggml's ``make_qx_quants``, with other candidates
and a second fit, after which the scale is rounded to float16 and the codes are chosen again).

A group runs down a lane (``lfmq.quant.simd``), so that every sum is taken in the group's order
in float32: the same input gives the same codes on every processor.
"""

import numpy as np
from numba import njit

from lfmq.quant.simd import (
    absolute,
    any_above,
    half,
    load,
    most,
    nearest,
    ratio,
    splat,
    where_above,
    where_within,
)

# Levels tried for the largest weight of a group; docs/quantization.md describes the search.
TARGETS = {
    4: np.arange(18, 28, dtype=np.float32) / np.float32(3),
    8: np.array([126.0, 126.5, 127.0, 127.4], np.float32),
}
_LARGEST = np.float32(65504)  # largest float16
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def search_scale(x, h, low, high, targets):  # type: ignore[no-untyped-def] # pragma: no cover
    """The best float16 scale of each lane, its inverse, and False for a weight float16 lacks.

    Args:
        x: scratch [group, 16].
        h: importance [group].
        low: vector of the lowest level.
        high: of the highest.
        targets: candidates.
    """
    peak, sound = _find_peak(x)
    best, scale = splat(-_ONE), splat(_ZERO)
    for t in range(targets.size):
        xq, qq = _fit_scale(x, h, ratio(splat(-targets[t]), peak), low, high)
        fitted = ratio(xq, qq)
        gain = fitted * xq
        scale = where_above(gain, best, fitted, scale)
        best = where_above(gain, best, gain, best)
    xq, qq = _fit_scale(x, h, ratio(splat(_ONE), scale), low, high)
    scale = half(ratio(xq, qq))
    return scale, ratio(splat(_ONE), scale), sound


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _find_peak(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """The largest weight of each lane with its sign; False when one is no finite float16."""
    peak, size, outside = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for j in range(x.shape[0]):
        value = load(x, j)
        distance = absolute(value)
        peak = where_above(distance, size, value, peak)
        size = most(distance, size)
        outside = where_within(distance, splat(_LARGEST), outside, splat(_ONE))
    return peak, not any_above(outside, splat(_ZERO))


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _fit_scale(x, h, inverse, low, high):  # type: ignore[no-untyped-def] # pragma: no cover
    """Sums h x q and h q q of the levels q that an inverse scale gives."""
    xq, qq = splat(_ZERO), splat(_ZERO)
    for j in range(x.shape[0]):
        value = load(x, j)
        q = nearest(value * inverse, low, high)
        hq = q * h[j]
        xq = xq + hq * value
        qq = qq + hq * q
    return xq, qq
