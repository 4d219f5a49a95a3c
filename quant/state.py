"""What GPTQ and coordinate descent ask of a grid (``lfmq.quant.gptq``).

A body of a grid is compiled or made of torch operations; the loops are the same. N rows, a
multiple of 16; c columns at a time; K columns; G groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from lfmq.quant.grid import F32, Form, Grid, Stored, load_bodies

T = torch.Tensor
Body = Literal["compiled", "torch"]

# Columns whose changes reach all others in one product, a multiple of every group.
_BLOCK = 128


class GridState(ABC):
    """A weight on its way to the grid, some columns after others.

    Attributes:
        columns: how many are rounded and refitted at a time.
        block: how many make a block, a multiple of ``columns``.
        sound: whether no weight was NaN, Inf or beyond float16 so far.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.columns = form.group
        self.block = _BLOCK
        self.sound: bool | T = True

    @abstractmethod
    def values(self) -> T:
        """The weights [N, K] as they stand on the grid."""

    def search_block(self, index: int, w: T, cost: T) -> None:
        """Choose what a block's columns share.

        Args:
            index: of the block.
            w: its weights [N, block], compensated for the blocks before.
            cost: importance [block] of each column's squared error.
        """
        return

    @abstractmethod
    def round(self, index: int, w: T, factor: T, cost: T) -> T:
        """Search and round some columns.

        Args:
            index: counts them.
            w: their compensated weights [N, c], used up.
            factor: upper Cholesky factor of the inverse moments within them, [c, c].
            cost: importance [c] of each column's squared error.

        Returns:
            What the columns to come make up for, [N, c].
        """

    def refit_block(self, index: int, gradient: T, h: T) -> T | None:
        """Refit what a block's columns share; what was added to the weights [N, block], if any.

        Args:
            index: of the block.
            gradient: half the loss's, [N, block].
            h: the moments within the block.
        """
        return None

    @abstractmethod
    def descend(self, index: int, gradient: T, h: T) -> T:
        """Refit some columns to lower the loss.

        Args:
            index: counts them.
            gradient: half the loss's, [N, c], used up.
            h: the moments within them, [c, c].

        Returns:
            What was added to the weights, [N, c].
        """

    @abstractmethod
    def finish(self) -> Stored:
        """The weight when all columns are rounded."""


# Makes the state of a weight of some rows and columns.
Start = Callable[[Form, int, int, torch.device], GridState]


@dataclass(frozen=True, slots=True)
class Bodies:
    """The algorithms of a grid.

    Attributes:
        nearest: rounds rows [N, K], float32 or bits of bfloat16, with importance [K]; raises
            ValueError for a weight that is NaN, Inf or beyond float16.
        states: by body.
    """

    nearest: Callable[[NDArray[Any], F32, Form], Stored]
    states: Mapping[Body, Start]


def bodies_of(grid: Grid) -> Bodies:
    """The algorithms of a grid; its module is imported when first asked for."""
    found: Bodies = load_bodies(grid)
    return found


UNSOUND = "a weight is NaN, Inf or beyond float16"


def by_rows(groups: T) -> T:
    """Groups [G, N, g] of columns as a matrix [N, K]."""
    return groups.permute(1, 0, 2).reshape(groups.shape[1], -1)
