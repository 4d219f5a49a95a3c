"""The kernels of the grids with an offset in torch operations, all rows at once: for a GPU.

The arithmetic of ``lfmq.quant.affine.search`` and ``lfmq.quant.affine.gptq``, but for sums, which
torch orders itself: nearly all codes are equal (tests/quant/test_offset_torch.py). N rows, G
groups of g columns, K = G g, M moves of a candidate.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.affine.rtn import stored_offset
from lfmq.quant.affine.search import MOVES, SPANS
from lfmq.quant.torch_math import LARGEST, divide, half, inverse_of
from lfmq.quant.types import Quantized, Scheme

_FLAT = 2.0**-25  # as in lfmq.quant.affine.search
_SAME = 2.0**-16
_ALIKE = 2.0**-16


def quantize_rows(
    w: NDArray[np.float32],
    h: torch.Tensor,
    factor: torch.Tensor,
    scheme: Scheme,
    sweeps: int,
) -> Quantized:
    """:func:`lfmq.quant.gptq.quantize` where the moments h [K, K] and their factor are.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    weight = torch.from_numpy(w).to(h.device)
    code, s, o = _round_columns(weight.clone(), factor, scheme)
    _descend(weight, h, scheme, code, s, o, sweeps)
    offset = stored_offset(o.cpu().numpy(), scheme)
    return Quantized(code.to(torch.uint8).cpu().numpy(), s.half().cpu().numpy(), scheme, offset)


def _round_columns(
    w: torch.Tensor, factor: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], scales and offsets [N, G] of a weight [N, K], which is used up."""
    group, key = scheme.group, (scheme.grid, scheme.bits)
    spans, moves = SPANS[key].tolist(), torch.from_numpy(MOVES[key]).to(w.device)
    search = _search_affine if scheme.grid == "affine_bias" else _search_zero
    code = torch.empty_like(w)
    scale = w.new_empty(len(w), w.shape[1] // group)
    offset = torch.empty_like(scale)
    sound = torch.ones((), dtype=torch.bool, device=w.device)
    for index in range(scale.shape[1]):
        part = slice(index * group, (index + 1) * group)
        x, u = w[:, part], factor[part, part]
        sound &= (x.abs() <= LARGEST).all()
        cost = 1 / u.diagonal().square()
        s, o = search(x, cost / cost.mean(), scheme.highest_code, spans, moves)
        scale[:, index], offset[:, index] = s, o
        error = _round_group(x, u, s, _base(s, o, scheme), scheme.highest_code, code[:, part])
        w[:, part.stop :] -= error @ factor[part, part.stop :]
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    return code, scale, offset


def _base(s: torch.Tensor, o: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What code 0 stands for."""
    return o if scheme.grid == "affine_bias" else -s * o


def _round_group(
    x: torch.Tensor,
    u: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    top: int,
    code: torch.Tensor,
) -> torch.Tensor:
    """Fill in the codes [N, g] of a group; returns the error to spread, [N, g]."""
    error = torch.empty_like(x)
    inverse = inverse_of(s)
    for c in range(x.shape[1]):
        q = ((x[:, c] - b) * inverse).round().clamp(0, top)
        code[:, c] = q
        error[:, c] = (x[:, c] - (q * s + b)) / u[c, c]
        x[:, c + 1 :] -= error[:, c, None] * u[c, c + 1 :]
    return error


def _search_affine(
    x: torch.Tensor, h: torch.Tensor, top: int, spans: list[float], moves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [N] of a group [N, g] with importance h [g]."""
    low, high = x.amin(1), x.amax(1)
    width = torch.where(high - low >= _FLAT, high - low, 0)
    middle = low + (high - low) * 0.5
    u, centre, share = x - middle[:, None], top * 0.5, 1 / h.sum()
    sx = (h * u).sum(1)

    def fit(inverse: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Slope, intercept, gain and sum h p for each shift [M, N]."""
        p = (u * inverse[:, None] + shift[..., None]).round().clamp(0, top) - centre
        hp = h * p
        sp, spp, spx = hp.sum(-1), (hp * p).sum(-1), (hp * u).sum(-1)
        mean = sp * share
        spread, along = spp - mean * sp, spx - mean * sx
        s = torch.where(spread > _SAME * spp, along.clamp(min=0) / spread, 0)
        return s, (sx - s * sp) * share, s * along, sp

    shifts = (centre - moves)[:, None].expand(-1, len(x))
    found = [fit(divide(torch.full_like(width, t), width), shifts) for t in spans]
    at = torch.cat([f[2] for f in found]).argmax(0)
    s, b = (torch.cat([f[i] for f in found]).gather(0, at[None])[0] for i in (0, 1))
    sp = s
    for _ in range(2):
        inverse = inverse_of(s)
        s, b, _, sp = (value[0] for value in fit(inverse, (centre - b * inverse)[None]))
    s = half(s)
    return s, half(middle + ((sx - s * sp) * share - s * centre))


def _search_zero(
    x: torch.Tensor, h: torch.Tensor, top: int, spans: list[float], moves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [N] of a group [N, g] with importance h [g]."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    width = torch.where(high - low >= _FLAT, high - low, 0)
    first = (-low * divide(torch.full_like(width, top), width)).round().clamp(0, top)

    def fit(inverse: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scale for each zero point [M, N], and what it gains."""
        z = zero[..., None]
        p = torch.clamp((x * inverse[:, None]).round(), -z, top - z)
        hp = h * p
        xp = (hp * x).sum(-1)
        s = divide(xp, (hp * p).sum(-1))
        return s, s * xp

    tried = (first + moves[:, None]).clamp(0, top)
    found = [fit(divide(torch.full_like(width, t), width), tried) for t in spans]
    at = torch.cat([gain for _, gain in found]).argmax(0)
    s = torch.cat([scale for scale, _ in found]).gather(0, at[None])[0]
    zero = tried.gather(0, at[None] % len(moves))[0]
    s = fit(inverse_of(s), zero[None])[0][0]
    return half(s), zero


def _descend(
    w: torch.Tensor,
    h: torch.Tensor,
    scheme: Scheme,
    code: torch.Tensor,
    s: torch.Tensor,
    o: torch.Tensor,
    sweeps: int,
) -> None:
    """Coordinate descent on scales and offsets [N, G] and codes [N, K], in place."""
    group = scheme.group
    base = _base(s, o, scheme)
    q = code * s.repeat_interleave(group, 1) + base.repeat_interleave(group, 1)
    gradient = (q - w) @ h  # [N, K], half of it
    for index in list(range(s.shape[1])) * sweeps:
        part = slice(index * group, (index + 1) * group)
        g, codes = gradient[:, part].clone(), code[:, part]
        within = h[part, part]
        change = _descend_group(g, codes, s[:, index], o[:, index], within, scheme)
        gradient += change @ h[part]


def _descend_group(
    g: torch.Tensor,
    q: torch.Tensor,
    s: torch.Tensor,
    o: torch.Tensor,
    h: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:
    """Refit a group's scale and offset, then each code; returns its weights' change, [N, g]."""
    p = q if scheme.grid == "affine_bias" else q - o[:, None]
    hp = p @ h
    curves = ((p * hp).sum(1), hp.sum(1), h.sum())
    slopes = (-(p * g).sum(1), -g.sum(1))
    refit = _refit_affine if scheme.grid == "affine_bias" else _refit_zero
    new_s, new_o = refit(s, o, slopes, curves, scheme.highest_code)
    before = _base(s, o, scheme)
    change = q * (new_s - s)[:, None] + (_base(new_s, new_o, scheme) - before)[:, None]
    s.copy_(new_s)
    o.copy_(new_o)
    g += change @ h
    inverse = inverse_of(s)
    for j in range(q.shape[1]):
        new = (q[:, j] - g[:, j] / h[j, j] * inverse).round().clamp(0, scheme.highest_code)
        moved = (new - q[:, j]) * s
        q[:, j] = new
        change[:, j] += moved
        g += moved[:, None] * h[j]
    return change


Slopes = tuple[torch.Tensor, torch.Tensor]
Curves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _refit_affine(
    s: torch.Tensor, o: torch.Tensor, slopes: Slopes, curves: Curves, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 scale and offset of least loss, where that is less."""
    (down_s, down_o), (ss, so, oo) = slopes, curves
    rest = ss * oo - so * so
    step = (oo * down_s - so * down_o) / rest
    moves = (rest > _ALIKE * ss * oo) & (s + step > 0)
    new_s = half(torch.where(moves, s + step, s))
    ds = new_s - s
    new_o = half(o + torch.where(oo > 0, (down_o - so * ds) / oo, 0))
    do = new_o - o
    loss = ds * (ds * ss - 2 * down_s) + do * (do * oo + 2 * (ds * so - down_o))
    return torch.where(loss < 0, new_s, s), torch.where(loss < 0, new_o, o)


def _refit_zero(
    s: torch.Tensor, o: torch.Tensor, slopes: Slopes, curves: Curves, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 scale of least loss, then the zero point."""
    (down_s, down_o), (ss, so, oo) = slopes, curves
    new_s = half((s + torch.where(ss > 0, down_s / ss, 0)).clamp(min=0))
    ds = new_s - s
    better = (ds * (ds * ss - 2 * down_s) < 0) & (new_s > 0)
    new_s = torch.where(better, new_s, s)
    curve = oo * new_s
    move = torch.where(curve > 0, -(down_o - so * (new_s - s)) / curve, 0)
    return new_s, (o + move).round().clamp(0, top)
