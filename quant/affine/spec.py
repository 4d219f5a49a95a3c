"""The affine grids, which have an offset for each group beside its scale.

- ``affine_bias``, MLX's: ``w[n, k] = scale[n, g] * code[n, k] + offset[n, g]``, a float16 offset;
- ``affine_zero_point``, ONNX's: ``w[n, k] = scale[n, g] * (code[n, k] - offset[n, g])``, the
  offset a code (``MatMulNBits`` of onnxruntime/docs/ContribOperators.md).

A float16 times a code is exact in float32 (11 bits times 8), so that no processor's fused
multiply-add rounds a weight otherwise than a product and a sum.
"""

import numpy as np

from lfmq.quant.grid import F32, Array, Grid, scaled

GROUPS = (32, 64, 128)


def _with_bias(level: F32, scale: Array, offset: Array | None, *_: object) -> F32:
    assert offset is not None
    level = scaled(level, scale)
    level += offset.astype(np.float32)[..., None]
    return level


def _with_zero_point(level: F32, scale: Array, offset: Array | None, *_: object) -> F32:
    assert offset is not None
    level -= offset.astype(np.float32)[..., None]
    return scaled(level, scale)


AFFINE_BIAS = Grid(
    name="affine_bias",
    label="int{bits} g{group} affine",
    groups=dict.fromkeys((4, 5, 6, 8), GROUPS),
    side_bits=dict.fromkeys((4, 5, 6, 8), 32),
    weights=_with_bias,
    bodies="lfmq.quant.affine.bodies",
    offsets=(4, 5, 6, 8),
    aliases=("affine",),
)
AFFINE_ZERO_POINT = Grid(
    name="affine_zero_point",
    label="int{bits} g{group} asymmetric",
    groups={4: GROUPS, 8: GROUPS},
    side_bits={4: 20, 8: 24},
    weights=_with_zero_point,
    bodies="lfmq.quant.affine.bodies",
    offsets=(4, 8),
    aliases=("asymmetric",),
)
