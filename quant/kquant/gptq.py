"""GPTQ's steps on ggml's K-quants (``lfmq.quant.gptq``): ``w = d step q - dmin shift``.

- d and dmin of a superblock are searched when the turn of its first columns comes, from the
  compensated weights of all its 256 columns.
- Step and shift of a sub-block are chosen at its own turn, under d and dmin, from what its
  weights are by then: an error of theirs is made up for by the columns to come, as any other.
- A sweep of coordinate descent gives d and dmin, then step and shift of each sub-block, then each
  code the value of least loss, all others fixed. With g the gradient and H the moments, a change
  along a and b, by t and u, changes the loss by
  ``t^2 a'Ha + 2 t u a'Hb + u^2 b'Hb + 2 (t a'g + u b'g)``: a = step q and b = -shift for d and
  dmin; a = d q and b = -dmin for step and shift, where whole numbers beside the least are tried.

32 columns are taken at a time: a sub-block of 4 or 5 bits, two of 6. There q is signed and nothing
is shifted.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.columns import refit_codes, round_columns, spread
from lfmq.quant.grid import GridState, by_rows
from lfmq.quant.kquant.search import (
    HIGHEST,
    LOWEST,
    MOVES,
    SPANS,
    STEPS,
    TARGETS,
    TOP_CODE,
    WORK,
    code_shifted,
    code_signed,
    fit_shifted,
    fit_signed,
    search,
    survey,
)
from lfmq.quant.kquant.torch_body import refit_scales
from lfmq.quant.simd import (
    LANES,
    any_above,
    load,
    load_columns,
    most,
    nearest,
    ratio,
    splat,
    store,
    store_columns,
    where_above,
)
from lfmq.quant.types import KQUANT_BLOCK, Quantized, Scheme

F32 = NDArray[np.float32]

_COLUMNS = 32  # at a time
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_HALF_STEP = np.float32(0.5)
# Share of the product of curvatures below which scale and offset have the same effect.
_ALIKE = np.float32(2.0**-16)


class SuperblockState(GridState):
    """Codes of 32 columns after another, and the scales of superblocks and sub-blocks.

    Codes float32 [K / 32, N, 32], of 6 bits less the zero point; d and dmin float32
    [K / 256, 2, N]; step and shift float32 [K / 32, 2 s, N] with s sub-blocks to 32 columns.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        super().__init__(scheme)
        self.columns, self.block = _COLUMNS, KQUANT_BLOCK
        rows, count = shape[0], shape[1] // _COLUMNS
        self._code = np.empty((count, rows, _COLUMNS), np.float32)
        self._pair = np.empty((shape[1] // KQUANT_BLOCK, 2, rows), np.float32)
        self._each = _COLUMNS // scheme.group
        self._step = np.zeros((count, self._each, rows), np.float32)
        self._shift = np.zeros_like(self._step)
        self._signed = not scheme.has_offset
        self._zero = scheme.zero_point if self._signed else 0
        self._top = np.float32(scheme.highest_code - self._zero)
        self._spans = TARGETS if self._signed else SPANS[scheme.bits]
        self._moves = TARGETS if self._signed else MOVES[scheme.bits]

    def values(self) -> F32:
        """The weights [N, K] that the codes stand for."""
        pair = np.repeat(self._pair, KQUANT_BLOCK // _COLUMNS, 0)[:, :, None]
        size, below = self._widen(pair[:, 0] * self._step), self._widen(pair[:, 1] * self._shift)
        return by_rows(self._code * size - below)

    def _widen(self, parts: F32) -> F32:
        """Values of sub-blocks [G, s, N] for each of their columns, [G, N, 32]."""
        return np.repeat(parts, self.scheme.group, 1).transpose(0, 2, 1)

    def search_block(self, index: int, w: F32, cost: F32) -> bool:
        """Choose d and dmin of a superblock."""
        w = np.ascontiguousarray(w)
        pair, spans, moves = self._pair[index], self._spans, self._moves
        return bool(_search_block(w, cost, self._signed, self._top, spans, moves, pair))

    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Choose steps and shifts of 32 columns and round them."""
        found = _round_columns(
            w, factor, cost, self._signed, self._top, self._spans, self._moves,
            self._pair[index * _COLUMNS // KQUANT_BLOCK],
            self._code[index], self._step[index], self._shift[index], error,
        )  # fmt: skip
        return bool(found)

    def refit_block(
        self, index: int, gradient: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor | None:
        """Refit d and dmin of a superblock."""
        parts = slice(index * KQUANT_BLOCK // _COLUMNS, (index + 1) * KQUANT_BLOCK // _COLUMNS)
        code = torch.from_numpy(by_rows(self._code[parts]))
        step, shift = (
            torch.from_numpy(by_rows(self._widen(codes[parts])))
            for codes in (self._step, self._shift)
        )
        d, dmin = torch.from_numpy(self._pair[index])
        return refit_scales(d, dmin, code * step, shift, gradient, h, signed=self._signed)

    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit steps, shifts and codes of 32 columns."""
        _descend_columns(
            gradient, h, self._signed, self._top,
            self._pair[index * _COLUMNS // KQUANT_BLOCK],
            self._code[index], self._step[index], self._shift[index], change,
        )  # fmt: skip

    def finish(self) -> Quantized:
        """The weight."""
        codes = by_rows(self._code + np.float32(self._zero)).astype(np.uint8)
        d, dmin = (np.ascontiguousarray(a.T).astype(np.float16) for a in self._pair.swapaxes(0, 1))
        rows = self._code.shape[1]
        step, shift = (
            np.ascontiguousarray(a.reshape(-1, rows).T).astype(np.int8)
            for a in (self._step, self._shift)
        )
        if self._signed:
            return Quantized(codes, d, self.scheme, None, step)
        return Quantized(codes, d, self.scheme, dmin, step, shift)


@njit(nogil=True, cache=True, error_model="numpy")
def _search_block(w, h, signed, top, spans, moves, pair):  # type: ignore[no-untyped-def] # pragma: no cover
    """Fill in d and dmin [2, N] of a superblock [N, 256] with importance h [256]."""
    x = np.zeros((KQUANT_BLOCK, LANES), np.float32)
    found = np.zeros((2, LANES), np.float32)
    steps = np.zeros((STEPS, LANES), np.float32)
    shifts = np.zeros((STEPS, LANES), np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    sound = True
    for row in range(0, w.shape[0], LANES):
        for j in range(0, KQUANT_BLOCK, 2 * LANES):
            load_columns(w, row, j, x, j)
        sound = search(x, h, signed, top, spans, moves, found, steps, shifts, work) and sound
        for i in range(2):
            for lane in range(LANES):
                pair[i, row + lane] = found[i, lane]
    return sound


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _load_codes(stored, row, scratch):  # type: ignore[no-untyped-def] # pragma: no cover
    """Columns row to row + 15 of an array [n, N] as the first rows of scratch."""
    for i in range(stored.shape[0]):
        for lane in range(LANES):
            scratch[i, lane] = stored[i, row + lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _store_codes(stored, row, scratch):  # type: ignore[no-untyped-def] # pragma: no cover
    """The reverse of ``_load_codes``."""
    for i in range(stored.shape[0]):
        for lane in range(LANES):
            stored[i, row + lane] = scratch[i, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _round_columns(w, u, h, signed, top, spans, moves, pair, code, step, shift, error):  # type: ignore[no-untyped-def] # pragma: no cover
    """Choose step and shift of sub-blocks [N, 32] in turn and round their columns.

    u [32, 32] is the factor of the columns, h [32] their importance, pair d and dmin [2, N].
    """
    columns, each = w.shape[1], step.shape[0]
    group = columns // each
    x = np.zeros((columns, LANES), np.float32)
    e = np.zeros((columns, LANES), np.float32)
    both = np.zeros((2, LANES), np.float32)
    steps = np.zeros((2, LANES), np.float32)
    shifts = np.zeros((2, LANES), np.float32)
    work = np.zeros((8, LANES), np.float32)
    zero = splat(_ZERO)
    low, high, bad = splat(-top - _ONE) if signed else zero, splat(top), zero
    for row in range(0, w.shape[0], LANES):
        for j in range(0, columns, 2 * LANES):
            load_columns(w, row, j, x, j)
        _load_codes(pair, row, both)
        for g in range(each):
            bad = most(bad, _choose(x, h, g, signed, top, spans, moves, both, steps, shifts, work))
            size, below = load(both, 0) * load(steps, g), load(both, 1) * load(shifts, g)
            inverse = ratio(splat(_ONE), size)
            start, stop = g * group, (g + 1) * group
            round_columns(x, e, u, start, stop, size, inverse, -below, low, high)
        for j in range(0, columns, 2 * LANES):
            store_columns(code, row, j, x, j)
            store_columns(error, row, j, e, j)
        _store_codes(step, row, steps)
        _store_codes(shift, row, shifts)
    return not any_above(bad, zero)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _choose(x, h, g, signed, top, spans, moves, pair, steps, shifts, work):  # type: ignore[no-untyped-def] # pragma: no cover
    """Step and shift of sub-block g under d and dmin; above 0 for weights float16 lacks."""
    s, m, sums, extent = work[:2], work[2:4], work[4:6], work[6:8]
    if signed:
        bad = fit_signed(x, h, g, top, spans, s)
        code_signed(x, h, g, top, s, pair, steps)
        store(shifts, g, splat(_ZERO))
        return bad
    bad = survey(x, h, 0, sums, extent)
    fit_shifted(x, h, 0, top, spans, moves, s, m, sums, extent)
    code_shifted(x, h, 0, top, s, m, sums, pair, steps, shifts)
    return bad


@njit(nogil=True, cache=True, error_model="numpy")
def _descend_columns(gradient, h, signed, top, pair, code, step, shift, change):  # type: ignore[no-untyped-def] # pragma: no cover
    """Refit step, shift and codes of sub-blocks [N, 32] in turn; fill in their weights' change."""
    columns, each = gradient.shape[1], step.shape[0]
    group = columns // each
    g = np.zeros((columns, LANES), np.float32)
    q = np.zeros((columns, LANES), np.float32)
    d = np.zeros((columns, LANES), np.float32)
    both = np.zeros((2, LANES), np.float32)
    steps = np.zeros((2, LANES), np.float32)
    shifts = np.zeros((2, LANES), np.float32)
    zero = splat(_ZERO)
    low, high = splat(-top - _ONE) if signed else zero, splat(top)
    for row in range(0, gradient.shape[0], LANES):
        for j in range(0, columns, 2 * LANES):
            load_columns(gradient, row, j, g, j)
            load_columns(code, row, j, q, j)
        _load_codes(pair, row, both)
        _load_codes(step, row, steps)
        _load_codes(shift, row, shifts)
        for i in range(each):
            start, stop = i * group, (i + 1) * group
            _refit_step(g, q, d, h, i, start, stop, signed, both, steps, shifts)
            size = load(both, 0) * load(steps, i)
            inverse = ratio(splat(_ONE), size)
            refit_codes(g, q, d, h, start, stop, size, inverse, low, high)
        for j in range(0, columns, 2 * LANES):
            store_columns(code, row, j, q, j)
            store_columns(change, row, j, d, j)
        _store_codes(step, row, steps)
        _store_codes(shift, row, shifts)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_step(g, q, d, h, i, start, stop, signed, pair, steps, shifts):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move step and shift of sub-block i to whole numbers of less loss; d = the change."""
    zero = splat(_ZERO)
    down_a, down_b, aa, ab, bb = zero, zero, zero, zero, zero  # for a = q, b = 1
    for j in range(start, stop):
        hq, row = zero, _ZERO
        for k in range(start, stop):
            hq = hq + load(q, k) * h[j, k]
            row += h[j, k]
        level, slope = load(q, j), load(g, j)
        down_a, down_b = down_a - level * slope, down_b - slope
        aa, ab, bb = aa + level * hq, ab + hq, bb + splat(row)
    size, depth = load(pair, 0), load(pair, 1)
    step, shift = load(steps, i), load(shifts, i)
    rest, product = aa * bb - ab * ab, aa * bb
    joint = ratio(bb * down_a - ab * down_b, rest)
    move = where_above(rest, product * _ALIKE, joint, ratio(down_a, aa))
    low, high = (splat(LOWEST), splat(HIGHEST)) if signed else (zero, splat(TOP_CODE))
    if signed:
        move = ratio(down_a, aa)
    below = nearest(step + ratio(move, size) - _HALF_STEP, low, high)
    best, along, up, chosen, moved = zero, zero, zero, step, shift
    for trial in range(3):
        candidate = (
            step if trial == 0 else nearest(below + splat(np.float32(trial - 1)), low, high)
        )
        by = size * (candidate - step)
        loss, raised, other = by * (by * aa - down_a * _TWO), zero, shift
        if not signed:
            slope = down_b - ab * by
            wanted = shift - ratio(ratio(slope, bb), depth)
            other = nearest(wanted, zero, splat(TOP_CODE))
            raised = depth * (shift - other)
            loss = loss + raised * (raised * bb - slope * _TWO)
        chosen = where_above(best, loss, candidate, chosen)
        moved = where_above(best, loss, other, moved)
        along = where_above(best, loss, by, along)
        up = where_above(best, loss, raised, up)
        best = where_above(best, loss, loss, best)
    store(steps, i, chosen)
    store(shifts, i, moved)
    spread(g, q, d, h, start, stop, along, up)
