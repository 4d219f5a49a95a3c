"""What GPTQ does to columns of sixteen rows once their scale is known, the same on every grid."""

import numpy as np
from numba import njit

from lfmq.quant.simd import load, nearest, store

_ONE = np.float32(1)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def round_columns(x, e, u, start, stop, s, inverse, b, lowest, highest):  # type: ignore[no-untyped-def] # pragma: no cover
    """Round columns start to stop one after another; all after each make up for its error.

    Args:
        x: scratch [g, 16] of weights; becomes their codes q, with ``w = s q + b``.
        e: scratch [g, 16]; becomes the error that the columns after these make up for.
        u: upper Cholesky factor [g, g] of the columns.
        start: first column that has this scale.
        stop: the one after the last.
        s: scale, a vector.
        inverse: of the scale.
        b: offset, a vector.
        lowest: code, a vector.
        highest: code, a vector.
    """
    for c in range(start, stop):
        value = load(x, c)
        q = nearest((value - b) * inverse, lowest, highest)
        missing = (value - (q * s + b)) * (_ONE / u[c, c])
        store(x, c, q)
        store(e, c, missing)
        for j in range(c + 1, x.shape[0]):
            store(x, j, load(x, j) - missing * u[c, j])


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def spread(g, q, d, h, start, stop, along, up):  # type: ignore[no-untyped-def] # pragma: no cover
    """What a step along codes and one up do to weights and gradient.

    Args:
        g: gradient [g, 16], half the loss's; that of columns from ``start`` on is moved.
        q: codes [g, 16].
        d: changes [g, 16] of the weights; those of columns start to stop are filled in.
        h: moments [g, g].
        start: first column that has this scale.
        stop: the one after the last.
        along: step of the scale, a vector.
        up: of the offset, a vector.
    """
    for k in range(start, stop):
        store(d, k, load(q, k) * along + up)
    for j in range(start, g.shape[0], 4):  # four sums at a time: each waits for itself only
        a, b, c, e = load(g, j), load(g, j + 1), load(g, j + 2), load(g, j + 3)
        for k in range(start, stop):
            move = load(d, k)
            a = a + move * h[k, j]
            b = b + move * h[k, j + 1]
            c = c + move * h[k, j + 2]
            e = e + move * h[k, j + 3]
        store(g, j, a)
        store(g, j + 1, b)
        store(g, j + 2, c)
        store(g, j + 3, e)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def refit_codes(g, q, d, h, start, stop, s, inverse, lowest, highest):  # type: ignore[no-untyped-def] # pragma: no cover
    """Move each code to the one of least loss, with the gradient of those after it.

    Args:
        g: gradient [g, 16], half the loss's.
        q: codes [g, 16].
        d: changes [g, 16] of the weights, added to.
        h: moments [g, g].
        start: first column that has this scale.
        stop: the one after the last.
        s: scale, a vector.
        inverse: of the scale.
        lowest: code, a vector.
        highest: code, a vector.
    """
    for j in range(start, stop):
        before = load(q, j)
        moved = before - load(g, j) * (_ONE / h[j, j]) * inverse
        after = nearest(moved, lowest, highest)
        move = (after - before) * s
        store(q, j, after)
        store(d, j, load(d, j) + move)
        for k in range(j + 1, q.shape[0]):
            store(g, k, load(g, k) + move * h[j, k])
