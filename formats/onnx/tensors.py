"""Tensors of an ONNX build's data file and the pure functions that pack and unpack them.

Layouts: MatMulNBits, GatherBlockQuantized and QMoE in ONNX Runtime's ``docs/ContribOperators.md``:
codes along the row with the low bits first, one float32 scale a group, zero point 2^(bits-1), or
on the asymmetric grid one a group, packed along the row as codes are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.bits import pack_codes, unpack_codes
from lfmq.formats.build import Bytes, as_bytes
from lfmq.formats.plan import TensorPlan
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import Quantized, Scheme


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a tensor's bytes: the weights it is made of and the function that packs them."""

    sources: tuple[str, ...]
    pack: Callable[..., Bytes]
    by_rows: bool = False


@dataclass(frozen=True, slots=True)
class DataTensor:
    """An initializer in the data file.

    Attributes:
        parts: equally long runs, one after the other.
        constant: its bytes, when no weight goes in.
        alias: name of the tensor whose bytes it shows under another shape.
    """

    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    constant: bytes | None = None
    alias: str | None = None

    @property
    def nbytes(self) -> int:
        """Its length, bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def float_dtype(entry: TensorPlan) -> type[np.float32] | type[np.float16]:
    """The type a tensor stored as floats has in the file.

    Raises:
        UnsupportedError: bfloat16, which ONNX Runtime's CPU kernels do not compute with.
    """
    if entry.storage == "float32":
        return np.float32
    if entry.storage == "float16":
        return np.float16
    raise UnsupportedError(
        f"{entry.name}: onnx stores floats as float32 or float16, the plan asks for "
        f"{entry.storage}"
    )


def pack_weights(*weights: Quantized) -> Bytes:
    """Codes of one weight, or of two with their rows taking turns; 4-bit: even element low."""
    return _pack_rows(_interleave([w.codes for w in weights]), weights[0].scheme.bits)


def pack_zero(*weights: Quantized) -> Bytes:
    """Zero points of the asymmetric grid; of an odd number in 4 bits the last shares with 0."""
    zero = _interleave([np.asarray(w.offset, np.uint8) for w in weights])
    bits = weights[0].scheme.bits
    return _pack_rows(np.pad(zero, ((0, 0), (0, -zero.shape[1] % (8 // bits)))), bits)


def zero_nbytes(groups: int, bits: int) -> int:
    """Bytes that the zero points of one row take."""
    return -(-groups * bits // 8)


def pack_scale(*weights: Quantized) -> Bytes:
    """Scales as float32, which the kernels want and which holds every float16."""
    return as_bytes(_interleave([w.scale for w in weights]).astype(np.float32))


def pack_float(
    *weights: NDArray[np.float32], dtype: type[np.generic], transposed: bool = False
) -> Bytes:
    """Float rows, of two weights taking turns; ``transposed`` gives MatMul its [K, N]."""
    values = _interleave(list(weights))
    return as_bytes((values.T if transposed else values).astype(dtype))


def _pack_rows(values: NDArray[np.uint8], bits: int) -> Bytes:
    return pack_codes(np.ascontiguousarray(values), bits)


def _unpack_rows(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    return unpack_codes(packed, bits).reshape(packed.shape[0], -1)


def _interleave(rows: list[NDArray[Any]]) -> NDArray[Any]:
    """Row 0 of each, then row 1 of each, and so on."""
    if len(rows) == 1:
        return rows[0]
    return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


def unpack(
    packed: NDArray[np.uint8],
    scale: NDArray[np.float32],
    scheme: Scheme,
    zero: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """Weights [N, K] from what :func:`pack_weights`, :func:`pack_scale` and the like made."""
    rows = _unpack_rows(packed.reshape(packed.shape[0], -1), scheme.bits)
    groups = rows.reshape(*scale.shape, scheme.group).astype(np.float32)
    if zero is None:
        groups -= np.float32(scheme.zero_point)
    else:
        groups -= _unpack_rows(zero, scheme.bits)[:, : scale.shape[1], None]
    values: NDArray[np.float32] = groups * scale[..., None]
    return values.reshape(rows.shape)


def rotary_tables(
    positions: int, head_dim: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine [positions, head_dim / 2] of position * theta^(-2i / head_dim).

    In float32 as transformers computes them; the power is rounded from float64, because a last
    bit of the frequency is a visible angle at position 100 000.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)
