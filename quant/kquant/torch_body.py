"""GPTQ and coordinate descent on K-quants in torch operations, all rows at once: for a GPU.

The algorithm of ``lfmq.quant.kquant.gptq``, sub-block by sub-block. Sums are in torch's order,
and d and dmin of a superblock are those of its largest scales, without the second fit of the
compiled search: losses are equal to 2 %, codes are not (tests/quant/test_superblock_torch.py).
N rows, B superblocks of 256 columns, G sub-blocks of g, M rows of sub-blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.kquant.search import MOVES, SPANS, TARGETS
from lfmq.quant.torch_math import LARGEST, divide, half, inverse_of
from lfmq.quant.types import KQUANT_BLOCK, Quantized, Scheme

# As in lfmq.quant.kquant.search.
_FLAT = 2.0**-25
_SAME = 2.0**-16
_ALIKE = 2.0**-16

T = torch.Tensor


@dataclass(frozen=True, slots=True)
class _State:
    """A weight on its way to the grid; its tensors are filled in and moved in place.

    Attributes:
        scheme: of the weight.
        code: [N, K], of 6 bits less the zero point.
        step: [N, G].
        shift: [N, G].
        d: [N, B].
        dmin: [N, B].
    """

    scheme: Scheme
    code: T
    step: T
    shift: T
    d: T
    dmin: T

    @property
    def signed(self) -> bool:
        """Whether the grid has 6 bits, and no dmin."""
        return not self.scheme.has_offset

    @property
    def zero(self) -> int:
        """The code of level 0."""
        return self.scheme.zero_point if self.signed else 0

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest."""
        return -self.zero, self.scheme.highest_code - self.zero

    @property
    def steps(self) -> tuple[int, int]:
        """Lowest and highest."""
        return (-128, 127) if self.signed else (0, 63)

    def columns(self, index: int) -> slice:
        """Those of a sub-block."""
        return slice(index * self.scheme.group, (index + 1) * self.scheme.group)

    def values(self) -> T:
        """The weights [N, K]."""
        group, each = self.scheme.group, KQUANT_BLOCK // self.scheme.group
        size = self.d.repeat_interleave(each, 1) * self.step
        below = self.dmin.repeat_interleave(each, 1) * self.shift
        return self.code * size.repeat_interleave(group, 1) - below.repeat_interleave(group, 1)


def quantize_rows(
    w: NDArray[np.float32], h: T, factor: T, scheme: Scheme, sweeps: int
) -> Quantized:
    """:func:`lfmq.quant.gptq.quantize` where the moments h [K, K] and their factor are.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    weight = torch.from_numpy(w).to(h.device)
    rows, columns = weight.shape
    blocks, groups = columns // KQUANT_BLOCK, columns // scheme.group
    shapes = (columns, groups, groups, blocks, blocks)
    state = _State(scheme, *(weight.new_zeros(rows, n) for n in shapes))
    _round_columns(weight.clone(), factor, state)
    _descend(weight, h, state, sweeps)
    code = (state.code + state.zero).to(torch.uint8).cpu().numpy()
    d, dmin = (t.half().cpu().numpy() for t in (state.d, state.dmin))
    step, shift = (t.to(torch.int8).cpu().numpy() for t in (state.step, state.shift))
    if state.signed:
        return Quantized(code, d, scheme, None, step)
    return Quantized(code, d, scheme, dmin, step, shift)


def _round_columns(w: T, factor: T, state: _State) -> None:
    """Fill in the state, using up ``w``."""
    sound = torch.ones((), dtype=torch.bool, device=w.device)
    costs = 1 / factor.diagonal().square()
    for index in range(state.step.shape[1]):
        part, block = state.columns(index), index * state.scheme.group // KQUANT_BLOCK
        if part.start % KQUANT_BLOCK == 0:
            whole = slice(part.start, part.start + KQUANT_BLOCK)
            _search_block(w[:, whole], costs[whole] / costs[whole].mean(), state, block)
        x, u = w[:, part], factor[part, part]
        sound &= (x.abs() <= LARGEST).all()
        _choose(x, costs[part] / costs[part].mean(), state, index, block)
        size = state.d[:, block] * state.step[:, index]
        below = state.dmin[:, block] * state.shift[:, index]
        inverse, error = inverse_of(size), torch.empty_like(x)
        for c in range(x.shape[1]):
            q = ((x[:, c] + below) * inverse).round().clamp(*state.levels)
            state.code[:, part.start + c] = q
            error[:, c] = (x[:, c] - (q * size - below)) / u[c, c]
            x[:, c + 1 :] -= error[:, c, None] * u[c, c + 1 :]
        w[:, part.stop :] -= error @ factor[part, part.stop :]
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")


def _search_block(x: T, h: T, state: _State, block: int) -> None:
    """Search d and dmin of a superblock [N, 256] with importance h [256]."""
    group = state.scheme.group
    parts, importance = x.reshape(-1, group), h.reshape(-1, group).repeat(len(x), 1)
    s, m = (found.view(len(x), -1) for found in _fit(parts, importance, state))
    if state.signed:
        widest = s.gather(1, s.abs().argmax(1, keepdim=True))[:, 0]
        state.d[:, block] = half(widest / -128)
    else:
        state.d[:, block] = half(s.amax(1) / 63)
        state.dmin[:, block] = half(m.amax(1) / 63)


def _choose(x: T, h: T, state: _State, index: int, block: int) -> None:
    """Step and shift of a sub-block [N, g] with importance h [g]."""
    d, dmin = state.d[:, block], state.dmin[:, block]
    s, m = _fit(x, h[None], state)
    first = (s * inverse_of(d)).round()
    best = torch.full_like(d, torch.inf)
    for beside in (-1, 0, 1):
        step = (first + beside).clamp(*state.steps)
        size = d * step
        inverse, shift = inverse_of(size), torch.zeros_like(step)
        if not state.signed:
            q = ((x + m[:, None]) * inverse[:, None]).round().clamp(*state.levels)
            wanted = (h * (size[:, None] * q - x)).sum(1) / h.sum()
            shift = divide(wanted, dmin).round().clamp(0, 63)
        below = (dmin * shift)[:, None]
        q = ((x + below) * inverse[:, None]).round().clamp(*state.levels)
        error = (h * (x - q * size[:, None] + below).square()).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        state.step[:, index] = torch.where(better, step, state.step[:, index])
        state.shift[:, index] = torch.where(better, shift, state.shift[:, index])


def _fit(x: T, h: T, state: _State) -> tuple[T, T]:
    """Real scale and offset [M] of sub-blocks [M, g], x = s q - m; h [M, g] or [1, g]."""
    return _fit_signed(x, h, state) if state.signed else _fit_shifted(x, h, state)


def _fit_shifted(x: T, h: T, state: _State) -> tuple[T, T]:
    top, bits = state.levels[1], state.scheme.bits
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


def _fit_signed(x: T, h: T, state: _State) -> tuple[T, T]:
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    best, s = torch.full_like(peak, -torch.inf), torch.zeros_like(peak)
    for target in (*TARGETS.tolist(), None):
        inverse = inverse_of(s) if target is None else divide(torch.full_like(s, -target), peak)
        q = (x * inverse[:, None]).round().clamp(*state.levels)
        qx, q2 = (h * q * x).sum(1), (h * q * q).sum(1)
        fitted = divide(qx, q2)
        better = fitted * qx > best
        best, s = torch.where(better, fitted * qx, best), torch.where(better, fitted, s)
    return s, torch.zeros_like(s)


def _descend(w: T, h: T, state: _State, sweeps: int) -> None:
    """Coordinate descent on scales and codes under moments h [K, K], in place."""
    group = state.scheme.group
    each = KQUANT_BLOCK // group
    gradient = (state.values() - w) @ h  # [N, K], half of it
    for index in list(range(state.step.shape[1])) * sweeps:
        part, block = state.columns(index), index // each
        d, dmin = state.d[:, block], state.dmin[:, block]
        if index % each == 0:
            whole, mine = slice(part.start, part.start + KQUANT_BLOCK), slice(index, index + each)
            step, shift = (
                codes[:, mine].repeat_interleave(group, 1) for codes in (state.step, state.shift)
            )
            along, near = state.code[:, whole] * step, h[whole, whole]
            g = gradient[:, whole]
            moved = refit_scales(d, dmin, along, shift, g, near, signed=state.signed)
            gradient += moved @ h[whole]
        g = gradient[:, part].clone()
        gradient += _descend_group(g, state, index, block, h[part, part]) @ h[part]


def refit_scales(
    d: T,
    dmin: T,
    along: T,
    shift: T,
    gradient: T,
    h: T,
    *,
    signed: bool,
) -> T:
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
    return along * by[:, None] - shift * up[:, None]


def _descend_group(g: T, state: _State, index: int, block: int, h: T) -> T:
    """Refit step, shift and each code of a sub-block; its weights' change, [N, g]."""
    q, d = state.code[:, state.columns(index)], state.d[:, block]
    change = _refit_codes(g, q, state, index, block, h)
    g += change @ h
    size = d * state.step[:, index]
    inverse = inverse_of(size)
    for j in range(q.shape[1]):
        new = (q[:, j] - g[:, j] / h[j, j] * inverse).round().clamp(*state.levels)
        moved = (new - q[:, j]) * size
        q[:, j] = new
        change[:, j] += moved
        g += moved[:, None] * h[j]
    return change


def _refit_codes(g: T, q: T, state: _State, index: int, block: int, h: T) -> T:
    """Move step and shift to whole numbers of less loss; the weights' change, [N, g]."""
    d, dmin = state.d[:, block], state.dmin[:, block]
    step, shift = state.step[:, index], state.shift[:, index]
    hq = q @ h
    aa, ab, bb = (q * hq).sum(1), hq.sum(1), h.sum()
    down_a, down_b = -(q * g).sum(1), -g.sum(1)
    move, rest = divide(down_a, aa), aa * bb - ab * ab
    if not state.signed:
        joint = (bb * down_a - ab * down_b) / rest
        move = torch.where(rest > _ALIKE * aa * bb, joint, move)
    below = (step + move * inverse_of(d) - 0.5).round()
    best, new_step, new_shift = torch.zeros_like(d), step.clone(), shift.clone()
    for trial in (step, below, below + 1):
        candidate, other = trial.clamp(*state.steps), shift
        by = d * (candidate - step)
        if not state.signed:
            wanted = shift - (down_b - ab * by) / bb * inverse_of(dmin)
            other = wanted.round().clamp(0, 63)
        up = dmin * (shift - other)
        loss = by * (by * aa - 2 * down_a) + up * (up * bb + 2 * (by * ab - down_b))
        better = loss < best
        best = torch.where(better, loss, best)
        new_step = torch.where(better, candidate, new_step)
        new_shift = torch.where(better, other, new_shift)
    change = q * (d * (new_step - step))[:, None] - (dmin * (new_shift - shift))[:, None]
    step.copy_(new_step)
    shift.copy_(new_shift)
    return change
