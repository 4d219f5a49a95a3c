"""The search for the scales of a superblock, sixteen rows as vectors (``lfmq.quant.simd``).

K-quants store a float16 scale d (and offset dmin) for 256 weights of a row, and a small code of
both for each sub-block g: ``w = d sub_scale[g] q - dmin sub_min[g]`` for 4 and 5 bits, and for 6
bits, where q has a sign, ``w = d sub_scale[g] q`` (``block_q4_K``, ``block_q5_K`` and
``block_q6_K`` of ggml). For weights x with importance h, the sum of ``h (x - w)^2`` is lowered in
three steps:

1. Each sub-block's real scale and offset, by least squares over candidates: how many levels its
   range spans and where they lie, or the level of its largest weight. Offsets only lower weights,
   as ``sub_min`` has no sign.
2. d and dmin let the largest scale and offset have the largest code. For each sub-block the
   sub_scale nearest to its scale and both beside it are tried, each with its best sub_min, by the
   error of the weights rounded to them.
3. d and dmin are fitted to all codes by least squares and rounded, and step 2 is taken again from
   there; what has the smaller error stays.

Least squares for the sub-blocks, then codes of their scales, is also how ggml goes
(``make_qkx2_quants``, ``make_qx_quants``), which tries other candidates and takes neither the
neighbours nor step 3. Sums are in order in float32 without fused multiply-add:
``tests/quant/kquant/test_rtn.py`` holds the plain definition.
"""

import numpy as np

from lfmq.quant.kernels import inner
from lfmq.quant.kquant.spec import KQUANT_BLOCK
from lfmq.quant.simd import (
    absolute,
    any_above,
    half,
    load,
    most,
    nearest,
    ratio,
    splat,
    store,
    where_above,
    where_within,
)

ZERO, ONE = np.float32(0), np.float32(1)
LARGEST = np.float32(65504)  # largest float16
FAR = np.float32(3e38)
# A range up to 2^-25 is nothing under float16's smallest scale, whatever the candidate.
FLAT = np.float32(2.0**-25)
# Share of sum h q q below which codes are all the same but for rounding.
SAME = np.float32(2.0**-16)
TOP_CODE = np.float32(63)  # of sub_scale and sub_min, six bits
LOWEST, HIGHEST = np.float32(-128), np.float32(127)  # sub_scale of 6-bit weights, signed bytes
ROUNDS = 2  # of step 2, with step 3 between them

# By bits: how many levels the range of a sub-block spans, and where they lie beside its middle.
# Many more candidates lower the squared error by about 1 %: a test holds them against these.
SPANS = {
    4: np.arange(13.5, 20.5, 0.75, dtype=np.float32),
    5: np.arange(28.5, 37.0, 1.0, dtype=np.float32),
}
MOVES = {
    4: np.array([-0.36, -0.12, 0.12, 0.36], np.float32),
    5: np.array([-0.375, -0.125, 0.125, 0.375], np.float32),
}
# Levels tried for the largest weight of a sub-block of 6-bit weights.
TARGETS = np.arange(28, 33.1, 0.3125, dtype=np.float32)

STEPS = 16  # sub-blocks at most
WORK = 6 * STEPS + 4  # rows of lanes that a search needs


@inner
def search(x, h, signed, top, spans, moves, scale, sub_scale, sub_min, work):
    """The best scales of a superblock of sixteen rows; False for a weight float16 lacks.

    Args:
        x: scratch [256, 16], the weights.
        h: float32 [256], their importance.
        signed: whether they are 6-bit weights.
        top: highest level: 15, 31, or 31 of -32 to 31.
        spans: of ``SPANS``, or ``TARGETS`` when signed.
        moves: of ``MOVES``; unused when signed.
        scale: scratch [2, 16]; becomes d and dmin, float16 values.
        sub_scale: scratch [16, 16]; its first rows become the codes of the sub-blocks' scales.
        sub_min: scratch [16, 16]; the same for their offsets.
        work: scratch [WORK, 16].
    """
    if signed:
        return _search_signed(x, h, top, spans, scale, sub_scale, work)
    return _search_shifted(x, h, top, spans, moves, scale, sub_scale, sub_min, work)


@inner
def _search_shifted(x, h, top, spans, moves, scale, sub_scale, sub_min, work):
    zero = splat(ZERO)
    s, m, sums = work[:STEPS], work[STEPS : 2 * STEPS], work[2 * STEPS : 4 * STEPS]
    sub_scales, sub_mins = work[4 * STEPS : 5 * STEPS], work[5 * STEPS : 6 * STEPS]
    pair, extent = work[6 * STEPS : 6 * STEPS + 2], work[6 * STEPS + 2 :]
    bad, widest, deepest = zero, zero, zero
    for g in range(8):
        bad = most(bad, survey(x, h, g, sums, extent))
        fit_shifted(x, h, g, top, spans, moves, s, m, sums, extent)
        widest = most(widest, load(s, g))
        deepest = most(deepest, load(m, g))
    store(pair, 0, half(widest / splat(TOP_CODE)))
    store(pair, 1, half(deepest / splat(TOP_CODE)))
    best = splat(FAR)
    for turn in range(ROUNDS):
        if turn:
            _refit_shifted(x, h, top, sub_scales, sub_mins, sums, pair, s, m)
        error = _code_shifted(x, h, top, s, m, sums, pair, sub_scales, sub_mins)
        for g in range(8):
            store(sub_scale, g, where_above(best, error, load(sub_scales, g), load(sub_scale, g)))
            store(sub_min, g, where_above(best, error, load(sub_mins, g), load(sub_min, g)))
        for row in range(2):
            store(scale, row, where_above(best, error, load(pair, row), load(scale, row)))
        best = where_above(best, error, error, best)
    return not any_above(bad, zero)


@inner
def survey(x, h, g, sums, extent):
    """Sum h x and 1 / sum h of sub-block g, middle and width of its range with 0.

    Returns a vector above 0 for weights that float16 lacks.
    """
    zero, one, start = splat(ZERO), splat(ONE), 32 * g
    low, high, bad, sx, total = zero, load(x, start), zero, zero, ZERO
    for j in range(start, start + 32):
        value = load(x, j)
        low = where_above(low, value, value, low)
        high = most(high, value)
        bad = most(bad, where_within(absolute(value), splat(LARGEST), zero, one))
        sx = sx + splat(h[j]) * value
        total = total + h[j]
    width = high - low
    store(sums, 2 * g, sx)
    store(sums, 2 * g + 1, ratio(one, splat(total)))
    store(extent, 0, low + width * splat(np.float32(0.5)))
    store(extent, 1, where_above(splat(FLAT), width, zero, width))
    return bad


@inner
def fit_shifted(x, h, g, top, spans, moves, s, m, sums, extent):
    """Scale and offset of sub-block g by least squares, x = s q - m, as its row of s and m."""
    zero, one, start = splat(ZERO), splat(ONE), 32 * g
    sx, share = load(sums, 2 * g), load(sums, 2 * g + 1)
    middle, width = load(extent, 0), load(extent, 1)
    best, scale, offset = splat(-FAR), zero, zero
    trials = spans.size * moves.size
    for trial in range(trials + 1):
        if trial < trials:
            inverse = ratio(splat(spans[trial // moves.size]), width)
            centre = top * np.float32(0.5) - moves[trial % moves.size]
            base = splat(centre) - middle * inverse
        else:
            inverse = ratio(one, where_above(scale, splat(FLAT), scale, zero))
            base = offset * inverse
        q1, q2, qx = zero, zero, zero
        for j in range(start, start + 32):
            value = load(x, j)
            q = nearest(value * inverse + base, zero, splat(top))
            hq = splat(h[j]) * q
            q1 = q1 + hq
            q2 = q2 + hq * q
            qx = qx + hq * value
        mean = q1 * share
        along = qx - mean * sx
        spread = q2 - mean * q1
        fitted = where_above(spread, q2 * splat(SAME), ratio(most(along, zero), spread), zero)
        lowered = (fitted * q1 - sx) * share
        through = ratio(most(qx, zero), q2)  # the best scale without an offset
        gain = where_above(zero, lowered, through * qx - (sx * share) * sx, fitted * along)
        fitted = where_above(zero, lowered, through, fitted)
        scale = where_above(gain, best, fitted, scale)
        offset = where_above(gain, best, most(lowered, zero), offset)
        best = where_above(gain, best, gain, best)
    store(s, g, scale)
    store(m, g, offset)


@inner
def _code_shifted(x, h, top, s, m, sums, pair, sub_scale, sub_min):
    """The best codes of scales and offsets under d and dmin; the error they leave."""
    whole = splat(ZERO)
    for g in range(8):
        whole = whole + code_shifted(x, h, g, top, s, m, sums, pair, sub_scale, sub_min)
    return whole


@inner
def code_shifted(x, h, g, top, s, m, sums, pair, sub_scale, sub_min):
    """The same for sub-block g."""
    zero, one, limit = splat(ZERO), splat(ONE), splat(TOP_CODE)
    d, dmin = load(pair, 0), load(pair, 1)
    sx, share, start = load(sums, 2 * g), load(sums, 2 * g + 1), 32 * g
    first = nearest(ratio(load(s, g), d), zero, limit)
    best, chosen, moved = splat(FAR), zero, zero
    for beside in range(3):
        code = nearest(first + splat(np.float32(beside - 1)), zero, limit)
        size = d * code
        inverse = ratio(one, size)
        base = load(m, g) * inverse
        q1 = zero
        for j in range(start, start + 32):
            q1 = q1 + splat(h[j]) * nearest(load(x, j) * inverse + base, zero, splat(top))
        below = nearest(ratio((size * q1 - sx) * share, dmin), zero, limit)
        offset = dmin * below
        base = offset * inverse
        error = zero
        for j in range(start, start + 32):
            value = load(x, j)
            miss = (value - size * nearest(value * inverse + base, zero, splat(top))) + offset
            error = error + (splat(h[j]) * miss) * miss
        chosen = where_above(best, error, code, chosen)
        moved = where_above(best, error, below, moved)
        best = where_above(best, error, error, best)
    store(sub_scale, g, chosen)
    store(sub_min, g, moved)
    return best


@inner
def _refit_shifted(x, h, top, sub_scale, sub_min, sums, pair, s, m):
    """The least-squares d and dmin of all codes, rounded, and the scales they give."""
    zero, one = splat(ZERO), splat(ONE)
    d, dmin = load(pair, 0), load(pair, 1)
    aa, ab, bb, xa, xb = (
        zero,
        zero,
        zero,
        zero,
        zero,
    )  # a = sub_scale q, b = sub_min, x = d a - dmin b
    for g in range(8):
        code, below, start = load(sub_scale, g), load(sub_min, g), 32 * g
        inverse = ratio(one, d * code)
        base = (dmin * below) * inverse
        q1, q2, qx, total = zero, zero, zero, zero
        for j in range(start, start + 32):
            value = load(x, j)
            q = nearest(value * inverse + base, zero, splat(top))
            hq = splat(h[j]) * q
            q1 = q1 + hq
            q2 = q2 + hq * q
            qx = qx + hq * value
            total = total + splat(h[j])
        aa = aa + (code * code) * q2
        ab = ab + (code * below) * q1
        bb = bb + (below * below) * total
        xa = xa + code * qx
        xb = xb + below * load(sums, 2 * g)
    apart = aa * bb - ab * ab
    least = (aa * bb) * splat(SAME)
    d = where_above(apart, least, half(most(ratio(xa * bb - xb * ab, apart), zero)), d)
    dmin = where_above(apart, least, half(most(ratio(xa * ab - xb * aa, apart), zero)), dmin)
    store(pair, 0, d)
    store(pair, 1, dmin)
    for g in range(8):
        store(s, g, d * load(sub_scale, g))
        store(m, g, dmin * load(sub_min, g))


@inner
def _search_signed(x, h, top, targets, scale, sub_scale, work):
    zero = splat(ZERO)
    s, sub_scales, pair = work[:STEPS], work[4 * STEPS : 5 * STEPS], work[6 * STEPS :]
    bad, widest = zero, zero
    for g in range(16):
        bad = most(bad, fit_signed(x, h, g, top, targets, s))
        found = load(s, g)
        widest = where_above(absolute(found), absolute(widest), found, widest)
    store(pair, 0, half(widest / splat(LOWEST)))
    best = splat(FAR)
    store(scale, 1, zero)
    for turn in range(ROUNDS):
        if turn:
            _refit_signed(x, h, top, sub_scales, pair, s)
        error = _code_signed(x, h, top, s, pair, sub_scales)
        for g in range(16):
            store(sub_scale, g, where_above(best, error, load(sub_scales, g), load(sub_scale, g)))
        store(scale, 0, where_above(best, error, load(pair, 0), load(scale, 0)))
        best = where_above(best, error, error, best)
    return not any_above(bad, zero)


@inner
def fit_signed(x, h, g, top, targets, s):
    """The scale of sub-block g by least squares, x = s q; above 0 for unfit weights."""
    zero, one, start = splat(ZERO), splat(ONE), 16 * g
    bad, peak = zero, zero
    for j in range(start, start + 16):
        value = load(x, j)
        peak = where_above(absolute(value), absolute(peak), value, peak)
        bad = most(bad, where_within(absolute(value), splat(LARGEST), zero, one))
    peak = where_above(absolute(peak), splat(FLAT), peak, zero)
    best, scale = splat(-FAR), zero
    for trial in range(targets.size + 1):
        if trial < targets.size:
            inverse = ratio(splat(-targets[trial]), peak)
        else:
            inverse = ratio(one, scale)
        q2, qx = zero, zero
        for j in range(start, start + 16):
            value = load(x, j)
            q = nearest(value * inverse, splat(-top - ONE), splat(top))
            hq = splat(h[j]) * q
            q2 = q2 + hq * q
            qx = qx + hq * value
        fitted = ratio(qx, q2)
        gain = fitted * qx
        scale = where_above(gain, best, fitted, scale)
        best = where_above(gain, best, gain, best)
    store(s, g, scale)
    return bad


@inner
def _code_signed(x, h, top, s, pair, sub_scale):
    """The best codes of scales under d; the error they leave."""
    whole = splat(ZERO)
    for g in range(16):
        whole = whole + code_signed(x, h, g, top, s, pair, sub_scale)
    return whole


@inner
def code_signed(x, h, g, top, s, pair, sub_scale):
    """The same for sub-block g."""
    zero, one = splat(ZERO), splat(ONE)
    d = load(pair, 0)
    first, start = nearest(ratio(load(s, g), d), splat(LOWEST), splat(HIGHEST)), 16 * g
    best, chosen = splat(FAR), zero
    for beside in range(3):
        code = first + splat(np.float32(beside - 1))
        code = nearest(code, splat(LOWEST), splat(HIGHEST))
        size = d * code
        inverse = ratio(one, size)
        error = zero
        for j in range(start, start + 16):
            value = load(x, j)
            miss = value - size * nearest(value * inverse, splat(-top - ONE), splat(top))
            error = error + (splat(h[j]) * miss) * miss
        chosen = where_above(best, error, code, chosen)
        best = where_above(best, error, error, best)
    store(sub_scale, g, chosen)
    return best


@inner
def _refit_signed(x, h, top, sub_scale, pair, s):
    """The least-squares d of all codes, rounded, and the scales it gives."""
    zero, one = splat(ZERO), splat(ONE)
    d, aa, xa = load(pair, 0), zero, zero
    for g in range(16):
        code, start = load(sub_scale, g), 16 * g
        inverse = ratio(one, d * code)
        q2, qx = zero, zero
        for j in range(start, start + 16):
            value = load(x, j)
            q = nearest(value * inverse, splat(-top - ONE), splat(top))
            hq = splat(h[j]) * q
            q2 = q2 + hq * q
            qx = qx + hq * value
        aa = aa + (code * code) * q2
        xa = xa + code * qx
    d = where_above(aa, zero, half(ratio(xa, aa)), d)
    store(pair, 0, d)
    for g in range(16):
        store(s, g, d * load(sub_scale, g))


@inner
def choose_codes(x, signed, top, scale, sub_scale, sub_min, codes):
    """Fill in codes, scratch [256, 16] of whole numbers from 0, under the scales of a search."""
    zero, one, group = splat(ZERO), splat(ONE), 16 if signed else 32
    low = splat(-top - ONE) if signed else zero
    for g in range(KQUANT_BLOCK // group):
        inverse = ratio(one, load(scale, 0) * load(sub_scale, g))
        base = (load(scale, 1) * load(sub_min, g)) * inverse if not signed else zero
        for j in range(g * group, (g + 1) * group):
            store(codes, j, nearest(load(x, j) * inverse + base, low, splat(top)) - low)
