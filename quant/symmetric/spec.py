"""The symmetric grid: ``w[n, k] = scale[n, g] * (code[n, k] - 2 ** (bits - 1))``.

Portable: every container holds exactly these numbers (docs/quantization.md). At 8 bits code 0 is
left out, so that codes - 128 negate as int8 (block_q8_0 of ``ggml/src/ggml-common.h``).
"""

from lfmq.quant.grid import Grid, scaled

GROUPS = (32, 64, 128)

SYMMETRIC = Grid(
    name="symmetric",
    label="int{bits} g{group}",
    groups={4: GROUPS, 8: GROUPS},
    side_bits={4: 16, 8: 16},
    weights=scaled,
    bodies="lfmq.quant.symmetric.bodies",
    lowest={8: 1},
)
