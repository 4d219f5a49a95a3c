"""GPTQ's state on grids with a scale for each group, and round to nearest there.

A :class:`Line` chooses scales and offsets; all else is the same on every such grid. Its compiled
functions work on sixteen rows at a time and take scales and offsets as float32 [N / 16, n, 16],
of n groups; its torch functions take all rows at once. Sums of torch are in its own order: nearly
all codes of the two bodies are equal (tests/quant/*/test_torch_body.py). N rows, a multiple of 16;
G groups of g columns; K = G g.
"""

from abc import ABC, abstractmethod
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.grid import F32, Form, Stored
from lfmq.quant.simd import LANES, whole_lanes
from lfmq.quant.state import UNSOUND, Bodies, GridState, by_rows
from lfmq.quant.torch_math import LARGEST, inverse_of

T = torch.Tensor


class Line(ABC):
    """How one grid chooses scale and offset of a group."""

    @abstractmethod
    def search(self, w: Any, h: F32, form: Form, scale: F32, offset: F32, *target: Any) -> bool:
        """Choose scales and offsets of rows [N, n g] with importance h [n g] and round, compiled.

        Args:
            w: float32, or uint16 with the bits of bfloat16.
            h: importance.
            form: of the weight.
            scale: filled in, as the offset.
            offset: as the grid counts it.
            target: what ``lfmq.quant.line.kernels.settle`` takes: no factor and codes to fill in,
                or a group's factor, levels and error.

        Returns:
            False for a weight that is NaN, Inf or beyond float16.
        """

    @abstractmethod
    def refit(self, gradient: F32, h: F32, level: F32, form: Form, scale: F32, offset: F32,
              change: F32) -> None:  # fmt: skip
        """Refit a group [N, g] to lower the loss, compiled.

        Args:
            gradient: half the loss's, [N, g].
            h: the group's moments, [g, g].
            level: [N, g], changed in place, as scale and offset.
            form: of the weight.
            scale: of the group.
            offset: as the grid counts it.
            change: [N, g], filled in with what was added to the weights.
        """

    @abstractmethod
    def search_torch(self, x: T, h: T, form: Form) -> tuple[T, T]:
        """Scales and offsets [N] of a group [N, g] with importance h [g]."""

    @abstractmethod
    def refit_torch(
        self, gradient: T, h: T, level: T, form: Form, scale: T, offset: T
    ) -> tuple[T, T]:
        """New scales and offsets [N] of less loss; arguments as of :meth:`refit`."""

    def base(self, scale: Any, offset: Any, form: Form) -> Any:
        """What level 0 stands for, of arrays or tensors; 0 without offsets."""
        return offset

    def stored_offset(self, offset: F32, form: Form) -> NDArray[Any] | None:
        """Offsets in the type of the grid, which holds them exactly."""
        return None


def line_bodies(line: Line) -> Bodies:
    """The algorithms of a grid from what it has of its own."""
    return Bodies(
        partial(_nearest, line),
        {"compiled": partial(_Compiled, line), "torch": partial(_Torch, line)},
    )


def limits_of(form: Form) -> tuple[np.float32, np.float32]:
    """The lowest and the highest level."""
    if form.levels is not None:
        return np.float32(form.levels[0]), np.float32(form.levels[-1])
    zero = form.zero_point
    return np.float32(form.lowest_code - zero), np.float32(form.highest_code - zero)


def table_of(form: Form) -> F32 | None:
    """The table of levels, of a grid that has one."""
    return None if form.levels is None else np.array(form.levels, np.float32)


def nearest_level(value: T, form: Form) -> T:
    """The nearest level; of two as near, the even or that of the table's lower."""
    if form.levels is None:
        low, high = limits_of(form)
        return value.round().clamp(float(low), float(high))
    table, between = _table_on(form.levels, value.device)
    return table[torch.bucketize(value, between)]


@cache
def _table_on(levels: tuple[float, ...], device: torch.device) -> tuple[T, T]:
    """A table of levels, and what lies in the middle of each and the next."""
    table = torch.tensor(levels, device=device)
    return table, (table[:-1] + table[1:]) * 0.5


def _nearest(line: Line, w: NDArray[Any], h: F32, form: Form) -> Stored:
    """Round rows [N, K], float32 or bits of bfloat16, with importance h [K].

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    rows, w = w.shape[0], whole_lanes(w)
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((len(w) // LANES, w.shape[1] // form.group, LANES), np.float32)
    offset = np.zeros_like(scale)
    if not line.search(w, h, form, scale, offset, None, codes, None):
        raise ValueError(UNSOUND)
    scale, offset = (a.transpose(0, 2, 1).reshape(len(w), -1)[:rows] for a in (scale, offset))
    stored = line.stored_offset(offset, form)
    return Stored(codes[:rows], scale.astype(np.float16), stored)


class _LineState(GridState):
    """Levels float32 [G, N, g], scales and offsets float32 [G, N]."""

    def __init__(
        self, line: Line, form: Form, rows: int, columns: int, device: torch.device
    ) -> None:
        super().__init__(form)
        self.line = line
        groups = columns // form.group
        self.level = torch.empty(groups, rows, form.group, device=device)
        self.scale = torch.zeros(groups, rows, device=device)
        self.offset = torch.zeros_like(self.scale)

    def values(self) -> T:
        """The weights [N, K] that the levels stand for."""
        groups = self.level * self.scale[..., None]
        if self.form.has_offset:
            groups += self.line.base(self.scale, self.offset, self.form)[..., None]
        return by_rows(groups)

    def finish(self) -> Stored:
        """The weight."""
        if self.form.levels is None:
            codes = self.level + self.form.zero_point
        else:
            table, _ = _table_on(self.form.levels, self.level.device)
            codes = torch.searchsorted(table, self.level)
        scale, offset = (a.T.contiguous().cpu().numpy() for a in (self.scale, self.offset))
        stored = self.line.stored_offset(offset, self.form)
        whole = by_rows(codes.to(torch.uint8)).cpu().numpy()
        return Stored(whole, scale.astype(np.float16), stored)


class _Compiled(_LineState):
    def __init__(
        self, line: Line, form: Form, rows: int, columns: int, device: torch.device
    ) -> None:
        super().__init__(line, form, rows, columns, device)
        shape = (len(self.scale), -1, 1, LANES)
        self._arrays = (
            self.level.numpy(),
            self.scale.numpy().reshape(shape),
            self.offset.numpy().reshape(shape),
        )

    def round(self, index: int, w: T, factor: T, cost: T) -> T:
        """Search and round a group of columns."""
        level, scale, offset = (a[index] for a in self._arrays)
        error = torch.empty_like(w)
        target = (factor.numpy(), level, error.numpy())
        found = self.line.search(w.numpy(), cost.numpy(), self.form, scale, offset, *target)
        self.sound = found and self.sound
        return error

    def descend(self, index: int, gradient: T, h: T) -> T:
        """Refit a group of columns."""
        level, scale, offset = (a[index] for a in self._arrays)
        change = torch.empty_like(gradient)
        g, within = gradient.numpy(), h.numpy()
        self.line.refit(g, within, level, self.form, scale, offset, change.numpy())
        return change


class _Torch(_LineState):
    def round(self, index: int, w: T, factor: T, cost: T) -> T:
        """Search and round a group of columns."""
        self.sound = self.sound & (w.abs() <= LARGEST).all()
        s, offset = self.line.search_torch(w, cost, self.form)
        self.scale[index], self.offset[index] = s, offset
        base, inverse = self.line.base(s, offset, self.form), inverse_of(s)
        error = torch.empty_like(w)
        for c in range(w.shape[1]):
            q = nearest_level((w[:, c] - base) * inverse, self.form)
            self.level[index, :, c] = q
            error[:, c] = (w[:, c] - (q * s + base)) / factor[c, c]
            w[:, c + 1 :] -= error[:, c, None] * factor[c, c + 1 :]
        return error

    def descend(self, index: int, gradient: T, h: T) -> T:
        """Refit a group of columns."""
        q, before = self.level[index], (self.scale[index], self.offset[index])
        s, offset = self.line.refit_torch(gradient, h, q, self.form, *before)
        up = self.line.base(s, offset, self.form) - self.line.base(*before, self.form)
        change: T = q * (s - before[0])[:, None] + up[:, None]
        self.scale[index], self.offset[index] = s, offset
        gradient += change @ h
        inverse = inverse_of(s)
        for j in range(q.shape[1]):
            new = nearest_level(q[:, j] - gradient[:, j] / h[j, j] * inverse, self.form)
            moved = (new - q[:, j]) * s
            q[:, j] = new
            change[:, j] += moved
            gradient += moved[:, None] * h[j]
        return change
