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

What a grid does with some columns is in its folder (``lfmq.quant.state``), compiled and in torch
operations; the two loops here are the same for both, and for every grid and device.

float32 with float64 factorization. Sums over K go through BLAS: equal on one machine whatever the
number of workers, not from one kind of processor to another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.grid import LANES
from lfmq.quant.grids import GRIDS
from lfmq.quant.linalg import invert_lower
from lfmq.quant.state import UNSOUND, Body, GridState, bodies_of
from lfmq.quant.types import Quantized, Scheme, quantized

# Share of the mean diagonal added to it. Ten times that of Frantar et al. 2022, section 3.3: it
# costs nothing on text like the calibration's and wins on other text (docs/quantization.md).
DAMPING = 0.1
# What they are worth: docs/quantization.md.
SWEEPS = 3
F32 = NDArray[np.float32]


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
    w: F32,
    moments: FactorizedHessian,
    scheme: Scheme,
    *,
    sweeps: int = SWEEPS,
    body: Body | None = None,
) -> Quantized:
    """Quantize a weight [N, K] so that its outputs change least.

    Args:
        w: the weight; K is a multiple of the scheme's span.
        moments: of its inputs; where they are, the weight is quantized.
        scheme: its grid.
        sweeps: of coordinate descent after GPTQ.
        body: of the grid; when None the compiled one on a CPU, else that in torch operations.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows, columns = w.shape
    if columns % scheme.span:
        raise ValueError(f"rows of {columns} do not divide into groups of {scheme.span}")
    device = moments.damped.device
    body = body or ("compiled" if device.type == "cpu" else "torch")
    weight = torch.nn.functional.pad(torch.from_numpy(w).to(device), (0, 0, 0, -rows % LANES))
    state = bodies_of(GRIDS[scheme.grid]).states[body](scheme, len(weight), columns, device)
    _round_columns(weight.clone(), moments.factor, state)
    if sweeps:
        _descend(weight, moments.damped, state, sweeps)
    return quantized(state.finish(), scheme).map(lambda array: array[:rows])


def _round_columns(w: torch.Tensor, factor: torch.Tensor, state: GridState) -> None:
    """GPTQ: fill in the state, using up ``w``."""
    costs = (1 / factor.diagonal().square()).cpu().numpy()
    error = w.new_empty(len(w), state.block)
    for number, (block, parts) in enumerate(_blocks(w.shape[1], state)):
        state.search_block(number, w[:, block], _importance(costs[block], w.device))
        for part in parts:
            columns = w[:, part].clone(memory_format=torch.contiguous_format)
            within, cost = factor[part, part].contiguous(), _importance(costs[part], w.device)
            own = state.round(part.start // state.columns, columns, within, cost)
            error[:, part.start - block.start : part.stop - block.start] = own
            near = slice(part.stop, block.stop)
            w[:, near].addmm_(own, factor[part, near], alpha=-1)
        rest = slice(block.stop, None)
        w[:, rest].addmm_(error[:, : block.stop - block.start], factor[block, rest], alpha=-1)
    if not state.sound:
        raise ValueError(UNSOUND)


def _importance(cost: F32, device: torch.device) -> torch.Tensor:
    """Costs of errors in some columns, of mean 1; the mean is numpy's on every device."""
    return torch.from_numpy(cost / cost.mean()).to(device)


def _descend(w: torch.Tensor, h: torch.Tensor, state: GridState, sweeps: int) -> None:
    """Coordinate descent on what the state stores, in place."""
    gradient = (state.values() - w) @ h  # [N, K], half of it
    for sweep in range(sweeps):
        for number, (block, parts) in enumerate(_blocks(w.shape[1], state)):
            found = w.new_zeros(len(w), block.stop - block.start)
            shared = state.refit_block(number, gradient[:, block], h[block, block])
            if shared is not None:
                found += shared
                gradient[:, block].addmm_(shared, h[block, block])
            for part in parts:
                columns = gradient[:, part].clone(memory_format=torch.contiguous_format)
                within = h[part, part].contiguous()
                moved = state.descend(part.start // state.columns, columns, within)
                found[:, part.start - block.start : part.stop - block.start] += moved
                gradient[:, block].addmm_(moved, h[part, block])
            after = slice(block.stop, None)
            gradient[:, after].addmm_(found, h[block, after])
            if sweep < sweeps - 1:  # what is before is not looked at again in the last one
                before = slice(0, block.start)
                gradient[:, before].addmm_(found, h[block, before])


def _blocks(columns: int, state: GridState) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of columns whose changes reach all others in one product, each with its parts.

    The lazy batches of Frantar et al. 2022, section 3.2: products of many columns are faster.
    """
    for start in range(0, columns, state.block):
        stop = min(start + state.block, columns)
        each = state.columns
        yield slice(start, stop), [slice(i, i + each) for i in range(start, stop, each)]
