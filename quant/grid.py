"""What a grid is, as data: numbers and one formula of numpy, without any algorithm.

The folder of a grid has its :class:`Grid` in ``spec.py`` and its algorithms, which import numba
and torch, in ``bodies.py``; ``lfmq.quant.grids`` lists all grids. E experts, N rows, K columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Array = NDArray[Any]
# Weights [..., G, g] of levels [..., G, g], scale [..., B], offset, sub_scale and sub_min.
Weights = Callable[[F32, Array, Array | None, Array | None, Array | None], F32]


LANES = 16  # rows that a compiled body takes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that a weight can have, and what is stored of it.

    Attributes:
        name: the word of recipes.
        label: what tables call it, with ``{bits}`` and ``{group}``.
        groups: by legal bits, the legal groups; the first is the default.
        side_bits: by bits, what a container stores for each span beside the codes, bits.
        weights: of levels, scales and offsets.
        bodies: module with its algorithms.
        span: weights of a row that share a float16 scale; a group when None.
        offsets: the bits with which weights have an offset.
        lowest: by bits, the smallest code in use where that is not 0.
        levels: of each code, ascending; when None they are evenly spaced.
        aliases: words of older recipes and files of statistics.
    """

    name: str
    label: str
    groups: Mapping[int, tuple[int, ...]]
    side_bits: Mapping[int, int]
    weights: Weights
    bodies: str
    span: int | None = None
    offsets: tuple[int, ...] = ()
    lowest: Mapping[int, int] = field(default_factory=dict)
    levels: tuple[float, ...] | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """The arrays of a weight that a body gives back: those of ``lfmq.quant.types.Quantized``."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    offset: NDArray[np.float16] | NDArray[np.uint8] | None = None
    sub_scale: NDArray[np.int8] | None = None
    sub_min: NDArray[np.int8] | None = None


class Form(Protocol):
    """What a body asks of a scheme (``lfmq.quant.types.Scheme``)."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def group(self) -> int:
        """Weights of a row that share a scale."""

    @property
    def grid(self) -> str:
        """Its name."""

    @property
    def levels(self) -> tuple[float, ...] | None:
        """Of each code, where they are not evenly spaced."""

    @property
    def has_offset(self) -> bool:
        """Whether weights move by an offset beside their scale."""

    @property
    def zero_point(self) -> int:
        """The code of level 0."""

    @property
    def lowest_code(self) -> int:
        """Smallest in use."""

    @property
    def highest_code(self) -> int:
        """Largest in use."""


def load_bodies(grid: Grid) -> Any:
    """The algorithms of a grid, ``Bodies`` of ``lfmq.quant.state``, with numba and torch."""
    return import_module(grid.bodies).BODIES


def scaled(level: F32, scale: Array, *_: object) -> F32:
    """Weights of a grid with nothing but a scale; exact in float32 up to 13 bits a level."""
    level *= scale.astype(np.float32)[..., None]
    return level
