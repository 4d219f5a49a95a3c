"""Round to nearest on ggml's K-quants; ``lfmq.quant.kquant.search`` has the search."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.kquant.search import (
    MOVES,
    SPANS,
    STEPS,
    TARGETS,
    WORK,
    choose_codes,
    search,
)
from lfmq.quant.simd import LANES, load_columns, store_codes, whole_lanes
from lfmq.quant.types import KQUANT_BLOCK, Quantized, Scheme

F32 = NDArray[np.float32]


def quantize_rows(w: F32 | NDArray[np.uint16], h: F32, scheme: Scheme) -> Quantized:
    """Quantize rows [N, K], float32 or bits of bfloat16, with importance h [K].

    K is a multiple of 256.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    count, padded = len(w), whole_lanes(w)
    signed = not scheme.has_offset
    codes = np.empty(padded.shape, np.uint8)
    scale = np.empty((2, len(padded), w.shape[1] // KQUANT_BLOCK), np.float32)
    step = np.empty((2, len(padded), w.shape[1] // scheme.group), np.int8)
    spans = TARGETS if signed else SPANS[scheme.bits]
    moves = TARGETS if signed else MOVES[scheme.bits]
    top = np.float32(scheme.zero_point - 1 if signed else scheme.highest_code)
    if not _quantize_rows(padded, h, scheme.group, signed, top, spans, moves, codes, scale, step):
        raise ValueError("a weight is NaN, Inf or beyond float16")
    d, dmin = scale[:, :count].astype(np.float16)
    if signed:
        return Quantized(codes[:count], d, scheme, None, step[0, :count])
    return Quantized(codes[:count], d, scheme, dmin, step[0, :count], step[1, :count])


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_rows(w, h, group, signed, top, spans, moves, codes, scale, step):  # type: ignore[no-untyped-def] # pragma: no cover
    x = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    chosen = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    pair = np.zeros((2, LANES), np.float32)
    steps = np.zeros((STEPS, LANES), np.float32)
    shifts = np.zeros((STEPS, LANES), np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    each, sound = KQUANT_BLOCK // group, True
    for row in range(0, w.shape[0], LANES):
        for column in range(0, w.shape[1], KQUANT_BLOCK):
            for j in range(0, KQUANT_BLOCK, 32):
                load_columns(w, row, column + j, x, j)
            importance = h[column : column + KQUANT_BLOCK]
            found = search(x, importance, signed, top, spans, moves, pair, steps, shifts, work)
            sound = found and sound
            choose_codes(x, signed, top, pair, steps, shifts, chosen)
            for j in range(0, KQUANT_BLOCK, 32):
                store_codes(codes, row, column + j, chosen, j)
            block, first = column // KQUANT_BLOCK, column // group
            for lane in range(LANES):
                scale[0, row + lane, block] = pair[0, lane]
                scale[1, row + lane, block] = pair[1, lane]
                for g in range(each):
                    step[0, row + lane, first + g] = np.int8(steps[g, lane])
                    step[1, row + lane, first + g] = np.int8(shifts[g, lane])
    return sound
