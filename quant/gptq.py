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

What a grid does with some columns is in ``lfmq.quant.symmetric.gptq`` for the symmetric grid, in
``lfmq.quant.affine.gptq`` for those with an offset a group and in ``lfmq.quant.kquant.gptq``
for K-quants.

float32 with float64 factorization. Sums over K go through BLAS: equal on one machine whatever the
number of workers, not from one kind of processor to another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.affine import torch_body as offset_torch
from lfmq.quant.affine.gptq import OffsetState
from lfmq.quant.grid import GridState
from lfmq.quant.kquant import torch_body as superblock_torch
from lfmq.quant.kquant.gptq import SuperblockState
from lfmq.quant.linalg import invert_lower
from lfmq.quant.simd import whole_lanes
from lfmq.quant.symmetric import torch_body as gptq_torch
from lfmq.quant.symmetric.gptq import SymmetricState
from lfmq.quant.types import Grid, Quantized, Scheme

# Share of the mean diagonal added to it. Ten times that of Frantar et al. 2022, section 3.3: it
# costs nothing on text like the calibration's and wins on other text (docs/quantization.md).
DAMPING = 0.1
# What they are worth: docs/quantization.md.
SWEEPS = 3
F32 = NDArray[np.float32]
_Start = Callable[[Scheme, tuple[int, ...]], GridState]
_OnDevice = Callable[[F32, torch.Tensor, torch.Tensor, Scheme, int], Quantized]


@dataclass(frozen=True, slots=True)
class FactorizedHessian:
    """Second moments of a weight's inputs, ready for :func:`quantize`; weights share them.

    Attributes:
        damped: float32 [K, K], the moments with damping on the diagonal.
        factor: float32 [K, K], upper Cholesky factor of the inverse of ``damped``.
    """

    damped: torch.Tensor
    factor: torch.Tensor


def factorize(moments: torch.Tensor, damping: float = DAMPING) -> FactorizedHessian:
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
    damped, reversed_ = h.float().contiguous(), h.flip(0, 1)
    del diagonal, h  # a wide weight's moments are what takes most memory
    lower = torch.linalg.cholesky(reversed_)
    del reversed_
    return FactorizedHessian(damped, invert_lower(lower).flip(0, 1).float().contiguous())


def quantize(
    w: F32, moments: FactorizedHessian, scheme: Scheme, *, sweeps: int = SWEEPS
) -> Quantized:
    """Quantize a weight [N, K] so that its outputs change least.

    Args:
        w: the weight; K is a multiple of the scheme's span.
        moments: of its inputs.
        scheme: its grid.
        sweeps: of coordinate descent after GPTQ.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows = len(w)
    if w.shape[1] % scheme.span:
        raise ValueError(f"rows of {w.shape[1]} do not divide into groups of {scheme.span}")
    start, on_device = _GRIDS[scheme.grid]
    if moments.damped.device.type != "cpu":
        return on_device(w, moments.damped, moments.factor, scheme, sweeps)
    w = whole_lanes(w)
    grid = start(scheme, w.shape)
    _round_columns(torch.from_numpy(w.copy()), moments, grid)
    if sweeps:
        _descend(torch.from_numpy(w), moments.damped, grid, sweeps)
    return grid.finish().map(lambda array: array[:rows])


# By grid: the state that its compiled kernels work on, and the same algorithm for a GPU.
_GRIDS: dict[Grid, tuple[_Start, _OnDevice]] = {
    "symmetric": (SymmetricState, gptq_torch.quantize_rows),
    "affine_bias": (OffsetState, offset_torch.quantize_rows),
    "affine_zero_point": (OffsetState, offset_torch.quantize_rows),
    "kquant": (SuperblockState, superblock_torch.quantize_rows),
}


def _round_columns(w: torch.Tensor, moments: FactorizedHessian, grid: GridState) -> None:
    """GPTQ: fill in the grid's arrays, using up ``w``."""
    factor = moments.factor
    costs = (1 / factor.diagonal().square()).numpy()
    error = np.empty((w.shape[0], grid.block), np.float32)
    for number, (block, parts) in enumerate(_blocks(w.shape[1], grid)):
        found = torch.from_numpy(error)
        sound = grid.search_block(number, w[:, block].numpy(), _importance(costs[block]))
        for part in parts:
            within = np.ascontiguousarray(factor[part, part].numpy())
            columns = np.ascontiguousarray(w[:, part].numpy())
            own, index = np.empty_like(columns), part.start // grid.columns
            sound &= grid.round(index, columns, within, _importance(costs[part]), own)
            error[:, part.start - block.start : part.stop - block.start] = own
            near = slice(part.stop, block.stop)
            w[:, near].addmm_(torch.from_numpy(own), factor[part, near], alpha=-1)
        if not sound:
            raise ValueError("a weight is NaN, Inf or beyond float16")
        rest = slice(block.stop, None)
        w[:, rest].addmm_(found[:, : block.stop - block.start], factor[block, rest], alpha=-1)


def _importance(cost: F32) -> F32:
    """Costs of errors in some columns, of mean 1."""
    importance: F32 = cost / cost.mean()
    return importance


def _descend(w: torch.Tensor, h: torch.Tensor, grid: GridState, sweeps: int) -> None:
    """Coordinate descent on what the grid stores, in place."""
    gradient = (torch.from_numpy(grid.values()) - w) @ h  # [N, K], half of it
    for sweep in range(sweeps):
        for number, (block, parts) in enumerate(_blocks(w.shape[1], grid)):
            found = torch.zeros(len(w), block.stop - block.start)
            shared = grid.refit_block(number, gradient[:, block], h[block, block])
            if shared is not None:
                found += shared
                gradient[:, block].addmm_(shared, h[block, block])
            for part in parts:
                within = np.ascontiguousarray(h[part, part].numpy())
                columns = np.ascontiguousarray(gradient[:, part].numpy())
                own = np.empty_like(columns)
                grid.descend(part.start // grid.columns, columns, within, own)
                moved = torch.from_numpy(own)
                found[:, part.start - block.start : part.stop - block.start] += moved
                gradient[:, block].addmm_(moved, h[part, block])
            after = slice(block.stop, None)
            gradient[:, after].addmm_(found, h[block, after])
            if sweep < sweeps - 1:  # what is before is not looked at again in the last one
                before = slice(0, block.start)
                gradient[:, before].addmm_(found, h[block, before])


def _blocks(columns: int, grid: GridState) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of columns whose changes reach all others in one product, each with its parts.

    The lazy batches of Frantar et al. 2022, section 3.2: products of many columns are faster.
    """
    for start in range(0, columns, grid.block):
        stop = min(start + grid.block, columns)
        each = grid.columns
        yield slice(start, stop), [slice(i, i + each) for i in range(start, stop, each)]
