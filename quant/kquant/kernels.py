"""Compiled rounding and GPTQ on ggml's K-quants: ``w = d sub_scale q - dmin sub_min``.

- d and dmin of a block are searched when the turn of its first columns comes, from the
  compensated weights of all its 256 columns.
- sub_scale and sub_min of a sub-block are chosen at its own turn, under d and dmin, from what its
  weights are by then: an error of theirs is made up for by the columns to come, as any other.
- A sweep of coordinate descent gives d and dmin, then sub_scale and sub_min of each sub-block,
  then each code the value of least loss, all others fixed. With g the gradient and H the moments,
  a change along a and b, by t and u, changes the loss by
  ``t^2 a'Ha + 2 t u a'Hb + u^2 b'Hb + 2 (t a'g + u b'g)``: a = sub_scale q and b = -sub_min for d
  and dmin; a = d q and b = -dmin for sub_scale and sub_min, where whole numbers beside the least
  are tried.

32 columns are taken at a time: a sub-block of 4 or 5 bits, two of 6. There q is signed and nothing
is shifted.
"""

import numpy as np

from lfmq.quant.columns import refit_levels, round_columns, spread
from lfmq.quant.kernels import inner, kernel
from lfmq.quant.kquant.search import (
    HIGHEST,
    LOWEST,
    STEPS,
    TOP_CODE,
    WORK,
    choose_codes,
    code_shifted,
    code_signed,
    fit_shifted,
    fit_signed,
    search,
    survey,
)
from lfmq.quant.kquant.spec import KQUANT_BLOCK
from lfmq.quant.simd import (
    LANES,
    any_above,
    load,
    load_columns,
    most,
    nearest,
    ratio,
    splat,
    store,
    store_codes,
    store_columns,
    where_above,
)

_ZERO, _ONE, _TWO, _HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
# Share of the product of curvatures below which scale and offset have the same effect.
_ALIKE = np.float32(2.0**-16)


@kernel
def quantize_rows(w, h, group, signed, top, spans, moves, codes, scale, sub_scale):
    """Fill in codes [N, K], scales [2, N, B] and their codes [2, N, G]; False if unfit."""
    x = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    chosen = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    pair = np.zeros((2, LANES), np.float32)
    sub_scales = np.zeros((STEPS, LANES), np.float32)
    sub_mins = np.zeros((STEPS, LANES), np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    each, sound = KQUANT_BLOCK // group, True
    for row in range(0, w.shape[0], LANES):
        for column in range(0, w.shape[1], KQUANT_BLOCK):
            for j in range(0, KQUANT_BLOCK, 32):
                load_columns(w, row, column + j, x, j)
            importance = h[column : column + KQUANT_BLOCK]
            found = search(
                x, importance, signed, top, spans, moves, pair, sub_scales, sub_mins, work
            )
            sound = found and sound
            choose_codes(x, signed, top, pair, sub_scales, sub_mins, chosen)
            for j in range(0, KQUANT_BLOCK, 32):
                store_codes(codes, row, column + j, chosen, j)
            block, first = column // KQUANT_BLOCK, column // group
            for lane in range(LANES):
                scale[0, row + lane, block] = pair[0, lane]
                scale[1, row + lane, block] = pair[1, lane]
                for g in range(each):
                    sub_scale[0, row + lane, first + g] = np.int8(sub_scales[g, lane])
                    sub_scale[1, row + lane, first + g] = np.int8(sub_mins[g, lane])
    return sound


@kernel
def search_block(w, h, signed, top, spans, moves, pair):
    """Fill in d and dmin [2, N] of a superblock [N, 256] with importance h [256]."""
    x = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    found = np.zeros((2, LANES), np.float32)
    sub_scales = np.zeros((STEPS, LANES), np.float32)
    sub_mins = np.zeros((STEPS, LANES), np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    sound = True
    for row in range(0, w.shape[0], LANES):
        for j in range(0, KQUANT_BLOCK, 2 * LANES):
            load_columns(w, row, j, x, j)
        sound = (
            search(x, h, signed, top, spans, moves, found, sub_scales, sub_mins, work) and sound
        )
        for i in range(2):
            for lane in range(LANES):
                pair[i, row + lane] = found[i, lane]
    return sound


@inner
def _load_lanes(stored, row, scratch):
    """Columns row to row + 15 of an array [n, N] as the first rows of scratch."""
    for i in range(stored.shape[0]):
        for lane in range(LANES):
            scratch[i, lane] = stored[i, row + lane]


@inner
def _store_lanes(stored, row, scratch):
    """The reverse of ``_load_lanes``."""
    for i in range(stored.shape[0]):
        for lane in range(LANES):
            stored[i, row + lane] = scratch[i, lane]


@kernel
def round_parts(w, u, h, signed, top, spans, moves, pair, code, sub_scale, sub_min, error):
    """Choose sub_scale and sub_min of sub-blocks [N, 32] in turn and round their columns.

    u [32, 32] is the factor of the columns, h [32] their importance, pair d and dmin [2, N].
    """
    columns, each = w.shape[1], sub_scale.shape[0]
    group = columns // each
    x = np.zeros((columns, LANES), np.float32)
    e = np.zeros((columns, LANES), np.float32)
    both = np.zeros((2, LANES), np.float32)
    sub_scales = np.zeros((2, LANES), np.float32)
    sub_mins = np.zeros((2, LANES), np.float32)
    work = np.zeros((8, LANES), np.float32)
    zero = splat(_ZERO)
    low, high, bad = splat(-top - _ONE) if signed else zero, splat(top), zero
    for row in range(0, w.shape[0], LANES):
        for j in range(0, columns, 2 * LANES):
            load_columns(w, row, j, x, j)
        _load_lanes(pair, row, both)
        for g in range(each):
            bad = most(
                bad, _choose(x, h, g, signed, top, spans, moves, both, sub_scales, sub_mins, work)
            )
            size, below = load(both, 0) * load(sub_scales, g), load(both, 1) * load(sub_mins, g)
            inverse = ratio(splat(_ONE), size)
            start, stop = g * group, (g + 1) * group
            round_columns(x, e, u, start, stop, size, inverse, -below, None, low, high)
        for j in range(0, columns, 2 * LANES):
            store_columns(code, row, j, x, j)
            store_columns(error, row, j, e, j)
        _store_lanes(sub_scale, row, sub_scales)
        _store_lanes(sub_min, row, sub_mins)
    return not any_above(bad, zero)


@inner
def _choose(x, h, g, signed, top, spans, moves, pair, sub_scales, sub_mins, work):
    """Step and sub_min of sub-block g under d and dmin; above 0 for weights float16 lacks."""
    s, m, sums, extent = work[:2], work[2:4], work[4:6], work[6:8]
    if signed:
        bad = fit_signed(x, h, g, top, spans, s)
        code_signed(x, h, g, top, s, pair, sub_scales)
        store(sub_mins, g, splat(_ZERO))
        return bad
    bad = survey(x, h, 0, sums, extent)
    fit_shifted(x, h, 0, top, spans, moves, s, m, sums, extent)
    code_shifted(x, h, 0, top, s, m, sums, pair, sub_scales, sub_mins)
    return bad


@kernel
def descend_parts(gradient, h, signed, top, pair, code, sub_scale, sub_min, change):
    """Refit sub-blocks [N, 32] in turn; fill in their weights' change."""
    columns, each = gradient.shape[1], sub_scale.shape[0]
    group = columns // each
    g = np.zeros((columns, LANES), np.float32)
    q = np.zeros((columns, LANES), np.float32)
    d = np.zeros((columns, LANES), np.float32)
    both = np.zeros((2, LANES), np.float32)
    sub_scales = np.zeros((2, LANES), np.float32)
    sub_mins = np.zeros((2, LANES), np.float32)
    zero = splat(_ZERO)
    low, high = splat(-top - _ONE) if signed else zero, splat(top)
    for row in range(0, gradient.shape[0], LANES):
        for j in range(0, columns, 2 * LANES):
            load_columns(gradient, row, j, g, j)
            load_columns(code, row, j, q, j)
        _load_lanes(pair, row, both)
        _load_lanes(sub_scale, row, sub_scales)
        _load_lanes(sub_min, row, sub_mins)
        for i in range(each):
            start, stop = i * group, (i + 1) * group
            _refit_scale_code(g, q, d, h, i, start, stop, signed, both, sub_scales, sub_mins)
            size = load(both, 0) * load(sub_scales, i)
            inverse = ratio(splat(_ONE), size)
            refit_levels(g, q, d, h, start, stop, size, inverse, None, low, high)
        for j in range(0, columns, 2 * LANES):
            store_columns(code, row, j, q, j)
            store_columns(change, row, j, d, j)
        _store_lanes(sub_scale, row, sub_scales)
        _store_lanes(sub_min, row, sub_mins)


@inner
def _refit_scale_code(g, q, d, h, i, start, stop, signed, pair, sub_scales, sub_mins):
    """Move sub_scale and sub_min of sub-block i to whole numbers of less loss; d = the change."""
    zero = splat(_ZERO)
    down_a, down_b, aa, ab, bb = zero, zero, zero, zero, zero  # for a = q, b = 1
    for j in range(start, stop):
        hq, row = zero, _ZERO
        for k in range(start, stop):
            hq = hq + load(q, k) * h[j, k]
            row += h[j, k]
        level, slope = load(q, j), load(g, j)
        down_a, down_b = down_a - level * slope, down_b - slope
        aa, ab, bb = aa + level * hq, ab + hq, bb + splat(row)
    size, depth = load(pair, 0), load(pair, 1)
    sub_scale, sub_min = load(sub_scales, i), load(sub_mins, i)
    rest, product = aa * bb - ab * ab, aa * bb
    joint = ratio(bb * down_a - ab * down_b, rest)
    move = where_above(rest, product * _ALIKE, joint, ratio(down_a, aa))
    low, high = (splat(LOWEST), splat(HIGHEST)) if signed else (zero, splat(TOP_CODE))
    if signed:
        move = ratio(down_a, aa)
    below = nearest(sub_scale + ratio(move, size) - _HALF, low, high)
    best, along, up, chosen, moved = zero, zero, zero, sub_scale, sub_min
    for trial in range(3):
        candidate = (
            sub_scale if trial == 0 else nearest(below + splat(np.float32(trial - 1)), low, high)
        )
        by = size * (candidate - sub_scale)
        loss, raised, other = by * (by * aa - down_a * _TWO), zero, sub_min
        if not signed:
            slope = down_b - ab * by
            wanted = sub_min - ratio(ratio(slope, bb), depth)
            other = nearest(wanted, zero, splat(TOP_CODE))
            raised = depth * (sub_min - other)
            loss = loss + raised * (raised * bb - slope * _TWO)
        chosen = where_above(best, loss, candidate, chosen)
        moved = where_above(best, loss, other, moved)
        along = where_above(best, loss, by, along)
        up = where_above(best, loss, raised, up)
        best = where_above(best, loss, loss, best)
    store(sub_scales, i, chosen)
    store(sub_mins, i, moved)
    spread(g, q, d, h, start, stop, along, up)
