"""Round to nearest on the grids with an offset; ``lfmq.quant.affine.search`` has the search."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.affine.search import MOVES, SPANS, search_offset
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
from lfmq.quant.types import Quantized, Scheme

F32 = NDArray[np.float32]


def quantize_rows(w: F32 | NDArray[np.uint16], h: F32, scheme: Scheme) -> Quantized:
    """Quantize rows [N, K] on the affine or the asymmetric grid.

    Args:
        w: float32, or uint16 with the bits of bfloat16.
        h: importance [K].
        scheme: of the weight.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows, w = w.shape[0], whole_lanes(w)
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((w.shape[0], w.shape[1] // scheme.group), np.float32)
    offset = np.empty_like(scale)
    sound = _quantize_rows(
        w,
        h,
        scheme.group,
        scheme.grid == "affine_bias",
        np.float32(scheme.highest_code),
        SPANS[scheme.grid, scheme.bits],
        MOVES[scheme.grid, scheme.bits],
        codes,
        scale,
        offset,
    )
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    stored = stored_offset(offset[:rows], scheme)
    return Quantized(codes[:rows], scale[:rows].astype(np.float16), scheme, stored)


def stored_offset(offset: F32, scheme: Scheme) -> NDArray[np.float16] | NDArray[np.uint8]:
    """Offsets in the type of their grid, which holds them exactly."""
    return offset.astype(np.float16) if scheme.grid == "affine_bias" else offset.astype(np.uint8)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, affine, top, spans, moves, codes, scale, offset):  # type: ignore[no-untyped-def] # pragma: no cover
    n_rows, n_columns = w.shape
    x = np.empty((group, LANES), np.float32)
    found = np.empty((2, LANES), np.float32)
    lowest, highest = splat(np.float32(0)), splat(top)
    sound = True
    for row in range(0, n_rows, LANES):
        for column in range(0, n_columns, group):
            for j in range(0, group, 2 * LANES):
                load_columns(w, row, column + j, x, j)
            hg = h[column : column + group]
            s, inverse, b, zero, finite = search_offset(x, hg, affine, top, spans, moves)
            sound = finite and sound
            store(found, 0, s)
            store(found, 1, b if affine else zero)
            for lane in range(LANES):
                scale[row + lane, column // group] = found[0, lane]
                offset[row + lane, column // group] = found[1, lane]
            for j in range(group):
                store(x, j, nearest((load(x, j) - b) * inverse, lowest, highest))
            for j in range(0, group, 2 * LANES):
                store_codes(codes, row, column + j, x, j)
    return sound
