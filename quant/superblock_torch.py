"""GPTQ and coordinate descent on the superblock grid in torch operations, all rows at once.

The arithmetic of ``lfmq.quant.superblock_gptq``, but for sums, which torch orders itself: nearly
all codes are equal (tests/quant/test_superblock_torch.py). N rows, B superblocks of 256 columns, G
groups of g columns, M = N times the groups of a superblock.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.types import Quantized, Scheme

_LARGEST = 65504.0  # largest float16
_ALIKE = 2.0**-16
SPANS = {4: (13.0, 14.0, 14.75, 15.75, 16.75, 17.75, 19.0), 5: (29.0, 30.5, 31.5, 32.5, 34.0, 36.0)}
MOVES = (-0.4, -0.2, 0.0, 0.2, 0.4)
TARGETS = {6: (30.0, 31.0, 31.5, 32.0, 32.4, 33.0)}


@dataclass
class _State:
    scheme: Scheme
    code: torch.Tensor  # [N, K], of 6 bits less the zero point
    step: torch.Tensor  # [N, G]
    shift: torch.Tensor  # [N, G]
    scale: torch.Tensor  # [N, B]
    offset: torch.Tensor  # [N, B]

    @property
    def limits(self):
        if self.scheme.has_offset:
            return 0, self.scheme.highest_code
        return -self.scheme.zero_point, self.scheme.highest_code - self.scheme.zero_point

    @property
    def top(self):
        return 63 if self.scheme.has_offset else 127

    @property
    def low(self):
        return 0 if self.scheme.has_offset else -128


def quantize_rows(
    w: NDArray[np.float32], h: torch.Tensor, factor: torch.Tensor, scheme: Scheme, sweeps: int,
    opts=None,
) -> Quantized:
    opts = opts or {}
    weight = torch.from_numpy(w).to(h.device)
    n, k = weight.shape
    g, b = k // scheme.group, k // scheme.span
    new = weight.new_zeros
    st = _State(scheme, new(n, k), new(n, g), new(n, g), new(n, b), new(n, b))
    _round_columns(weight.clone(), factor, st, opts)
    _descend(weight, h, st, sweeps, opts)
    zero = 0 if scheme.has_offset else scheme.zero_point
    out = [
        (st.code + zero).to(torch.uint8), st.scale.half(), st.offset.half(),
        st.step.to(torch.int8), st.shift.to(torch.int8),
    ]
    c, s, o, a, m = (t.cpu().numpy() for t in out)
    if not scheme.has_offset:
        o = m = None
    return Quantized(c, s, scheme, o, a, m)


def _round_columns(w, factor, st, opts):
    group, span = st.scheme.group, st.scheme.span
    for index in range(st.step.shape[1]):
        part = slice(index * group, (index + 1) * group)
        blk = part.start // span
        if part.start % span == 0:
            whole = slice(part.start, part.start + span)
            cost = 1 / factor[whole, whole].diagonal().square()
            _search_span(w[:, whole], cost / cost.mean(), st, blk, opts)
        x, u = w[:, part], factor[part, part]
        cost = 1 / u.diagonal().square()
        _search_group(x, cost / cost.mean(), st, index, blk)
        s = st.scale[:, blk] * st.step[:, index]
        base = -st.offset[:, blk] * st.shift[:, index]
        error = torch.empty_like(x)
        inv = _inverse(s)
        for c in range(group):
            q = ((x[:, c] - base) * inv).round().clamp(*st.limits)
            st.code[:, part.start + c] = q
            error[:, c] = (x[:, c] - (q * s + base)) / u[c, c]
            x[:, c + 1 :] -= error[:, c, None] * u[c, c + 1 :]
        w[:, part.stop :] -= error @ factor[part, part.stop :]


def _search_span(x, h, st, blk, opts):
    n, g = len(x), st.scheme.group
    groups = x.reshape(-1, g)  # [N * S, g]
    hh = h.reshape(1, -1, g).expand(n, -1, -1).reshape(-1, g)
    if st.scheme.has_offset:
        s, m = (v.view(n, -1) for v in _real_offset(groups, hh, st))
        room = opts.get("room", 63)
        scale = _half(s.amax(1) / room)
        offset = _half(m.amax(1) / room)
    else:
        s = _real_symmetric(groups, hh, st).view(n, -1)
        big = s.gather(1, s.abs().argmax(1, keepdim=True))[:, 0]
        scale = _half(big / -128)
        m = torch.zeros_like(s)
        offset = torch.zeros_like(scale)
    for _ in range(opts.get("refits", 2)):
        step = (s * _inverse(scale)[:, None]).round().clamp(st.low, st.top)
        shift = (m * _inverse(offset)[:, None]).round().clamp(0, 63)
        ss, bb = (scale[:, None] * step).reshape(-1, 1), -(offset[:, None] * shift).reshape(-1, 1)
        q = ((groups - bb) * _inverse(ss)).round().clamp(*st.limits)
        p = (q.view(n, -1, g) * step[..., None]).reshape(n, -1)
        r = -shift.repeat_interleave(g, 1)
        pp, pr, rr = ((h * a * b).sum(1) for a, b in ((p, p), (p, r), (r, r)))
        xp, xr = (h * x * p).sum(1), (h * x * r).sum(1)
        det = pp * rr - pr * pr
        ok = det > 1e-5 * pp * rr
        sc = torch.where(ok, (rr * xp - pr * xr) / det, _divide(xp - pr * offset, pp))
        scale = _half(sc)
        offset = _half(_divide(xr - pr * scale, rr))
    st.scale[:, blk], st.offset[:, blk] = scale, offset


def _search_group(x, h, st, index, blk):
    d, dm = st.scale[:, blk], st.offset[:, blk]
    hh = h[None]
    best = torch.full_like(d, torch.inf)
    if st.scheme.has_offset:
        s, m = _real_offset(x, hh, st)
    else:
        s, m = _real_symmetric(x, hh, st), torch.zeros_like(d)
    step0 = (s * _inverse(d)).round()
    shift0 = (m * _inverse(dm)).round()
    bs, bm = step0.clamp(st.low, st.top), shift0.clamp(0, 63)
    for ds in (-1, 0, 1):
        for dsh in ((-1, 0, 1) if st.scheme.has_offset else (0,)):
            step = (step0 + ds).clamp(st.low, st.top)
            shift = (shift0 + dsh).clamp(0, 63)
            a, b = d * step, -dm * shift
            q = ((x - b[:, None]) * _inverse(a)[:, None]).round().clamp(*st.limits)
            e = (hh * (x - q * a[:, None] - b[:, None]).square()).sum(1)
            better = e < best
            best = torch.where(better, e, best)
            bs, bm = torch.where(better, step, bs), torch.where(better, shift, bm)
    st.step[:, index], st.shift[:, index] = bs, bm


def _real_offset(x, h, st):
    """Real scale and min >= 0 of groups."""
    top = st.scheme.highest_code
    low, high = x.amin(1).clamp(max=0), x.amax(1)
    width = (high - low).clamp(min=0)
    sh, sx = h.sum(1), (h * x).sum(1)
    best = torch.full_like(low, -1)
    s, m = torch.zeros_like(low), (-low).clamp(min=0)

    def fit(q):
        hq = h * q
        sq, sqq, sqx = hq.sum(1), (hq * q).sum(1), (hq * x).sum(1)
        det = sh * sqq - sq * sq
        a = torch.where(det > 1e-5 * sh * sqq, (sh * sqx - sq * sx) / det, 0).clamp(min=0)
        b = (sx - a * sq) / sh
        plain = b > 0
        a = torch.where(plain, _divide(sqx, sqq).clamp(min=0), a)
        b = torch.where(plain, 0, b)
        gain = 2 * (a * sqx + b * sx) - (a * a * sqq + 2 * a * b * sq + b * b * sh)
        return a, -b, gain

    for t in SPANS[st.scheme.bits]:
        inv = _divide(torch.full_like(width, t), width)
        for move in MOVES:
            q = ((x - low[:, None]) * inv[:, None] + move - (t - top) / 2).round().clamp(0, top)
            a, b, gain = fit(q)
            better = gain > best
            best, s, m = (torch.where(better, u, v) for u, v in ((gain, best), (a, s), (b, m)))
    for _ in range(2):
        q = ((x + m[:, None]) * _inverse(s)[:, None]).round().clamp(0, top)
        a, b, gain = fit(q)
        better = gain > best
        best, s, m = (torch.where(better, u, v) for u, v in ((gain, best), (a, s), (b, m)))
    return s, m


def _real_symmetric(x, h, st):
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    best, s = torch.full_like(peak, -1), torch.zeros_like(peak)

    def fit(inv):
        q = (x * inv[:, None]).round().clamp(*st.limits)
        xq, qq = (h * q * x).sum(1), (h * q * q).sum(1)
        a = _divide(xq, qq)
        return a, a * xq

    for t in TARGETS[6]:
        a, gain = fit(_divide(torch.full_like(peak, -t), peak))
        better = gain > best
        best, s = torch.where(better, gain, best), torch.where(better, a, s)
    return fit(_inverse(s))[0]


def _descend(w, h, st, sweeps, opts):
    group, span = st.scheme.group, st.scheme.span
    each = span // group
    gradient = (_values(st) - w) @ h
    for index in list(range(st.step.shape[1])) * sweeps:
        part = slice(index * group, (index + 1) * group)
        blk = index // each
        if index % each == 0 and opts.get("whole", True):
            whole = slice(part.start, part.start + span)
            spread = [c[:, blk*each:(blk+1)*each].repeat_interleave(group, 1) for c in (st.step, st.shift)]
            change = refit_scales(st.scale[:, blk], st.offset[:, blk], st.code[:, whole]*spread[0], spread[1], gradient[:, whole], h[whole, whole], signed=not st.scheme.has_offset)
            gradient += change @ h[whole]
        change = _descend_group(gradient[:, part].clone(), st, index, blk, h[part, part])
        gradient += change @ h[part]


def _values(st):
    group, each = st.scheme.group, st.scheme.span // st.scheme.group
    s = st.scale.repeat_interleave(each, 1) * st.step
    b = -st.offset.repeat_interleave(each, 1) * st.shift
    return st.code * s.repeat_interleave(group, 1) + b.repeat_interleave(group, 1)


def refit_scales(
    d: torch.Tensor,
    dmin: torch.Tensor,
    along: torch.Tensor,
    shift: torch.Tensor,
    gradient: torch.Tensor,
    h: torch.Tensor,
    *,
    signed: bool,
) -> torch.Tensor:
    """Move d and dmin [N] of a superblock to float16 values of less loss, in place.

    Args:
        d: what multiplies ``along``.
        dmin: what multiplies ``shift`` and lowers weights.
        along: step times code of each column, [N, 256].
        shift: of each column, [N, 256].
        gradient: half the loss's, [N, 256].
        h: moments within the superblock, [256, 256].
        signed: whether the grid has 6 bits and no dmin.

    Returns:
        What was added to the weights, [N, 256].
    """
    ha, hb = along @ h, shift @ h
    aa, ab, bb = (along * ha).sum(1), -(shift * ha).sum(1), (shift * hb).sum(1)
    down_a, down_b = -(along * gradient).sum(1), (shift * gradient).sum(1)
    rest = aa * bb - ab * ab
    joint = (rest > _ALIKE * aa * bb) & (bb > 0)
    step = torch.where(joint, (bb * down_a - ab * down_b) / rest, _divide(down_a, aa))
    new_d = _half(d + step if signed else (d + step).clamp(min=0))
    by = new_d - d
    new_dmin = _half((dmin + _divide(down_b - ab * by, bb)).clamp(min=0))
    up = new_dmin - dmin
    loss = by * (by * aa - 2 * down_a) + up * (up * bb + 2 * (by * ab - down_b))
    better = (loss < 0) & (new_d != 0)
    by, up = torch.where(better, by, 0), torch.where(better, up, 0)
    d += by
    dmin += up
    return along * by[:, None] - shift * up[:, None]


def _descend_group(g, st, index, blk, h):
    group = st.scheme.group
    part = slice(index * group, (index + 1) * group)
    q, step, shift = st.code[:, part], st.step[:, index], st.shift[:, index]
    d, dm = st.scale[:, blk], st.offset[:, blk]
    hq = q @ h
    ss, so, oo = (q * hq).sum(1), hq.sum(1), h.sum()
    down_s, down_o = -(q * g).sum(1), -g.sum(1)
    det = ss * oo - so * so
    both = (det > 2**-16 * ss * oo) & (dm != 0)
    real = torch.where(both, (oo * down_s - so * down_o) / det, _divide(down_s, ss))
    want = step + real * _inverse(d)
    best = torch.zeros_like(d)
    bs, bm = step.clone(), shift.clone()
    for cand in (step, want.floor(), want.ceil()):
        cand = cand.clamp(st.low, st.top)
        ds = d * (cand - step)
        if st.scheme.has_offset:
            move = (down_o - so * ds) / oo
            csh = (shift - move * _inverse(dm)).round().clamp(0, 63)
        else:
            csh = shift
        do = -dm * (csh - shift)
        loss = ds * (ds * ss - 2 * down_s) + do * (do * oo + 2 * (ds * so - down_o))
        better = loss < best
        best = torch.where(better, loss, best)
        bs, bm = torch.where(better, cand, bs), torch.where(better, csh, bm)
    change = q * (d * (bs - step))[:, None] - (dm * (bm - shift))[:, None]
    step.copy_(bs)
    shift.copy_(bm)
    g += change @ h
    s = d * step
    inverse = _inverse(s)
    for j in range(group):
        new = (q[:, j] - g[:, j] / h[j, j] * inverse).round().clamp(*st.limits)
        moved = (new - q[:, j]) * s
        q[:, j] = new
        change[:, j] += moved
        g += moved[:, None] * h[j]
    return change


def _divide(a, b):
    return torch.where(b == 0, 0, a / b)


def _inverse(s):
    return _divide(torch.ones_like(s), s)


def _half(v):
    return v.clamp(-_LARGEST, _LARGEST).half().float()
