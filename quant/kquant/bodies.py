"""K-quants on their way through GPTQ, compiled or in torch, and rounded to nearest.

N rows, a multiple of 16; B blocks of 256 columns; P parts of 32 columns, of s sub-blocks each.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.grid import F32, Form, Stored
from lfmq.quant.kquant.kernels import descend_parts, quantize_rows, round_parts, search_block
from lfmq.quant.kquant.search import MOVES, SPANS, TARGETS
from lfmq.quant.kquant.spec import KQUANT_BLOCK
from lfmq.quant.kquant.torch_body import choose, nearest, refit_codes, refit_scales
from lfmq.quant.kquant.torch_body import search_block as search_block_torch
from lfmq.quant.simd import whole_lanes
from lfmq.quant.state import UNSOUND, Bodies, GridState, by_rows
from lfmq.quant.torch_math import LARGEST, inverse_of

T = torch.Tensor

_COLUMNS = 32  # at a time


def _nearest(w: NDArray[Any], h: F32, form: Form) -> Stored:
    """Round rows [N, K], float32 or bits of bfloat16, with importance h [K].

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    count, w = len(w), whole_lanes(w)
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((2, len(w), w.shape[1] // KQUANT_BLOCK), np.float32)
    sub = np.empty((2, len(w), w.shape[1] // form.group), np.int8)
    if not quantize_rows(w, h, form.group, *_constants(form), codes, scale, sub):
        raise ValueError(UNSOUND)
    d, dmin = scale[:, :count].astype(np.float16)
    if form.has_offset:
        return Stored(codes[:count], d, dmin, sub[0, :count], sub[1, :count])
    return Stored(codes[:count], d, None, sub[0, :count])


def _constants(form: Form) -> tuple[bool, np.float32, F32, F32]:
    """Whether levels have a sign, the highest, and the candidates of the search."""
    top = np.float32(form.highest_code - form.zero_point)
    if form.has_offset:
        return False, top, SPANS[form.bits], MOVES[form.bits]
    return True, top, TARGETS, TARGETS


class _KquantState(GridState):
    """Levels float32 [P, N, 32]; d and dmin [B, 2, N]; sub_scale and sub_min [P, s, N]."""

    def __init__(self, form: Form, rows: int, columns: int, device: torch.device) -> None:
        super().__init__(form)
        self.columns, self.block = _COLUMNS, KQUANT_BLOCK
        count = columns // _COLUMNS
        self.level = torch.empty(count, rows, _COLUMNS, device=device)
        self.pair = torch.zeros(columns // KQUANT_BLOCK, 2, rows, device=device)
        self.sub_scale = torch.zeros(count, _COLUMNS // form.group, rows, device=device)
        self.sub_min = torch.zeros_like(self.sub_scale)

    def values(self) -> T:
        """The weights [N, K] that the levels stand for."""
        pair = self.pair.repeat_interleave(KQUANT_BLOCK // _COLUMNS, 0)[:, :, None]
        size, below = pair[:, 0] * self.sub_scale, pair[:, 1] * self.sub_min
        return by_rows(self.level * self._widen(size) - self._widen(below))

    def _widen(self, parts: T) -> T:
        """Values of sub-blocks [P, s, N] for each of their columns, [P, N, 32]."""
        return parts.repeat_interleave(self.form.group, 1).permute(0, 2, 1)

    def block_of(self, index: int) -> T:
        """D and dmin [2, N] of a part's block."""
        return self.pair[index * _COLUMNS // KQUANT_BLOCK]

    def refit_block(self, index: int, gradient: T, h: T) -> T:
        """Refit d and dmin of a block."""
        parts = slice(index * KQUANT_BLOCK // _COLUMNS, (index + 1) * KQUANT_BLOCK // _COLUMNS)
        sub_scale, sub_min = (
            by_rows(self._widen(codes[parts])) for codes in (self.sub_scale, self.sub_min)
        )
        d, dmin = self.pair[index]
        along, signed = by_rows(self.level[parts]) * sub_scale, not self.form.has_offset
        return refit_scales(d, dmin, along, sub_min, gradient, h, signed=signed)

    def finish(self) -> Stored:
        """The weight."""
        codes = by_rows((self.level + self.form.zero_point).to(torch.uint8)).cpu().numpy()
        d, dmin = self.pair.permute(1, 2, 0).contiguous().half().cpu().numpy()
        rows = self.level.shape[1]
        sub_scale, sub_min = (
            a.reshape(-1, rows).T.contiguous().to(torch.int8).cpu().numpy()
            for a in (self.sub_scale, self.sub_min)
        )
        if self.form.has_offset:
            return Stored(codes, d, dmin, sub_scale, sub_min)
        return Stored(codes, d, None, sub_scale)


class _Compiled(_KquantState):
    def search_block(self, index: int, w: T, cost: T) -> None:
        """Choose d and dmin of a block."""
        rows, pair = w.contiguous().numpy(), self.pair[index].numpy()
        found = search_block(rows, cost.numpy(), *_constants(self.form), pair)
        self.sound = bool(found) and self.sound

    def round(self, index: int, w: T, factor: T, cost: T) -> T:
        """Choose sub_scale and sub_min of 32 columns and round them."""
        error = torch.empty_like(w)
        found = round_parts(
            w.numpy(), factor.numpy(), cost.numpy(), *_constants(self.form),
            *self._arrays(index), error.numpy(),
        )  # fmt: skip
        self.sound = bool(found) and self.sound
        return error

    def descend(self, index: int, gradient: T, h: T) -> T:
        """Refit sub_scale, sub_min and levels of 32 columns."""
        change = torch.empty_like(gradient)
        signed, top, *_ = _constants(self.form)
        descend_parts(
            gradient.numpy(), h.numpy(), signed, top, *self._arrays(index), change.numpy()
        )
        return change

    def _arrays(self, index: int) -> list[F32]:
        """D and dmin, levels, sub_scale and sub_min of a part, to be changed in place."""
        parts = (self.level, self.sub_scale, self.sub_min)
        return [self.block_of(index).numpy(), *(a[index].numpy() for a in parts)]


class _Torch(_KquantState):
    def search_block(self, index: int, w: T, cost: T) -> None:
        """Choose d and dmin of a block."""
        search_block_torch(w, cost, self.form, self.pair[index])

    def round(self, index: int, w: T, factor: T, cost: T) -> T:
        """Choose sub_scale and sub_min of 32 columns and round them."""
        self.sound = self.sound & (w.abs() <= LARGEST).all()
        error, (d, dmin) = torch.empty_like(w), self.block_of(index)
        for i, part in enumerate(self._sub_blocks()):
            codes = choose(w[:, part], cost[part], self.form, self.block_of(index))
            self.sub_scale[index, i], self.sub_min[index, i] = codes
            size, below = d * codes[0], dmin * codes[1]
            inverse = inverse_of(size)
            for c in range(part.start, part.stop):
                q = nearest((w[:, c] + below) * inverse, self.form)
                self.level[index, :, c] = q
                error[:, c] = (w[:, c] - (q * size - below)) / factor[c, c]
                w[:, c + 1 :] -= error[:, c, None] * factor[c, c + 1 :]
        return error

    def descend(self, index: int, gradient: T, h: T) -> T:
        """Refit sub_scale, sub_min and levels of 32 columns."""
        change, (d, dmin) = torch.zeros_like(gradient), self.block_of(index)
        for i, part in enumerate(self._sub_blocks()):
            q, g, within = self.level[index, :, part], gradient[:, part], h[part, part]
            sub_scale, sub_min = self.sub_scale[index, i], self.sub_min[index, i]
            new_scale, new_min = refit_codes(
                q, g, within, self.form, self.block_of(index), (sub_scale, sub_min)
            )
            moved = q * (d * (new_scale - sub_scale))[:, None]
            moved -= (dmin * (new_min - sub_min))[:, None]
            self.sub_scale[index, i], self.sub_min[index, i] = new_scale, new_min
            change[:, part] = moved
            gradient += moved @ h[part]
            size = d * new_scale
            inverse = inverse_of(size)
            for j in range(part.start, part.stop):
                before = self.level[index, :, j].clone()
                new = nearest(before - gradient[:, j] / h[j, j] * inverse, self.form)
                self.level[index, :, j] = new
                step = (new - before) * size
                change[:, j] += step
                gradient += step[:, None] * h[j]
        return change

    def _sub_blocks(self) -> list[slice]:
        """Columns of each sub-block of a part."""
        group = self.form.group
        return [slice(start, start + group) for start in range(0, _COLUMNS, group)]


BODIES = Bodies(_nearest, {"compiled": _Compiled, "torch": _Torch})
