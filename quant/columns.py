"""What GPTQ does to columns of sixteen rows once their scale is known, the same on every grid.

Levels are evenly spaced between two vectors, and ``levels`` is None; or they are those of a table,
float32 [L], ascending. numba compiles each case by itself.
"""

import numpy as np

from lfmq.quant.kernels import inlined, inner
from lfmq.quant.simd import load, nearest, splat, store, where_above

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


@inlined
def to_level(value, levels, lowest, highest):
    """The nearest level of each lane; of two as near, the even or that of the table's lower."""
    if levels is None:
        return nearest(value, lowest, highest)
    found = splat(levels[0])
    for i in range(1, levels.size):
        between = (levels[i - 1] + levels[i]) * _HALF
        found = where_above(value, splat(between), splat(levels[i]), found)
    return found


@inlined
def to_code(value, levels, lowest, highest):
    """The nearest level; of a table, its index."""
    if levels is None:
        return nearest(value, lowest, highest)
    found = splat(_ZERO)
    for i in range(1, levels.size):
        between = (levels[i - 1] + levels[i]) * _HALF
        found = where_above(value, splat(between), splat(np.float32(i)), found)
    return found


@inner
def round_columns(x, e, u, start, stop, s, inverse, b, levels, lowest, highest):
    """Round columns start to stop one after another; all after each make up for its error.

    Args:
        x: scratch [g, 16] of weights; becomes their levels q, with ``w = s q + b``.
        e: scratch [g, 16]; becomes the error that the columns after these make up for.
        u: upper Cholesky factor [g, g] of the columns.
        start: first column that has this scale.
        stop: the one after the last.
        s: scale, a vector.
        inverse: of the scale.
        b: offset, a vector.
        levels: None or a table.
        lowest: level, a vector.
        highest: level, a vector.
    """
    for c in range(start, stop):
        value = load(x, c)
        q = to_level((value - b) * inverse, levels, lowest, highest)
        missing = (value - (q * s + b)) * (_ONE / u[c, c])
        store(x, c, q)
        store(e, c, missing)
        for j in range(c + 1, x.shape[0]):
            store(x, j, load(x, j) - missing * u[c, j])


@inner
def spread(g, q, d, h, start, stop, along, up):
    """What a step along levels and one up do to weights and gradient.

    Args:
        g: gradient [g, 16], half the loss's; that of columns from ``start`` on is moved.
        q: levels [g, 16].
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


@inner
def refit_levels(g, q, d, h, start, stop, s, inverse, levels, lowest, highest):
    """Move each level to the one of least loss, with the gradient of those after it.

    Args:
        g: gradient [g, 16], half the loss's.
        q: levels [g, 16].
        d: changes [g, 16] of the weights, added to.
        h: moments [g, g].
        start: first column that has this scale.
        stop: the one after the last.
        s: scale, a vector.
        inverse: of the scale.
        levels: None or a table.
        lowest: level, a vector.
        highest: level, a vector.
    """
    for j in range(start, stop):
        before = load(q, j)
        moved = before - load(g, j) * (_ONE / h[j, j]) * inverse
        after = to_level(moved, levels, lowest, highest)
        move = (after - before) * s
        store(q, j, after)
        store(d, j, load(d, j) + move)
        for k in range(j + 1, q.shape[0]):
            store(g, k, load(g, k) + move * h[j, k])
