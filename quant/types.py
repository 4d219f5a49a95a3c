"""The values that travel between checkpoint, quantizer, writers and evidence.

All of them are frozen: a stage makes new ones and never changes what it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfmq.quant.grid import Stored
from lfmq.quant.grids import GRIDS

FloatType = Literal["float32", "float16", "bfloat16"]
FLOAT_BYTES: dict[FloatType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the values of a weight are stored: integer codes with one scale a group of a row.

    The grid says what weight a code of ``bits`` bits stands for under the scale of its group:
    ``lfmq.quant.grids`` lists them, each documents its formula.
    """

    bits: int
    group: int = 32
    grid: str = "symmetric"

    @property
    def span(self) -> int:
        """Weights of a row that share a float16 scale."""
        return GRIDS[self.grid].span or self.group

    @property
    def has_offset(self) -> bool:
        """Whether weights move by an offset beside their scale."""
        return self.bits in GRIDS[self.grid].offsets

    @property
    def levels(self) -> tuple[float, ...] | None:
        """Of each code, where they are not evenly spaced."""
        return GRIDS[self.grid].levels

    @property
    def zero_point(self) -> int:
        """The code of level 0: in the middle, but on a grid with offsets."""
        return 0 if self.has_offset or self.levels else int(2 ** (self.bits - 1))

    @property
    def lowest_code(self) -> int:
        """Smallest code in use."""
        return GRIDS[self.grid].lowest.get(self.bits, 0)

    @property
    def highest_code(self) -> int:
        """Largest code in use."""
        return int(2**self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Scales and offsets included."""
        return self.bits + GRIDS[self.grid].side_bits[self.bits] / self.span

    def __str__(self) -> str:
        """Short form for tables, for example ``int4 g32`` ``int4 g64 affine`` or ``q4_k``."""
        return GRIDS[self.grid].label.format(bits=self.bits, group=self.group)


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


def quantized(stored: Stored, scheme: Scheme) -> Quantized:
    """The weight of a scheme whose arrays a body made."""
    arrays = (stored.offset, stored.sub_scale, stored.sub_min)
    return Quantized(stored.codes, stored.scale, scheme, *arrays)


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

    Raises:
        ValueError: an array that the grid needs is missing.
    """
    grid, scheme = GRIDS[q.scheme.grid], q.scheme
    if scheme.has_offset and q.offset is None:
        raise ValueError(f"a weight on the {grid.name} grid has no offsets")
    groups = q.codes.reshape(*q.codes.shape[:-1], -1, scheme.group)
    if grid.levels is None:
        level = groups.astype(np.float32)
        if scheme.zero_point:
            level -= np.float32(scheme.zero_point)
    else:
        level = np.array(grid.levels, np.float32)[groups]
    values = grid.weights(level, q.scale, q.offset, q.sub_scale, q.sub_min)
    return values.reshape(q.codes.shape)


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
