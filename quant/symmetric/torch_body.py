"""GPTQ and coordinate descent in torch operations, all rows at once: the body for a GPU.

The arithmetic of the compiled kernels of ``lfmq.quant.gptq`` in the same order, but for sums of a
group, which torch orders itself: nearly all codes are equal (tests/quant/test_gptq_torch.py).
N rows, G groups of g columns, K = G g.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.symmetric.search import TARGETS
from lfmq.quant.torch_math import LARGEST, divide, inverse_of
from lfmq.quant.types import Quantized, Scheme

Limits = tuple[int, int]


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
    limits = (scheme.lowest_code - scheme.zero_point, scheme.highest_code - scheme.zero_point)
    targets = torch.from_numpy(TARGETS[scheme.bits]).to(h.device)
    weight = torch.from_numpy(w).to(h.device)
    level, scale = round_columns(weight.clone(), factor, limits, targets, scheme.group)
    descend(weight, h, limits, level, scale, sweeps)
    codes = (level + scheme.zero_point).to(torch.uint8)
    return Quantized(codes.cpu().numpy(), scale.half().cpu().numpy(), scheme)


def round_columns(
    w: torch.Tensor, factor: torch.Tensor, limits: Limits, targets: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels [N, K] and scales [N, G] of a weight [N, K], which is used up.

    Args:
        w: the weight.
        factor: upper Cholesky factor of the inverse moments, [K, K].
        limits: lowest and highest level.
        targets: levels tried for the largest weight of a group.
        group: g.

    Raises:
        ValueError: a weight is NaN, Inf or beyond float16.
    """
    level = torch.empty_like(w)
    scale = w.new_empty(len(w), w.shape[1] // group)
    sound = torch.ones((), dtype=torch.bool, device=w.device)
    for index in range(scale.shape[1]):
        part = slice(index * group, (index + 1) * group)
        x, u = w[:, part], factor[part, part]
        sound &= (x.abs() <= LARGEST).all()
        cost = 1 / u.diagonal().square()
        s = search_scale(x, cost / cost.mean(), limits, targets)
        error = _round_group(x, u, s, limits, level[:, part])
        scale[:, index] = s
        w[:, part.stop :] -= error @ factor[part, part.stop :]
    if not sound:
        raise ValueError("a weight is NaN, Inf or beyond float16")
    return level, scale


def _round_group(
    x: torch.Tensor, u: torch.Tensor, s: torch.Tensor, limits: Limits, level: torch.Tensor
) -> torch.Tensor:
    """Fill in the levels [N, g] of a group; returns the error to spread, [N, g]."""
    error = torch.empty_like(x)
    inverse = inverse_of(s)
    for c in range(x.shape[1]):
        q = (x[:, c] * inverse).round().clamp(*limits)
        level[:, c] = q
        error[:, c] = (x[:, c] - q * s) / u[c, c]
        x[:, c + 1 :] -= error[:, c, None] * u[c, c + 1 :]
    return error


def search_scale(
    x: torch.Tensor, h: torch.Tensor, limits: Limits, targets: torch.Tensor
) -> torch.Tensor:
    """The best float16 scale [N] of a group [N, g] with importance h [g]; see quant/rtn.py."""
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    best, scale = torch.full_like(peak, -1), torch.zeros_like(peak)
    for target in targets:
        found, gain = _fit(x, h, divide(-target, peak), limits)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, found, scale)
    return _half(_fit(x, h, inverse_of(scale), limits)[0])


def _fit(
    x: torch.Tensor, h: torch.Tensor, inverse: torch.Tensor, limits: Limits
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares scale [N] of the levels an inverse scale gives, and what it gains."""
    q = (x * inverse[:, None]).round().clamp(*limits)
    xq, qq = (h * q * x).sum(1), (h * q * q).sum(1)
    scale = divide(xq, qq)
    return scale, scale * xq


def descend(
    w: torch.Tensor,
    h: torch.Tensor,
    limits: Limits,
    level: torch.Tensor,
    scale: torch.Tensor,
    sweeps: int,
) -> None:
    """Coordinate descent on scales [N, G] and levels [N, K] under moments h [K, K], in place."""
    group = w.shape[1] // scale.shape[1]
    q = level * scale.repeat_interleave(group, 1)
    gradient = (q - w) @ h  # [N, K], half of it
    for index in list(range(scale.shape[1])) * sweeps:
        part = slice(index * group, (index + 1) * group)
        change = _descend_group(
            gradient[:, part].clone(), level[:, part], scale[:, index], h[part, part], limits
        )
        gradient += change @ h[part]


def _descend_group(
    g: torch.Tensor, q: torch.Tensor, s: torch.Tensor, h: torch.Tensor, limits: Limits
) -> torch.Tensor:
    """Refit a group's scale, then each level; returns the change of its weights, [N, g]."""
    down, curve = -(q * g).sum(1), (q * (q @ h)).sum(1)
    fitted = _half(divide(s * curve + down, curve))
    step = fitted - s
    step = torch.where(step * (step * curve - 2 * down) < 0, step, 0)
    s += step
    change = q * step[:, None]
    g += change @ h
    inverse = inverse_of(s)
    for j in range(q.shape[1]):
        new = (q[:, j] - g[:, j] / h[j, j] * inverse).round().clamp(*limits)
        moved = (new - q[:, j]) * s
        q[:, j] = new
        change[:, j] += moved
        g += moved[:, None] * h[j]
    return change


def _half(s: torch.Tensor) -> torch.Tensor:
    return s.half().float()
