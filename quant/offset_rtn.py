"""Round to nearest on the grids with an offset; ``lfmq.quant.offset_lanes`` has the search."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.lanes import load_group, nearest_level
from lfmq.quant.offset_lanes import MOVES, SPANS, WORK, search_offset
from lfmq.quant.types import Quantized, Scheme
from lfmq.quant.vector import LANES

F32 = NDArray[np.float32]


def quantize_rows(w: F32, h: F32, scheme: Scheme) -> Quantized:
    """Quantize rows [N, K] with importance h [K] on the affine or the asymmetric grid.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((w.shape[0], w.shape[1] // scheme.group), np.float32)
    offset = np.empty_like(scale)
    sound = _quantize_rows(
        w,
        h,
        scheme.group,
        scheme.grid == "affine",
        np.float32(scheme.highest_code),
        SPANS[scheme.grid, scheme.bits],
        MOVES[scheme.grid, scheme.bits],
        codes,
        scale,
        offset,
    )
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    return Quantized(codes, scale.astype(np.float16), scheme, stored_offset(offset, scheme))


def stored_offset(offset: F32, scheme: Scheme) -> NDArray[np.float16] | NDArray[np.uint8]:
    """Offsets in the type of their grid, which holds them exactly."""
    return offset.astype(np.float16) if scheme.grid == "affine" else offset.astype(np.uint8)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, affine, top, spans, moves, codes, scale, offset):  # type: ignore[no-untyped-def] # pragma: no cover
    n_rows, n_columns = w.shape
    x = np.zeros((group, LANES), np.float32)
    s = np.zeros(LANES, np.float32)
    b = np.zeros(LANES, np.float32)
    zero = np.zeros(LANES, np.float32)
    inverse = np.zeros(LANES, np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    sound = True
    for row in range(0, n_rows, LANES):
        lanes = min(LANES, n_rows - row)
        for column in range(0, n_columns, group):
            load_group(w, row, column, lanes, x)
            hg = h[column : column + group]
            found = search_offset(x, hg, affine, top, spans, moves, s, b, zero, inverse, work)
            sound = found and sound
            for lane in range(lanes):
                scale[row + lane, column // group] = s[lane]
                offset[row + lane, column // group] = b[lane] if affine else zero[lane]
                for j in range(group):
                    q = nearest_level((x[j, lane] - b[lane]) * inverse[lane], np.float32(0), top)
                    codes[row + lane, column + j] = np.uint8(q)
    return sound
