"""The codebook grid: ``w[n, k] = scale[n, g] * LEVELS[code[n, k]]``, ggml's ``IQ4_NL``.

``block_iq4_nl`` of ``ggml/src/ggml-common.h`` with ``kvalues_iq4nl``: levels lie closer together
near 0, where most weights of a group are.
"""

from lfmq.quant.grid import Grid, scaled

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

CODEBOOK = Grid(
    name="codebook",
    label="iq4_nl",
    groups={4: (32,)},
    side_bits={4: 16},
    weights=scaled,
    bodies="lfmq.quant.codebook.bodies",
    levels=LEVELS,
)
