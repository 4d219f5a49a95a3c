"""Codes as a little-endian bit stream, the first in the lowest bits.

So MLX, ONNX Runtime's MatMulNBits and compressed-tensors' pack-quantized hold them. Eight codes
fill as many bytes as a code has bits: a row of whole groups of 32 fills whole words of 32 bits
(``pack_and_quantize`` of ``mlx/backend/cpu/quantized.cpp``).
"""

import numpy as np

from lfmq.formats.build import Bytes
from lfmq.quant.kernels import kernel


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """The bytes [size * bits / 8] of C-contiguous codes, whose number is a multiple of 8.

    Of 5 and 6 bits eight are a word of 64: neighbouring bytes close ranks, then pairs, then
    halves, which leaves all codes side by side in the word's first ``bits`` bytes.
    """
    if bits == 8:
        return codes.reshape(-1)
    if bits == 4:
        packed = np.empty(codes.size // 2, np.uint8)
        _fill_pairs(codes.reshape(-1).view("<u2"), packed)
        return packed
    words = codes.reshape(-1).view("<u8")
    for width in (8, 16, 32):
        low, high, gap = _fields(width, bits)
        words = (words & low) | ((words >> gap) & high)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


@kernel
def _fill_pairs(pairs, packed):  # type: ignore[no-untyped-def]
    for i in range(pairs.size):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


def unpack_codes(packed: Bytes, bits: int) -> Bytes:
    """The codes [packed.size * 8 / bits] of the bytes that :func:`pack_codes` gives."""
    if bits == 8:
        return packed.reshape(-1)
    if bits == 4:
        return np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1)
    filled = np.zeros((packed.size // bits, 8), np.uint8)
    filled[:, :bits] = packed.reshape(-1, bits)
    words = filled.view("<u8")
    for width in (32, 16, 8):
        low, high, gap = _fields(width, bits)
        words = (words & low) | ((words & high) << gap)
    return words.view(np.uint8).reshape(-1)


def _fields(width: int, bits: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Masks of the codes in every other field of ``width`` bits and of those behind them, packed.

    The third value is the gap between the two, which is what a field has beside its codes.
    """
    used = width * bits // 8
    low = sum((2**used - 1) << place for place in range(0, 64, 2 * width))
    return np.uint64(low), np.uint64(low << used), np.uint64(width - used)
