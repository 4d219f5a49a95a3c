"""Search and refit of the grids with an offset in torch operations, all rows at once.

The arithmetic of ``lfmq.quant.affine.search`` and ``lfmq.quant.affine.refit``, but for sums, which
torch orders itself. N rows, g columns of a group, M moves of a candidate.
"""

import torch

from lfmq.quant.torch_math import divide, half, inverse_of

_FLAT = 2.0**-25  # as in lfmq.quant.affine.search
_SAME = 2.0**-16
_ALIKE = 2.0**-16

Slopes = tuple[torch.Tensor, torch.Tensor]
Curves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def search_bias(
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


def search_zero(
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


def sums(level: torch.Tensor, gradient: torch.Tensor, h: torch.Tensor) -> tuple[Slopes, Curves]:
    """Slopes -p'g and -1'g and curvatures p'Hp, p'H1 and 1'H1 of levels p [N, g]."""
    hp = level @ h
    slopes = (-(level * gradient).sum(1), -gradient.sum(1))
    return slopes, ((level * hp).sum(1), hp.sum(1), h.sum())


def refit_bias(
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


def refit_zero(
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
