"""GPTQ's steps on K-quants in torch operations, all rows at once.

The algorithm of ``lfmq.quant.kquant.kernels``, sub-block by sub-block. Sums are in torch's order,
and d and dmin of a block are those of its largest scales, without the second fit of the compiled
search: losses are equal to 2 %, codes are not (tests/quant/kquant/test_torch_body.py). N rows,
sub-blocks of g columns, M rows of sub-blocks.
"""

import torch

from lfmq.quant.grid import Form
from lfmq.quant.kquant.search import MOVES, SPANS, TARGETS
from lfmq.quant.torch_math import divide, half, inverse_of

# As in lfmq.quant.kquant.search.
_FLAT = 2.0**-25
_SAME = 2.0**-16
_ALIKE = 2.0**-16

T = torch.Tensor


def nearest(value: T, form: Form) -> T:
    """The nearest levels."""
    zero = form.zero_point
    return value.round().clamp(-zero, form.highest_code - zero)


def _nearest_sub_scale(value: T, form: Form) -> T:
    return value.round().clamp(0, 63) if form.has_offset else value.round().clamp(-128, 127)


def search_block(x: T, h: T, form: Form, pair: T) -> None:
    """Fill in d and dmin, ``pair`` [2, N], of a block [N, 256] with importance h [256]."""
    group = form.group
    parts, importance = x.reshape(-1, group), h.reshape(-1, group).repeat(len(x), 1)
    s, m = (found.view(len(x), -1) for found in _fit(parts, importance, form))
    if not form.has_offset:
        widest = s.gather(1, s.abs().argmax(1, keepdim=True))[:, 0]
        pair[0], pair[1] = half(widest / -128), 0
    else:
        pair[0], pair[1] = half(s.amax(1) / 63), half(m.amax(1) / 63)


def choose(x: T, h: T, form: Form, pair: T) -> tuple[T, T]:
    """sub_scale and sub_min [N] of a sub-block [N, g] with importance h [g]."""
    d, dmin = pair
    s, m = _fit(x, h[None], form)
    first = (s * inverse_of(d)).round()
    best, sub_scale = torch.full_like(d, torch.inf), torch.zeros_like(d)
    sub_min = torch.zeros_like(d)
    for beside in (-1, 0, 1):
        code = _nearest_sub_scale(first + beside, form)
        size = d * code
        inverse, lowered = inverse_of(size), torch.zeros_like(code)
        if form.has_offset:
            q = nearest((x + m[:, None]) * inverse[:, None], form)
            wanted = (h * (size[:, None] * q - x)).sum(1) / h.sum()
            lowered = divide(wanted, dmin).round().clamp(0, 63)
        below = (dmin * lowered)[:, None]
        q = nearest((x + below) * inverse[:, None], form)
        error = (h * (x - q * size[:, None] + below).square()).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        sub_scale = torch.where(better, code, sub_scale)
        sub_min = torch.where(better, lowered, sub_min)
    return sub_scale, sub_min


def _fit(x: T, h: T, form: Form) -> tuple[T, T]:
    """Real scale and offset [M] of sub-blocks [M, g], x = s q - m; h [M, g] or [1, g]."""
    return _fit_shifted(x, h, form) if form.has_offset else _fit_signed(x, h, form)


def _fit_shifted(x: T, h: T, form: Form) -> tuple[T, T]:
    top, bits = form.highest_code, form.bits
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    width = torch.where(high - low >= _FLAT, high - low, 0)
    middle = low + width * 0.5
    total, sx = h.sum(1), (h * x).sum(1)
    best, s, m = (torch.full_like(low, value) for value in (-torch.inf, 0, 0))
    trials = [(t, move) for t in SPANS[bits].tolist() for move in MOVES[bits].tolist()]
    for trial in (*trials, None):
        if trial is None:
            inverse = inverse_of(s)
            base = m * inverse
        else:
            inverse = divide(torch.full_like(width, trial[0]), width)
            base = top * 0.5 - trial[1] - middle * inverse
        q = (x * inverse[:, None] + base[:, None]).round().clamp(0, top)
        hq = h * q
        q1, q2, qx = hq.sum(1), (hq * q).sum(1), (hq * x).sum(1)
        along, spread = qx - q1 * sx / total, q2 - q1 * q1 / total
        fitted = torch.where(spread > _SAME * q2, along.clamp(min=0) / spread, 0)
        lowered = (fitted * q1 - sx) / total
        through = divide(qx.clamp(min=0), q2)
        gain = torch.where(lowered < 0, through * qx - sx * sx / total, fitted * along)
        fitted = torch.where(lowered < 0, through, fitted)
        better = gain > best
        best, s = torch.where(better, gain, best), torch.where(better, fitted, s)
        m = torch.where(better, lowered.clamp(min=0), m)
    return s, m


def _fit_signed(x: T, h: T, form: Form) -> tuple[T, T]:
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    best, s = torch.full_like(peak, -torch.inf), torch.zeros_like(peak)
    for target in (*TARGETS.tolist(), None):
        inverse = inverse_of(s) if target is None else divide(torch.full_like(s, -target), peak)
        q = nearest(x * inverse[:, None], form)
        qx, q2 = (h * q * x).sum(1), (h * q * q).sum(1)
        fitted = divide(qx, q2)
        better = fitted * qx > best
        best, s = torch.where(better, fitted * qx, best), torch.where(better, fitted, s)
    return s, torch.zeros_like(s)


def refit_scales(
    d: T,
    dmin: T,
    along: T,
    sub_min: T,
    gradient: T,
    h: T,
    *,
    signed: bool,
) -> T:
    """Move d and dmin [N] of a block to float16 values of less loss, in place.

    Args:
        d: what multiplies ``along``.
        dmin: what multiplies ``sub_min`` and lowers weights.
        along: sub_scale times code of each column, [N, 256].
        sub_min: of each column, [N, 256].
        gradient: half the loss's, [N, 256].
        h: moments within the block, [256, 256].
        signed: whether the grid has 6 bits and no dmin.

    Returns:
        What was added to the weights, [N, 256].
    """
    ha, hb = along @ h, sub_min @ h
    aa, ab, bb = (along * ha).sum(1), -(sub_min * ha).sum(1), (sub_min * hb).sum(1)
    down_a, down_b = -(along * gradient).sum(1), (sub_min * gradient).sum(1)
    rest = aa * bb - ab * ab
    joint = (rest > _ALIKE * aa * bb) & (bb > 0)
    step = torch.where(joint, (bb * down_a - ab * down_b) / rest, divide(down_a, aa))
    new_d = half(d + step if signed else (d + step).clamp(min=0))
    by = new_d - d
    new_dmin = half((dmin + divide(down_b - ab * by, bb)).clamp(min=0))
    up = new_dmin - dmin
    loss = by * (by * aa - 2 * down_a) + up * (up * bb + 2 * (by * ab - down_b))
    better = (loss < 0) & (new_d != 0)
    by, up = torch.where(better, by, 0), torch.where(better, up, 0)
    d += by
    dmin += up
    return along * by[:, None] - sub_min * up[:, None]


def refit_codes(q: T, g: T, h: T, form: Form, pair: T, now: tuple[T, T]) -> tuple[T, T]:
    """sub_scale and sub_min [N] moved to whole numbers of less loss.

    Args:
        q: levels [N, g] of a sub-block.
        g: gradient [N, g], half the loss's.
        h: moments within the sub-block, [g, g].
        form: of the weight.
        pair: d and dmin, [2, N].
        now: what they are.
    """
    (d, dmin), (sub_scale, sub_min) = pair, now
    hq = q @ h
    aa, ab, bb = (q * hq).sum(1), hq.sum(1), h.sum()
    down_a, down_b = -(q * g).sum(1), -g.sum(1)
    move, rest = divide(down_a, aa), aa * bb - ab * ab
    if form.has_offset:
        joint = (bb * down_a - ab * down_b) / rest
        move = torch.where(rest > _ALIKE * aa * bb, joint, move)
    below = (sub_scale + move * inverse_of(d) - 0.5).round()
    best, new_scale, new_min = torch.zeros_like(d), sub_scale, sub_min
    for trial in (sub_scale, below, below + 1):
        candidate, other = _nearest_sub_scale(trial, form), sub_min
        by = d * (candidate - sub_scale)
        if form.has_offset:
            wanted = sub_min - (down_b - ab * by) / bb * inverse_of(dmin)
            other = wanted.round().clamp(0, 63)
        up = dmin * (sub_min - other)
        loss = by * (by * aa - 2 * down_a) + up * (up * bb + 2 * (by * ab - down_b))
        better = loss < best
        best = torch.where(better, loss, best)
        new_scale = torch.where(better, candidate, new_scale)
        new_min = torch.where(better, other, new_min)
    return new_scale, new_min
