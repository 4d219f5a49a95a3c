"""Round to nearest with an importance-weighted search for the scale, on every grid.

Bit-exact by construction: every sum runs over a group in order in float32, one row a SIMD lane,
without fused multiply-add; the tests hold plain definitions. Each grid has its own search.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfmq.quant.grid import Stored, load_bodies
from lfmq.quant.grids import GRIDS
from lfmq.quant.types import Quantized, Scheme, quantized


def quantize(
    w: NDArray[Any], scheme: Scheme, importance: NDArray[np.float32] | None = None
) -> Quantized:
    """Quantize a weight of shape [..., N, K].

    Args:
        w: the weight, float32, float16 or bfloat16; K is a multiple of the scheme's span.
        scheme: its grid.
        importance: weight of each input's squared error, shape [K]; all one when None.

    Raises:
        ValueError: ``w`` holds a NaN, an Inf or a value beyond float16.
    """
    shape = w.shape
    if shape[-1] % scheme.span:
        raise ValueError(f"rows of {shape[-1]} do not divide into groups of {scheme.span}")
    h = np.ones(shape[-1], np.float32) if importance is None else importance
    h = h.astype(np.float32, copy=False)
    if w.dtype == ml_dtypes.bfloat16:
        rows: NDArray[Any] = np.ascontiguousarray(w).view(np.uint16).reshape(-1, shape[-1])
    else:
        rows = np.ascontiguousarray(w, np.float32).reshape(-1, shape[-1])
    found: Stored = load_bodies(GRIDS[scheme.grid]).nearest(rows, h, scheme)
    whole = quantized(found, scheme)
    return whole.map(lambda array: array.reshape(*shape[:-1], array.shape[1]))
