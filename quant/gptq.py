"""GPTQ: rounding that lets later columns make up for earlier ones.

For a weight W [N, K] and the second moments H [K, K] of its inputs the loss is
``tr((Q - W) H (Q - W)^T)``, the squared error of its outputs. Columns are rounded one after
another and the error of each is spread over those still to come by the Cholesky factor of the
inverse of H (Frantar et al. 2022, GPTQ, algorithm 1). Deviations:

- The scale of a group is searched when its turn comes, from the compensated weights, each column
  weighted by what its error still costs after later columns have adjusted, ``1 / U[c, c]^2``.
- Sweeps of coordinate descent follow (Behdin et al. 2023, QuantEase): with all other codes fixed,
  the scale of a group and then each of its codes take the value of least loss.
- Columns keep their order, so that groups stay whole in every container.

What a grid does with one group of columns is in ``lfmq.quant.symmetric_gptq`` for the portable
grid and in ``lfmq.quant.offset_gptq`` for those with an offset.

float32 with float64 factorization. Sums over K go through BLAS: equal on one machine whatever the
number of workers, not from one kind of processor to another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant import gptq_torch, offset_gptq, offset_torch, symmetric_gptq
from lfmq.quant.offset_lanes import MOVES, SPANS
from lfmq.quant.offset_rtn import stored_offset
from lfmq.quant.symmetric_lanes import TARGETS
from lfmq.quant.triangular import invert_lower
from lfmq.quant.types import Quantized, Scheme
from lfmq.quant.vector import whole_lanes

# Share of the mean diagonal added to it. Ten times that of Frantar et al. 2022, section 3.3: it
# costs nothing on text like the calibration's and wins on other text (docs/quantization.md).
DAMPING = 0.1
# What they are worth: docs/quantization.md.
SWEEPS = 3
# Columns of a block, a multiple of every group.
_BLOCK = 128

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a weight's inputs, ready for :func:`quantize`; weights share them.

    Attributes:
        damped: float32 [K, K], the moments with damping on the diagonal.
        factor: float32 [K, K], upper Cholesky factor of the inverse of ``damped``.
    """

    damped: torch.Tensor
    factor: torch.Tensor


def factorize(moments: torch.Tensor, damping: float = DAMPING) -> Moments:
    """Damp and factorize second moments [K, K].

    An input that was never seen gets the mean diagonal, so that its weights are rounded to
    nearest. With no input seen at all the identity stands in.
    """
    h = moments.double().clone()
    diagonal = torch.diagonal(h)
    mean = diagonal.mean()
    if not mean > 0:
        diagonal += 1
        mean = diagonal.mean()
    diagonal[diagonal <= 0] = mean
    diagonal += damping * mean
    # inverse(H) = U^T U with U upper: U is the inverse of R in H = R R^T, R upper, which is the
    # lower Cholesky factor of H with rows and columns reversed, reversed again.
    u = invert_lower(torch.linalg.cholesky(h.flip(0, 1))).flip(0, 1)
    return Moments(h.float().contiguous(), u.float().contiguous())


def quantize(w: F32, moments: Moments, scheme: Scheme, *, sweeps: int = SWEEPS) -> Quantized:
    """Quantize a weight [N, K] so that its outputs change least.

    Args:
        w: the weight; K is a multiple of the scheme's group.
        moments: of its inputs.
        scheme: bits 4 or 8.
        sweeps: of coordinate descent after GPTQ.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows, group = w.shape[0], scheme.group
    if w.shape[1] % group:
        raise ValueError(f"rows of {w.shape[1]} do not divide into groups of {group}")
    if moments.damped.device.type != "cpu":
        portable = scheme.grid == "symmetric"
        on_device = gptq_torch.quantize_rows if portable else offset_torch.quantize_rows
        return on_device(w, moments.damped, moments.factor, scheme, sweeps)
    w = whole_lanes(w)
    level = np.empty((w.shape[1] // group, len(w), group), np.float32)
    grid = _GridState(
        scheme, level, np.empty(level.shape[:2], np.float32), np.zeros(level.shape[:2], np.float32)
    )
    _round_columns(torch.from_numpy(w.copy()), moments, grid)
    if sweeps:
        _descend(torch.from_numpy(w), moments.damped, grid, sweeps)
    codes = (level.transpose(1, 0, 2) + np.float32(_zero_level(scheme))).astype(np.uint8)
    half = np.ascontiguousarray(grid.scale.T).astype(np.float16)
    offset = None
    if scheme.grid != "symmetric":
        offset = stored_offset(np.ascontiguousarray(grid.offset.T), scheme)
    found = Quantized(np.ascontiguousarray(codes).reshape(w.shape), half, scheme, offset)
    return found.map(lambda array: array[:rows])


@dataclass(frozen=True, slots=True)
class _GridState:
    """A weight on its way to the grid, a group of columns after another; kernels change it.

    Attributes:
        scheme: of the weight.
        level: float32 [G, N, group], the codes; on the symmetric grid less the zero point.
        scale: float32 [G, N].
        offset: float32 [G, N], the offset or zero point; unused on the symmetric grid.
    """

    scheme: Scheme
    level: F32
    scale: F32
    offset: F32

    @property
    def limits(self) -> tuple[np.float32, np.float32]:
        """Lowest and highest level."""
        zero = _zero_level(self.scheme)
        low, high = self.scheme.lowest_code - zero, self.scheme.highest_code - zero
        return np.float32(low), np.float32(high)

    def values(self) -> F32:
        """The weights [N, K] that the levels stand for."""
        groups = self.level * self.scale[..., None]
        if self.scheme.grid == "affine":
            groups += self.offset[..., None]
        elif self.scheme.grid == "asymmetric":
            groups -= (self.scale * self.offset)[..., None]
        values: F32 = groups.transpose(1, 0, 2).reshape(self.level.shape[1], -1)
        return values

    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Search and round a group of columns; False for a weight that float16 lacks."""
        low, high = self.limits
        level, scale, offset = self.level[index], self.scale[index], self.offset[index]
        bits, grid = self.scheme.bits, self.scheme.grid
        if grid == "symmetric":
            targets = TARGETS[bits]
            sound = symmetric_gptq.round_group(
                w, factor, cost, low, high, targets, level, scale, error
            )
        else:
            spans, moves = SPANS[grid, bits], MOVES[grid, bits]
            affine = grid == "affine"
            sound = offset_gptq.round_group(
                w, factor, cost, affine, high, spans, moves, level, scale, offset, error
            )
        return bool(sound)

    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit a group of columns."""
        low, high = self.limits
        level, scale, offset = self.level[index], self.scale[index], self.offset[index]
        if self.scheme.grid == "symmetric":
            symmetric_gptq.descend_group(gradient, h, low, high, level, scale, change)
        else:
            affine = self.scheme.grid == "affine"
            offset_gptq.descend_group(gradient, h, affine, high, level, scale, offset, change)


def _zero_level(scheme: Scheme) -> int:
    """The code of level 0."""
    return scheme.zero_point if scheme.grid == "symmetric" else 0


def _round_columns(w: torch.Tensor, moments: Moments, grid: _GridState) -> None:
    """GPTQ: fill in the grid's arrays, using up ``w``."""
    factor = moments.factor
    error = np.empty((w.shape[0], _BLOCK), np.float32)
    for block, parts in _blocks(w.shape[1], grid.scheme.group):
        found = torch.from_numpy(error)
        for part in parts:
            within = np.ascontiguousarray(factor[part, part].numpy())
            cost = 1 / np.square(np.diag(within))
            columns = np.ascontiguousarray(w[:, part].numpy())
            importance = (cost / cost.mean()).astype(np.float32)
            own = np.empty_like(columns)
            if not grid.round(part.start // grid.scheme.group, columns, within, importance, own):
                raise ValueError("a weight is NaN, Inf or beyond float16")
            error[:, part.start - block.start : part.stop - block.start] = own
            near = slice(part.stop, block.stop)
            w[:, near].addmm_(torch.from_numpy(own), factor[part, near], alpha=-1)
        rest = slice(block.stop, None)
        w[:, rest].addmm_(found[:, : block.stop - block.start], factor[block, rest], alpha=-1)


def _descend(w: torch.Tensor, h: torch.Tensor, grid: _GridState, sweeps: int) -> None:
    """Coordinate descent on scales, offsets and levels, in place."""
    rows, group = w.shape[0], grid.scheme.group
    gradient = (torch.from_numpy(grid.values()) - w) @ h  # [N, K], half of it
    change = np.empty((rows, _BLOCK), np.float32)
    for sweep in range(sweeps):
        for block, parts in _blocks(w.shape[1], group):
            found = torch.from_numpy(change)[:, : block.stop - block.start]
            for part in parts:
                within = np.ascontiguousarray(h[part, part].numpy())
                columns = np.ascontiguousarray(gradient[:, part].numpy())
                own = np.empty_like(columns)
                grid.descend(part.start // group, columns, within, own)
                change[:, part.start - block.start : part.stop - block.start] = own
                gradient[:, block].addmm_(torch.from_numpy(own), h[part, block])
            after = slice(block.stop, None)
            gradient[:, after].addmm_(found, h[block, after])
            if sweep < sweeps - 1:  # what is before is not looked at again in the last one
                before = slice(0, block.start)
                gradient[:, before].addmm_(found, h[block, before])


def _blocks(columns: int, group: int) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of columns whose changes reach all others in one product, each with its groups.

    The lazy batches of Frantar et al. 2022, section 3.2: products of many columns are faster.
    """
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        yield slice(start, stop), [slice(i, i + group) for i in range(start, stop, group)]
