"""What kernels of all grids with a scale for each group share: to load a group and to round it.

N rows, a multiple of 16; g columns of a group. A table of levels may be None
(``lfmq.quant.columns``).
"""

import numpy as np

from lfmq.quant.columns import refit_levels, round_columns, spread, to_code
from lfmq.quant.kernels import inlined, inner
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


@inlined
def load_group(w, row, column, x):
    """Columns of sixteen rows as scratch [g, 16]."""
    for j in range(0, x.shape[0], 2 * LANES):
        load_columns(w, row, column + j, x, j)


@inner
def store_group(w, row, x):
    """Scratch [g, 16] as sixteen rows of a matrix [N, g]."""
    for j in range(0, x.shape[0], 2 * LANES):
        store_columns(w, row, j, x, j)


@inlined
def settle(x, e, u, s, b, levels, lowest, highest, zero, row, column, out, error):
    """Round a group [g, 16] of sixteen rows whose scale s and base b are chosen.

    To nearest when u is None: fills in codes, ``out`` [N, K], with ``zero`` that of level 0. Else,
    with u the factor [g, g] of the group's columns, fills in its levels, ``out`` [N, g], and the
    error to spread, [N, g]; e is scratch for it.
    """
    inverse = ratio(splat(_ONE), s)
    if u is None:
        for j in range(x.shape[0]):
            code = to_code((load(x, j) - b) * inverse, levels, lowest, highest)
            store(x, j, code + splat(zero))
        for j in range(0, x.shape[0], 2 * LANES):
            store_codes(out, row, column + j, x, j)
    else:
        round_columns(x, e, u, 0, x.shape[0], s, inverse, b, levels, lowest, highest)
        store_group(out, row, x)
        store_group(error, row, e)


@inner
def descend(g, q, d, h, s, along, up, levels, lowest, highest, row, level, change):
    """Move weights by the steps of scale and base, then each level; fill in their change [N, g].

    g [g, 16] is half the loss's gradient before, q the levels, d scratch, h the group's moments,
    s the new scale.
    """
    spread(g, q, d, h, 0, q.shape[0], along, up)
    inverse = ratio(splat(_ONE), s)
    refit_levels(g, q, d, h, 0, q.shape[0], s, inverse, levels, lowest, highest)
    store_group(level, row, q)
    store_group(change, row, d)
