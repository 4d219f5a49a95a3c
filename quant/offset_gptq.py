"""GPTQ's two steps on one group of columns, for the grids with an offset.

As in ``lfmq.quant.gptq``, with weights ``w = s q + b`` for codes q: the group's scale and offset
are searched from the compensated weights, and a sweep of coordinate descent gives scale and
offset, then each code, the value of least loss. With g the gradient and H the moments of a group,
a step (ds, db) changes the loss by ``ds^2 q'Hq + 2 ds db q'H1 + db^2 1'H1 + 2 (ds q'g + db 1'g)``.
On the asymmetric grid ``b = -s zero``: the scale moves along ``q - zero``, then the zero by whole
codes.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfmq.quant.grid_state import GridState, by_rows
from lfmq.quant.lanes import invert, load_group, nearest_level, round_half
from lfmq.quant.offset_lanes import MOVES, SPANS, WORK, search_offset
from lfmq.quant.offset_rtn import stored_offset
from lfmq.quant.types import Quantized, Scheme
from lfmq.quant.vector import LANES

F32 = NDArray[np.float32]

_LARGEST = np.float32(65504)  # largest float16
# Share of the product of curvatures below which scale and offset have the same effect.
_ALIKE = np.float32(2.0**-16)


class OffsetState(GridState):
    """Codes float32 [G, N, g], scales and offsets or zero points float32 [G, N]."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        super().__init__(scheme)
        self._code = np.empty((shape[1] // scheme.group, shape[0], scheme.group), np.float32)
        self._scale = np.empty(self._code.shape[:2], np.float32)
        self._offset = np.empty_like(self._scale)
        self._affine, self._top = scheme.grid == "affine", np.float32(scheme.highest_code)

    def values(self) -> F32:
        """The weights [N, K] that the codes stand for."""
        groups = self._code * self._scale[..., None]
        if self._affine:
            groups += self._offset[..., None]
        else:
            groups -= (self._scale * self._offset)[..., None]
        return by_rows(groups)

    def round(self, index: int, w: F32, factor: F32, cost: F32, error: F32) -> bool:
        """Search and round a group of columns."""
        code, scale, offset = self._code[index], self._scale[index], self._offset[index]
        affine, top, key = self._affine, self._top, (self.scheme.grid, self.scheme.bits)
        spans, moves = SPANS[key], MOVES[key]
        return bool(
            _round_group(w, factor, cost, affine, top, spans, moves, code, scale, offset, error)
        )

    def descend(self, index: int, gradient: F32, h: F32, change: F32) -> None:
        """Refit a group of columns."""
        code, scale, offset = self._code[index], self._scale[index], self._offset[index]
        _descend_group(gradient, h, self._affine, self._top, code, scale, offset, change)

    def finish(self) -> Quantized:
        """The weight."""
        codes = by_rows(self._code).astype(np.uint8)
        scale, offset = (np.ascontiguousarray(a.T) for a in (self._scale, self._offset))
        stored = stored_offset(offset, self.scheme)
        return Quantized(codes, scale.astype(np.float16), self.scheme, stored)


@njit(nogil=True, cache=True, error_model="numpy")
def _round_group(w, u, h, affine, top, spans, moves, level, scale, offset, error):  # type: ignore[no-untyped-def] # pragma: no cover
    """Search and round a group [N, g]: fill in codes, scale, offset and the error to spread."""
    rows, group = w.shape
    x = np.zeros((group, LANES), np.float32)
    e = np.zeros((group, LANES), np.float32)
    s = np.zeros(LANES, np.float32)
    b = np.zeros(LANES, np.float32)
    zero = np.zeros(LANES, np.float32)
    inverse = np.zeros(LANES, np.float32)
    code = np.zeros(LANES, np.float32)
    work = np.zeros((WORK, LANES), np.float32)
    sound = True
    for row in range(0, rows, LANES):
        lanes = min(LANES, rows - row)
        load_group(w, row, 0, lanes, x)
        found = search_offset(x, h, affine, top, spans, moves, s, b, zero, inverse, work)
        sound = found and sound
        for c in range(group):
            reciprocal = np.float32(1) / u[c, c]
            for lane in range(LANES):
                q = nearest_level((x[c, lane] - b[lane]) * inverse[lane], np.float32(0), top)
                code[lane] = q
                e[c, lane] = (x[c, lane] - (q * s[lane] + b[lane])) * reciprocal
            for lane in range(lanes):
                level[row + lane, c] = code[lane]
            for j in range(c + 1, group):
                for lane in range(LANES):
                    x[j, lane] -= e[c, lane] * u[c, j]
        for lane in range(lanes):
            scale[row + lane] = s[lane]
            offset[row + lane] = b[lane] if affine else zero[lane]
            for c in range(group):
                error[row + lane, c] = e[c, lane]
    return sound


@njit(nogil=True, cache=True, error_model="numpy")
def _descend_group(gradient, h, affine, top, level, scale, offset, change):  # type: ignore[no-untyped-def] # pragma: no cover
    """Refit scale, offset and codes of a group [N, g] in place; fill in its weights' change."""
    rows, group = gradient.shape
    g = np.zeros((group, LANES), np.float32)
    q = np.zeros((group, LANES), np.float32)
    d = np.zeros((group, LANES), np.float32)
    s = np.zeros(LANES, np.float32)
    o = np.zeros(LANES, np.float32)
    inverse = np.zeros(LANES, np.float32)
    work = np.zeros((8, LANES), np.float32)
    for row in range(0, rows, LANES):
        lanes = min(LANES, rows - row)
        load_group(gradient, row, 0, lanes, g)
        load_group(level, row, 0, lanes, q)
        s[:] = np.float32(0)
        o[:] = np.float32(0)
        for lane in range(lanes):
            s[lane] = scale[row + lane]
            o[lane] = offset[row + lane]
        _measure(g, q, h, affine, o, work)
        if affine:
            _refit_affine(s, o, work)
        else:
            _refit_zero(s, o, top, work)
        _spread_steps(g, q, h, d, work[0], work[1])
        invert(s, np.float32(1), inverse)
        for j in range(group):
            _refit_code(j, g, q, d, h, top, s, inverse, work[0])
        for lane in range(lanes):
            scale[row + lane] = s[lane]
            offset[row + lane] = o[lane]
            for j in range(group):
                level[row + lane, j] = q[j, lane]
                change[row + lane, j] = d[j, lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _measure(g, q, h, affine, o, work):  # type: ignore[no-untyped-def] # pragma: no cover
    """Slopes -p'g and -1'g and curvatures p'Hp, p'H1 and 1'H1; p = q, or q - zero.

    They lie in ``work[2:7]``; ``work[7]`` is p's zero.
    """
    hp, ones = work[0], work[1]
    for lane in range(LANES):
        work[7, lane] = np.float32(0) if affine else o[lane]
    work[2:7] = np.float32(0)
    for j in range(q.shape[0]):
        hp[:] = np.float32(0)
        ones[:] = np.float32(0)
        for k in range(q.shape[0]):
            for lane in range(LANES):
                hp[lane] += h[j, k] * (q[k, lane] - work[7, lane])
                ones[lane] += h[j, k]
        for lane in range(LANES):
            p = q[j, lane] - work[7, lane]
            work[2, lane] -= p * g[j, lane]
            work[3, lane] -= g[j, lane]
            work[4, lane] += p * hp[lane]
            work[5, lane] += hp[lane]
            work[6, lane] += ones[lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_affine(s, o, work):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move scale and offset to float16 values of less loss; steps along q and 1 in work[:2]."""
    down_s, down_o, ss, so, oo = work[2], work[3], work[4], work[5], work[6]
    new_s, new_o = work[0], work[1]
    for lane in range(LANES):
        product = ss[lane] * oo[lane]
        rest = product - so[lane] * so[lane]
        step = (oo[lane] * down_s[lane] - so[lane] * down_o[lane]) / rest
        moves = rest > _ALIKE * product and s[lane] + step > np.float32(0)
        new_s[lane] = s[lane] + (step if moves else np.float32(0))
    round_half(new_s)
    for lane in range(LANES):
        step = new_s[lane] - s[lane]
        slope = down_o[lane] - so[lane] * step
        real = o[lane] + (slope / oo[lane] if oo[lane] > np.float32(0) else np.float32(0))
        new_o[lane] = min(max(real, -_LARGEST), _LARGEST)
    round_half(new_o)
    for lane in range(LANES):
        ds, do = new_s[lane] - s[lane], new_o[lane] - o[lane]
        loss = ds * (ds * ss[lane] - np.float32(2) * down_s[lane])
        loss += do * (do * oo[lane] + np.float32(2) * (ds * so[lane] - down_o[lane]))
        better = loss < np.float32(0) and new_s[lane] <= _LARGEST
        work[0, lane] = ds if better else np.float32(0)
        work[1, lane] = do if better else np.float32(0)
        s[lane] = s[lane] + work[0, lane]
        o[lane] = o[lane] + work[1, lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_zero(s, o, top, work):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move the scale, then the zero by whole codes; steps along q and 1 in work[:2]."""
    down_s, down_o, ss, so, oo = work[2], work[3], work[4], work[5], work[6]
    fitted = work[0]
    for lane in range(LANES):
        real = s[lane] + (down_s[lane] / ss[lane] if ss[lane] > np.float32(0) else np.float32(0))
        fitted[lane] = min(max(real, np.float32(0)), _LARGEST)
    round_half(fitted)
    for lane in range(LANES):
        ds = fitted[lane] - s[lane]
        better = ds * (ds * ss[lane] - np.float32(2) * down_s[lane]) < np.float32(0)
        ds = ds if better and fitted[lane] > np.float32(0) else np.float32(0)
        new_s = s[lane] + ds
        curve = oo[lane] * new_s
        slope = down_o[lane] - so[lane] * ds
        move = -slope / curve if curve > np.float32(0) else np.float32(0)
        new_o = nearest_level(o[lane] + move, np.float32(0), top)
        # p = q - zero moves by ds p, then by -s times the zero's step
        work[1, lane] = -ds * work[7, lane] - new_s * (new_o - o[lane])
        work[0, lane] = ds
        s[lane] = new_s
        o[lane] = new_o


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _spread_steps(g, q, h, d, along, up):  # type: ignore[no-untyped-def] # pragma: no cover
    """What steps of scale and offset do to weights and gradient."""
    for k in range(q.shape[0]):
        for lane in range(LANES):
            d[k, lane] = q[k, lane] * along[lane] + up[lane]
        for j in range(q.shape[0]):
            for lane in range(LANES):
                g[j, lane] += d[k, lane] * h[k, j]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _refit_code(j, g, q, d, h, top, s, inverse, step):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move code j to the one of least loss and the gradient with it."""
    reciprocal = np.float32(1) / h[j, j]
    for lane in range(LANES):
        moved = q[j, lane] - g[j, lane] * reciprocal * inverse[lane]
        new = nearest_level(moved, np.float32(0), top)
        step[lane] = (new - q[j, lane]) * s[lane]
        q[j, lane] = new
        d[j, lane] += step[lane]
    for k in range(q.shape[0]):
        for lane in range(LANES):
            g[k, lane] += step[lane] * h[j, k]
