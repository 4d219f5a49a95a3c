"""Round to nearest on the symmetric grid; ``lfmq.quant.symmetric.search`` has the search."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.simd import (
    LANES,
    load,
    load_columns,
    nearest,
    splat,
    store,
    store_codes,
    whole_lanes,
)
from lfmq.quant.symmetric.search import TARGETS, search_scale
from lfmq.quant.types import Quantized, Scheme


def quantize_rows(
    w: NDArray[np.float32] | NDArray[np.uint16], h: NDArray[np.float32], scheme: Scheme
) -> Quantized:
    """Quantize rows [N, K], float32 or bits of bfloat16, with importance h [K].

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows, padded = w.shape[0], whole_lanes(w)
    codes = np.empty(padded.shape, np.uint8)
    scale = np.empty((padded.shape[0], padded.shape[1] // scheme.group), np.float32)
    limits = np.array([scheme.lowest_code, scheme.highest_code], np.float32)
    limits -= np.float32(scheme.zero_point)
    zero, targets = np.float32(scheme.zero_point), TARGETS[scheme.bits]
    if not _quantize_rows(padded, h, scheme.group, limits, zero, targets, codes, scale):
        raise ValueError("a weight is NaN, Inf or beyond float16")
    return Quantized(codes[:rows], scale[:rows].astype(np.float16), scheme)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, limits, zero, targets, codes, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    n_rows, n_columns = w.shape
    x = np.empty((group, LANES), np.float32)
    found = np.empty((1, LANES), np.float32)
    low, high = splat(limits[0]), splat(limits[1])
    sound = True
    for row in range(0, n_rows, LANES):
        for column in range(0, n_columns, group):
            for j in range(0, group, 2 * LANES):
                load_columns(w, row, column + j, x, j)
            hg = h[column : column + group]
            s, inverse, finite = search_scale(x, hg, low, high, targets)
            sound = finite and sound
            store(found, 0, s)
            for lane in range(LANES):
                scale[row + lane, column // group] = found[0, lane]
            for j in range(group):
                store(x, j, nearest(load(x, j) * inverse, low, high) + zero)
            for j in range(0, group, 2 * LANES):
                store_codes(codes, row, column + j, x, j)
    return sound
