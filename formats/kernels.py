"""Compiled loops that pack codes; :mod:`.bits` describes the layout."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def fill_pairs(pairs, packed):  # type: ignore[no-untyped-def] # pragma: no cover
    """Two codes a byte, the first low; ``pairs`` is uint16 [bytes], ``packed`` uint8 [bytes]."""
    for i in range(pairs.size):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
