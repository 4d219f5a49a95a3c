"""Kernels of all grids with a scale for each group: they round, once scales are chosen.

Scales and what level 0 stands for, ``base``, are float32 [N / 16, n, 16]: of n groups of sixteen
rows. N is a multiple of 16, g the columns of a group; a table of levels may be None
(``lfmq.quant.columns``).
"""

import numpy as np

from lfmq.quant.columns import refit_levels, round_columns, spread, to_code
from lfmq.quant.kernels import inner, kernel
from lfmq.quant.simd import (
    LANES,
    load,
    load_columns,
    ratio,
    splat,
    store,
    store_codes,
    store_columns,
)

_ONE = np.float32(1)


@inner
def load_group(w, row, column, x):
    """Columns of sixteen rows as scratch [g, 16]."""
    for j in range(0, x.shape[0], 2 * LANES):
        load_columns(w, row, column + j, x, j)


@inner
def store_group(w, row, x):
    """Scratch [g, 16] as sixteen rows of a matrix [N, g]."""
    for j in range(0, x.shape[0], 2 * LANES):
        store_columns(w, row, j, x, j)


@kernel
def round_rows(w, levels, low, high, zero, scale, base, codes):
    """Fill in the codes [N, K] of rows, with ``zero`` the code of level 0."""
    group = w.shape[1] // scale.shape[1]
    x = np.empty((group, LANES), np.float32)
    lowest, highest, middle = splat(low), splat(high), splat(zero)
    for row in range(0, w.shape[0], LANES):
        for g in range(scale.shape[1]):
            load_group(w, row, g * group, x)
            b = load(base[row // LANES], g)
            inverse = ratio(splat(_ONE), load(scale[row // LANES], g))
            for j in range(group):
                code = to_code((load(x, j) - b) * inverse, levels, lowest, highest)
                store(x, j, code + middle)
            for j in range(0, group, 2 * LANES):
                store_codes(codes, row, g * group + j, x, j)


@kernel
def round_group(w, u, levels, low, high, scale, base, level, error):
    """Fill in the levels [N, g] of a group of columns and the error to spread, [N, g].

    u [g, g] is the factor of the group.
    """
    x = np.empty((w.shape[1], LANES), np.float32)
    e = np.empty((w.shape[1], LANES), np.float32)
    lowest, highest = splat(low), splat(high)
    for row in range(0, w.shape[0], LANES):
        load_group(w, row, 0, x)
        s, b = load(scale[row // LANES], 0), load(base[row // LANES], 0)
        inverse = ratio(splat(_ONE), s)
        round_columns(x, e, u, 0, w.shape[1], s, inverse, b, levels, lowest, highest)
        store_group(level, row, x)
        store_group(error, row, e)


@kernel
def descend_group(gradient, h, levels, low, high, scale, along, up, level, change):
    """Move weights by the steps of scale and base, then each level; fill in their change [N, g].

    gradient [N, g] is half the loss's before, h [g, g] the group's moments, scale the new one.
    """
    group = gradient.shape[1]
    g = np.empty((group, LANES), np.float32)
    q = np.empty((group, LANES), np.float32)
    d = np.empty((group, LANES), np.float32)
    lowest, highest = splat(low), splat(high)
    for row in range(0, gradient.shape[0], LANES):
        load_group(gradient, row, 0, g)
        load_group(level, row, 0, q)
        block = row // LANES
        spread(g, q, d, h, 0, group, load(along[block], 0), load(up[block], 0))
        s = load(scale[block], 0)
        inverse = ratio(splat(_ONE), s)
        refit_levels(g, q, d, h, 0, group, s, inverse, levels, lowest, highest)
        store_group(level, row, q)
        store_group(change, row, d)
