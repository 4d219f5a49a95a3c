"""The values that travel between checkpoint, quantizer, writers and evidence.

All of them are frozen: a stage makes new ones and never changes what it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FloatType = Literal["float32", "float16", "bfloat16"]
Grid = Literal["symmetric", "affine_bias", "affine_zero_point", "kquant"]
# Names that grids had before, in recipes and files of statistics.
GRID_ALIASES: dict[str, Grid] = {
    "affine": "affine_bias",
    "asymmetric": "affine_zero_point",
    "superblock": "kquant",
}

FLOAT_BYTES: dict[FloatType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the values of a weight are stored: integer codes with one scale a group of a row.

    With a float16 scale, ``g = k // group`` and ``q = code[n, k]``, a code of ``bits`` bits:

    - ``symmetric``, which every container holds exactly:
      ``w[n, k] = scale[n, g] * (q - 2 ** (bits - 1))``;
    - ``affine_bias``, MLX's: ``w[n, k] = scale[n, g] * q + offset[n, g]``, the offset a float16;
    - ``affine_zero_point``, ONNX's: ``w[n, k] = scale[n, g] * (q - offset[n, g])``, the offset a
      code;
    - ``kquant``, ggml's K-quants, where scales have codes too: with ``b = k // 256``,
      ``w[n, k] = scale[n, b] * sub_scale[n, g] * q - offset[n, b] * sub_min[n, g]`` for 4 and 5
      bits in groups of 32, ``w[n, k] = scale[n, b] * sub_scale[n, g] * (q - 2 ** (bits - 1))``
      for 6 bits in groups of 16 (block_q4_K, block_q5_K and block_q6_K of
      ``ggml/src/ggml-common.h``; scale is d and offset dmin).
    """

    bits: int
    group: int = 32
    grid: Grid = "symmetric"

    @property
    def zero_point(self) -> int:
        """The code that stands for 0 on a grid without offsets."""
        return int(2 ** (self.bits - 1))

    @property
    def span(self) -> int:
        """Weights of a row that share a float16 scale."""
        return KQUANT_BLOCK if self.grid == "kquant" else self.group

    @property
    def has_offset(self) -> bool:
        """Whether weights move by an offset beside their scale."""
        return self.grid in ("affine_bias", "affine_zero_point") or (
            self.grid == "kquant" and self.bits in (4, 5)
        )

    @property
    def lowest_code(self) -> int:
        """Smallest code in use.

        Symmetric 8-bit leaves 0 out, so that codes - 128 negate as int8 (Q8_0).
        """
        return 1 if self.bits == 8 and self.grid == "symmetric" else 0

    @property
    def highest_code(self) -> int:
        """Largest code in use."""
        return int(2**self.bits - 1)

    def __str__(self) -> str:
        """Short form for tables, for example ``int4 g32`` ``int4 g64 affine`` or ``q4_k``."""
        if self.grid == "kquant":
            return f"q{self.bits}_k"
        short = f"int{self.bits} g{self.group}"
        return f"{short} {_SHORT[self.grid]}" if self.grid in _SHORT else short


# Model cards have these words for the grids with an offset.
_SHORT: dict[Grid, str] = {"affine_bias": "affine", "affine_zero_point": "asymmetric"}
KQUANT_BLOCK = 256  # weights of a K-quant's block, which share its float16 scale and offset

Storage = Scheme | FloatType


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight after quantization.

    Attributes:
        codes: uint8, unpacked, shape [..., N, K].
        scale: float16, shape [..., N, K // span].
        scheme: how codes, scale and offset make weights.
        offset: shape of the scale; float16 for ``affine_bias`` and for 4 and 5 bits of
            ``kquant``, a uint8 zero point for ``affine_zero_point``, else None.
        sub_scale: of ``kquant``, int8 [..., N, K // group]: what the scale is multiplied by,
            0 to 63 for 4 and 5 bits, -128 to 127 for 6.
        sub_min: of 4 and 5 bits there, the same for the offset, 0 to 63.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    scheme: Scheme
    offset: NDArray[np.float16] | NDArray[np.uint8] | None = None
    sub_scale: NDArray[np.int8] | None = None
    sub_min: NDArray[np.int8] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.codes.shape

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Those that are there, codes and scale first."""
        every = (self.codes, self.scale, self.offset, self.sub_scale, self.sub_min)
        return tuple(array for array in every if array is not None)

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "Quantized":
        """The weight that ``change`` makes of every array."""
        arrays = (self.codes, self.scale, self.offset, self.sub_scale, self.sub_min)
        codes, scale, *others = (None if a is None else change(a) for a in arrays)
        assert codes is not None
        assert scale is not None
        return Quantized(codes, scale, self.scheme, *others)


Weight = Quantized | NDArray[np.float32]

SLAB = 2**23  # weights of a large tensor that are packed at a time


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """Floats of a checkpoint as float32, which holds bfloat16 and float16 exactly."""
    if values.dtype == ml_dtypes.bfloat16:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """A run of rows of a weight, sharing its memory."""
    if not isinstance(weight, Quantized):
        return weight[start:stop]
    return weight.map(lambda array: array[start:stop])


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """The weights a :class:`Quantized` stands for, float32, shape of its codes.

    A float16 times a code is exact in float32 (11 bits times 8), so that no processor's fused
    multiply-add rounds an affine weight otherwise than a product and a sum.
    """
    groups = q.codes.reshape(*q.codes.shape[:-1], -1, q.scheme.group).astype(np.float32)
    scale = q.scale.astype(np.float32)[..., None]
    if q.scheme.grid == "kquant":
        return _dequantize_kquant(q, groups).reshape(q.codes.shape)
    if q.scheme.grid == "symmetric":
        values: NDArray[Any] = (groups - np.float32(q.scheme.zero_point)) * scale
        return values.reshape(q.codes.shape)
    if q.offset is None:
        raise ValueError(f"a weight on the {q.scheme.grid} grid has no offsets")
    offset = q.offset.astype(np.float32)[..., None]
    values = (
        groups * scale + offset if q.scheme.grid == "affine_bias" else (groups - offset) * scale
    )
    return values.reshape(q.codes.shape)


def _dequantize_kquant(q: Quantized, groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every product is exact in float32 (11 + 6 + 5 bits, or 11 + 7 + 5); one sum rounds."""
    if q.sub_scale is None:
        raise ValueError(f"a weight on the {q.scheme.grid} grid has no scales of sub-blocks")
    each = q.scheme.span // q.scheme.group
    scale = np.repeat(q.scale.astype(np.float32), each, -1) * q.sub_scale
    if q.offset is None or q.sub_min is None:
        return (groups - np.float32(q.scheme.zero_point)) * scale[..., None]
    offset = np.repeat(q.offset.astype(np.float32), each, -1) * q.sub_min
    values: NDArray[np.float32] = groups * scale[..., None] - offset[..., None]
    return values


@dataclass(frozen=True, slots=True)
class InputStats:
    """What calibration saw of the inputs of one weight.

    Attributes:
        tokens: that reached the weight.
        mass: sum of what they counted with: their affinity for an expert, else 1.
        sums: float64 [K], sums of their squared inputs, each times what the token counted with.
    """

    tokens: int
    mass: float
    sums: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean squared input of each column, [K]; zeros without a token."""
        means: NDArray[np.float64] = self.sums / self.mass if self.mass else self.sums * 0
        return means

    def __add__(self, other: "InputStats") -> "InputStats":
        """Those of both sets of tokens."""
        return InputStats(
            self.tokens + other.tokens, self.mass + other.mass, self.sums + other.sums
        )
