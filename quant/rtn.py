"""Round to nearest on the portable grid, with an importance-weighted search for the scale.

For a group ``x`` of one row with importance ``h`` the scale minimizes ``sum h (x - s q)^2`` over
candidates that put the largest weight at level ``-t``; for the codes of a candidate the best real
scale is ``sum h x q / sum h q^2`` (the search of ggml's ``make_qx_quants``, with other candidates
and a second fit, after which the scale is rounded to float16 and the codes are chosen again).

Bit-exact by construction: every sum runs over the group in order in float32, one row a SIMD lane,
without fused multiply-add; ``tests/quant/test_rtn.py`` holds the plain definition.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.types import Quantized, Scheme

# Levels tried for the largest weight of a group. Ten steps of 1/3 from 6 to 9 come within 0.2 %
# of the squared error of an exhaustive search (docs/quantization.md).
TARGETS = {
    4: np.arange(18, 28, dtype=np.float32) / np.float32(3),
    8: np.array([126.0, 126.5, 127.0, 127.4], np.float32),
}
_LANES = 16
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even
_LARGEST = np.float32(65504)  # largest float16
_TINY = np.float32(2.0**-14)  # smallest normal float16
_SUBNORMAL = np.float32(0.75)  # adding and subtracting it rounds to a multiple of 2^-24


def quantize(
    w: NDArray[np.float32], scheme: Scheme, importance: NDArray[np.float32] | None = None
) -> Quantized:
    """Quantize a weight of shape [..., N, K].

    Args:
        w: the weight; K is a multiple of the scheme's group.
        scheme: bits 4 or 8 on the symmetric grid.
        importance: weight of each input's squared error, shape [K]; all one when None.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows = np.ascontiguousarray(w, np.float32).reshape(-1, w.shape[-1])
    if rows.shape[1] % scheme.group:
        raise ValueError(f"rows of {rows.shape[1]} do not divide into groups of {scheme.group}")
    h = np.ones(rows.shape[1], np.float32) if importance is None else importance
    codes = np.empty(rows.shape, np.uint8)
    scale = np.empty((rows.shape[0], rows.shape[1] // scheme.group), np.float32)
    limits = np.array([scheme.lowest_code, scheme.highest_code], np.float32)
    limits -= np.float32(scheme.zero_point)
    sound = _quantize_rows(
        rows,
        h.astype(np.float32, copy=False),
        scheme.group,
        limits,
        np.float32(scheme.zero_point),
        TARGETS[scheme.bits],
        codes,
        scale,
    )
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    shape = (*w.shape[:-1], scale.shape[1])
    return Quantized(codes.reshape(w.shape), scale.astype(np.float16).reshape(shape), scheme)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, limits, zero, targets, codes, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    n_rows, n_columns = w.shape
    x = np.zeros((group, _LANES), np.float32)
    peak = np.zeros(_LANES, np.float32)
    sound = True
    best = np.zeros(_LANES, np.float32)
    best_scale = np.zeros(_LANES, np.float32)
    inverse = np.zeros(_LANES, np.float32)
    xq = np.zeros(_LANES, np.float32)
    qq = np.zeros(_LANES, np.float32)
    for row in range(0, n_rows, _LANES):
        lanes = min(_LANES, n_rows - row)
        for column in range(0, n_columns, group):
            _load(w, row, column, lanes, x)
            sound = _find_peak(x, peak) and sound
            hg = h[column : column + group]
            best[:] = np.float32(-1)
            best_scale[:] = np.float32(0)
            for t in range(targets.size):
                _invert(peak, -targets[t], inverse)
                _fit(x, hg, inverse, limits[0], limits[1], xq, qq)
                _keep_best(xq, qq, best, best_scale)
            _invert(best_scale, np.float32(1), inverse)
            _fit(x, hg, inverse, limits[0], limits[1], xq, qq)
            _half_scale(xq, qq, best_scale)
            _invert(best_scale, np.float32(1), inverse)
            for lane in range(lanes):
                scale[row + lane, column // group] = best_scale[lane]
            _store_codes(x, inverse, limits, zero, codes, row, column, lanes)
    return sound


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _load(w, row, column, lanes, x):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(lanes):
        for j in range(x.shape[0]):
            x[j, lane] = w[row + lane, column + j]
    for lane in range(lanes, _LANES):
        for j in range(x.shape[0]):
            x[j, lane] = np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _find_peak(x, peak):  # type: ignore[no-untyped-def] # pragma: no cover
    """The largest weight of each lane with its sign; False when one is no finite float16."""
    for lane in range(_LANES):
        peak[lane] = np.float32(0)
    outside = np.int32(0)
    for j in range(x.shape[0]):
        for lane in range(_LANES):
            value = x[j, lane]
            peak[lane] = value if abs(value) > abs(peak[lane]) else peak[lane]
            outside |= np.int32(not abs(value) <= _LARGEST)
    return outside == 0


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _invert(divisor, numerator, out):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(_LANES):
        d = divisor[lane]
        out[lane] = np.float32(0) if d == np.float32(0) else numerator / d


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _fit(x, h, inverse, low, high, xq, qq):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(_LANES):
        xq[lane] = np.float32(0)
        qq[lane] = np.float32(0)
    for j in range(x.shape[0]):
        for lane in range(_LANES):
            q = (x[j, lane] * inverse[lane] + _ROUND) - _ROUND
            q = min(max(q, low), high)
            hq = h[j] * q
            xq[lane] += hq * x[j, lane]
            qq[lane] += hq * q


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _keep_best(xq, qq, best, best_scale):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(_LANES):
        s = np.float32(0) if qq[lane] == np.float32(0) else xq[lane] / qq[lane]
        gain = s * xq[lane]
        better = gain > best[lane]
        best[lane] = gain if better else best[lane]
        best_scale[lane] = s if better else best_scale[lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _half_scale(xq, qq, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    """The fitted scale, rounded to the nearest float16 (ties to even), kept as float32."""
    for lane in range(_LANES):
        scale[lane] = np.float32(0) if qq[lane] == np.float32(0) else xq[lane] / qq[lane]
    bits = scale.view(np.int32)
    for lane in range(_LANES):
        s = scale[lane]
        small = (s + _SUBNORMAL) - _SUBNORMAL
        b = bits[lane]
        bits[lane] = (b + np.int32(0xFFF) + ((b >> np.int32(13)) & np.int32(1))) & np.int32(-8192)
        if abs(s) < _TINY:
            scale[lane] = small


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _store_codes(x, inverse, limits, zero, codes, row, column, lanes):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(lanes):
        for j in range(x.shape[0]):
            q = (x[j, lane] * inverse[lane] + _ROUND) - _ROUND
            q = min(max(q, limits[0]), limits[1])
            codes[row + lane, column + j] = np.uint8(q + zero)
