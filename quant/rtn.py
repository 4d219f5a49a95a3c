"""Round to nearest with an importance-weighted search for the scale, here on the portable grid.

For a group ``x`` of one row with importance ``h`` the scale minimizes ``sum h (x - s q)^2`` over
candidates that put the largest weight at level ``-t``; for the codes of a candidate the best real
scale is ``sum h x q / sum h q^2`` (the search of ggml's ``make_qx_quants``, with other candidates
and a second fit, after which the scale is rounded to float16 and the codes are chosen again).

Bit-exact by construction: every sum runs over the group in order in float32, one row a SIMD lane,
without fused multiply-add; ``tests/quant/test_rtn.py`` holds the plain definition. The grids with
an offset have their own search (``lfmq.quant.offset_lanes``).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.lanes import LANES, TARGETS, load_group, nearest_level, search_scale
from lfmq.quant.offset_rtn import quantize_rows
from lfmq.quant.types import Quantized, Scheme


def quantize(
    w: NDArray[np.float32], scheme: Scheme, importance: NDArray[np.float32] | None = None
) -> Quantized:
    """Quantize a weight of shape [..., N, K].

    Args:
        w: the weight; K is a multiple of the scheme's group.
        scheme: bits 4 or 8.
        importance: weight of each input's squared error, shape [K]; all one when None.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows = np.ascontiguousarray(w, np.float32).reshape(-1, w.shape[-1])
    if rows.shape[1] % scheme.group:
        raise ValueError(f"rows of {rows.shape[1]} do not divide into groups of {scheme.group}")
    h = np.ones(rows.shape[1], np.float32) if importance is None else importance
    h = h.astype(np.float32, copy=False)
    if scheme.grid != "symmetric":
        return _reshape(quantize_rows(rows, h, scheme), w.shape)
    codes = np.empty(rows.shape, np.uint8)
    scale = np.empty((rows.shape[0], rows.shape[1] // scheme.group), np.float32)
    limits = np.array([scheme.lowest_code, scheme.highest_code], np.float32)
    limits -= np.float32(scheme.zero_point)
    sound = _quantize_rows(
        rows,
        h,
        scheme.group,
        limits,
        np.float32(scheme.zero_point),
        TARGETS[scheme.bits],
        codes,
        scale,
    )
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    return _reshape(Quantized(codes, scale.astype(np.float16), scheme), w.shape)


def _reshape(q: Quantized, shape: tuple[int, ...]) -> Quantized:
    """Rows [N, K] as a weight of the shape [..., K]."""
    return q.map(lambda array: array.reshape(*shape[:-1], array.shape[1]))


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, limits, zero, targets, codes, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    n_rows, n_columns = w.shape
    x = np.zeros((group, LANES), np.float32)
    peak = np.zeros(LANES, np.float32)
    sound = True
    best = np.zeros(LANES, np.float32)
    best_scale = np.zeros(LANES, np.float32)
    inverse = np.zeros(LANES, np.float32)
    xq = np.zeros(LANES, np.float32)
    qq = np.zeros(LANES, np.float32)
    for row in range(0, n_rows, LANES):
        lanes = min(LANES, n_rows - row)
        for column in range(0, n_columns, group):
            load_group(w, row, column, lanes, x)
            hg = h[column : column + group]
            low, high = limits[0], limits[1]
            found = search_scale(
                x, hg, low, high, targets, peak, best, best_scale, inverse, xq, qq
            )
            sound = found and sound
            for lane in range(lanes):
                scale[row + lane, column // group] = best_scale[lane]
            _store_codes(x, inverse, limits, zero, codes, row, column, lanes)
    return sound


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _store_codes(x, inverse, limits, zero, codes, row, column, lanes):  # type: ignore[no-untyped-def] # pragma: no cover
    for lane in range(lanes):
        for j in range(x.shape[0]):
            q = nearest_level(x[j, lane] * inverse[lane], limits[0], limits[1])
            codes[row + lane, column + j] = np.uint8(q + zero)
