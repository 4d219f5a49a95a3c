"""What GPTQ asks of a grid (``lfmq.quant.gptq``): to round some columns, and to refit them.

N rows, a multiple of 16; c columns at a time; K columns.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.types import Quantized, Scheme

F32 = NDArray[np.float32]

# Columns whose changes reach all others in one product, a multiple of every group.
_BLOCK = 128


class GridState(ABC):
    """A weight on its way to the grid, some columns after others.

    Attributes:
        scheme: of the weight.
        columns: how many are rounded and refitted at a time.
        block: how many make a block, a multiple of ``columns``.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.columns = scheme.group
        self.block = _BLOCK

    @abstractmethod
    def values(self) -> F32:
        """The weights [N, K] as they stand on the grid."""

    def search_block(self, index: int, w: F32, cost: F32) -> bool:
        """Choose what a block's columns share; False for a weight that float16 lacks.

        Args:
            index: of the block.
            w: its weights [N, block], compensated for the blocks before.
            cost: importance [block] of each column's squared error.
        """
        return True

    @abstractmethod
    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Search and round some columns; False for a weight that float16 lacks.

        Args:
            index: counts them.
            w: their compensated weights [N, c].
            factor: upper Cholesky factor of the inverse moments within them, [c, c].
            cost: importance [c] of each column's squared error.
            error: [N, c], filled in with what the columns to come make up for.
        """

    def refit_block(
        self, index: int, gradient: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor | None:
        """Refit what a block's columns share; what was added to the weights [N, block], if any.

        Args:
            index: of the block.
            gradient: half the loss's, [N, block].
            h: the moments within the block.
        """
        return None

    @abstractmethod
    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit some columns to lower the loss.

        Args:
            index: counts them.
            gradient: half the loss's, [N, c].
            h: the moments within them, [c, c].
            change: [N, c], filled in with what was added to the weights.
        """

    @abstractmethod
    def finish(self) -> Quantized:
        """The weight when all columns are rounded."""


def by_rows(groups: F32) -> F32:
    """Groups [G, N, g] of columns as a matrix [N, K]."""
    return groups.transpose(1, 0, 2).reshape(groups.shape[1], -1)
