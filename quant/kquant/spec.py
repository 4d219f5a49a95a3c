"""ggml's K-quants, where the scales of groups have codes too.

With ``b = k // 256``, d the float16 scale and dmin the float16 offset of such a block,

- 4 and 5 bits: ``w[n, k] = d[n, b] * sub_scale[n, g] * code[n, k] - dmin[n, b] * sub_min[n, g]``;
- 6 bits: ``w[n, k] = d[n, b] * sub_scale[n, g] * (code[n, k] - 32)``

(``block_q4_K``, ``block_q5_K`` and ``block_q6_K`` of ``ggml/src/ggml-common.h``).
"""

import numpy as np

from lfmq.quant.grid import F32, Array, Grid

KQUANT_BLOCK = 256  # weights of a row that share a block's d and dmin


def _weights(
    level: F32, scale: Array, offset: Array | None, sub_scale: Array | None, sub_min: Array | None
) -> F32:
    """Every product is exact in float32 (11 + 6 + 5 bits, or 11 + 7 + 5); one sum rounds."""
    if sub_scale is None:
        raise ValueError("a weight on the kquant grid has no scales of sub-blocks")
    each = sub_scale.shape[-1] // scale.shape[-1]
    level *= (np.repeat(scale.astype(np.float32), each, -1) * sub_scale)[..., None]
    if offset is not None and sub_min is not None:
        level -= (np.repeat(offset.astype(np.float32), each, -1) * sub_min)[..., None]
    return level


KQUANT = Grid(
    name="kquant",
    label="q{bits}_k",
    groups={4: (32,), 5: (32,), 6: (16,)},
    side_bits={4: 128, 5: 128, 6: 144},
    weights=_weights,
    bodies="lfmq.quant.kquant.bodies",
    span=KQUANT_BLOCK,
    offsets=(4, 5),
    aliases=("superblock",),
)
