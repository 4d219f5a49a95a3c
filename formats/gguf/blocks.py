"""ggml's blocks of integer weights, byte by byte: packers and the types they make.

Layouts are those of ``ggml/src/ggml-common.h``; docs/gguf.md describes them. Blocks follow one
another along the row.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from lfmq.formats.build import Bytes
from lfmq.formats.schemes import Held
from lfmq.quant.grids import GRIDS
from lfmq.quant.kernels import kernel
from lfmq.quant.types import Quantized

BLOCK = 32  # weights of a Q4_0 or Q8_0 block, and of a sub-block of Q4_K and Q5_K

QUANT_TYPES: dict[tuple[str, int], GGMLQuantizationType] = {
    ("symmetric", 4): GGMLQuantizationType.Q4_0,
    ("symmetric", 8): GGMLQuantizationType.Q8_0,
    ("kquant", 4): GGMLQuantizationType.Q4_K,
    ("kquant", 5): GGMLQuantizationType.Q5_K,
    ("kquant", 6): GGMLQuantizationType.Q6_K,
    ("codebook", 4): GGMLQuantizationType.IQ4_NL,
}
# What the blocks hold: bits and group of each grid.
SCHEMES: Held = {
    grid: {bits: GRIDS[grid].groups[bits][:1] for name, bits in QUANT_TYPES if name == grid}
    for grid, _ in QUANT_TYPES
}


def pack_q4_0(q: Quantized) -> Bytes:
    """block_q4_0: float16 scale, then 16 bytes; byte j holds code j low and code j + 16 high."""
    blocks = np.empty((q.scale.size, 18), np.uint8)
    _fill_q4_0(q.codes.reshape(-1, BLOCK), q.scale.reshape(-1, 1).view(np.uint8), blocks)
    return blocks.reshape(-1)


def pack_q8_0(q: Quantized) -> Bytes:
    """block_q8_0: float16 scale, then 32 int8 (code - 128)."""
    blocks = np.empty((q.scale.size, 34), np.uint8)
    _fill_q8_0(q.codes.reshape(-1, BLOCK), q.scale.reshape(-1, 1).view(np.uint8), blocks)
    return blocks.reshape(-1)


def pack_q4_k(q: Quantized) -> Bytes:
    """block_q4_K: d, dmin, 12 bytes of sub_scales and sub_mins, then 128 of codes.

    Sub-blocks 2c and 2c + 1 share the bytes 32 c to 32 c + 31, the first in the low nibble.
    """
    blocks = np.empty((q.scale.size, 144), np.uint8)
    blocks[:, :16] = _scales(q)
    _fill_nibbles(q.codes.reshape(-1, 4, 2, BLOCK), 16, blocks)
    return blocks.reshape(-1)


def pack_q5_k(q: Quantized) -> Bytes:
    """block_q5_K: as block_q4_K, with the codes' fifth bits before their nibbles.

    Bit s of fifth byte l is that of weight l of sub-block s.
    """
    blocks = np.empty((q.scale.size, 176), np.uint8)
    blocks[:, :16] = _scales(q)
    _fill_fifth(q.codes.reshape(-1, 8, BLOCK), blocks)
    _fill_nibbles(q.codes.reshape(-1, 4, 2, BLOCK), 48, blocks)
    return blocks.reshape(-1)


def pack_q6_k(q: Quantized) -> Bytes:
    """block_q6_K: 128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 sub_scales, then d.

    Of each half of 128 weights, runs of 32: the first two have the low nibbles of 64 bytes, the
    other two the high ones; of 32 bytes of pairs the first run has the lowest.
    """
    blocks = np.empty((q.scale.size, 210), np.uint8)
    _fill_q6_k(q.codes.reshape(-1, 2, 4, BLOCK), blocks)
    blocks[:, 192:208] = _codes_of(q.sub_scale, q.scheme.span // q.scheme.group)
    blocks[:, 208:] = q.scale.reshape(-1, 1).view(np.uint8)
    return blocks.reshape(-1)


def _scales(q: Quantized) -> NDArray[np.uint8]:
    """The first 16 bytes of block_q4_K and block_q5_K, [blocks, 16].

    d and dmin; then six bits of each sub_scale and sub_min: those of sub-blocks 0 to 3 in the low
    six of eight bytes, of 4 to 7 the low four in four more bytes and the rest above those eight.
    """
    if q.offset is None:
        raise ValueError(f"a weight of {q.scheme} has no offsets")
    sub_scale, sub_min = _codes_of(q.sub_scale, 8), _codes_of(q.sub_min, 8)
    found = np.empty((len(sub_scale), 16), np.uint8)
    found[:, :2] = q.scale.reshape(-1, 1).view(np.uint8)
    found[:, 2:4] = q.offset.reshape(-1, 1).view(np.uint8)
    found[:, 4:8] = sub_scale[:, :4] | (sub_scale[:, 4:] >> 4 << 6)
    found[:, 8:12] = sub_min[:, :4] | (sub_min[:, 4:] >> 4 << 6)
    found[:, 12:] = (sub_scale[:, 4:] & 15) | (sub_min[:, 4:] << 4)
    return found


def _codes_of(codes: NDArray[np.int8] | None, count: int) -> NDArray[np.uint8]:
    """Codes of sub-blocks' scales by block, as bytes [blocks, count]."""
    if codes is None:
        raise ValueError("a K-quant has codes for the scales of its sub-blocks")
    return codes.view(np.uint8).reshape(-1, count)


PACKERS: dict[GGMLQuantizationType, Callable[[Quantized], Bytes]] = {
    GGMLQuantizationType.Q4_0: pack_q4_0,
    GGMLQuantizationType.Q8_0: pack_q8_0,
    GGMLQuantizationType.Q4_K: pack_q4_k,
    GGMLQuantizationType.Q5_K: pack_q5_k,
    GGMLQuantizationType.Q6_K: pack_q6_k,
    GGMLQuantizationType.IQ4_NL: pack_q4_0,  # block_iq4_nl has the same bytes
}


@kernel
def _fill_q4_0(codes, scale, blocks):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(16):
            blocks[i, 2 + j] = codes[i, j] | np.uint8(codes[i, 16 + j] << np.uint8(4))


@kernel
def _fill_q8_0(codes, scale, blocks):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(32):
            blocks[i, 2 + j] = codes[i, j] ^ np.uint8(0x80)


@kernel
def _fill_nibbles(codes, start, blocks):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        for c in range(4):
            for j in range(32):
                high = np.uint8(codes[i, c, 1, j] << np.uint8(4))
                blocks[i, start + 32 * c + j] = (codes[i, c, 0, j] & np.uint8(15)) | high


@kernel
def _fill_fifth(codes, blocks):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        for j in range(32):
            blocks[i, 16 + j] = codes[i, 0, j] >> np.uint8(4)
        for s in range(1, 8):
            for j in range(32):
                bit = np.uint8((codes[i, s, j] >> np.uint8(4)) << np.uint8(s))
                blocks[i, 16 + j] |= bit


@kernel
def _fill_q6_k(codes, blocks):  # type: ignore[no-untyped-def]
    low, four = np.uint8(15), np.uint8(4)
    for i in range(codes.shape[0]):
        for part in range(2):
            for j in range(32):
                a, b = codes[i, part, 0, j], codes[i, part, 1, j]
                c, d = codes[i, part, 2, j], codes[i, part, 3, j]
                blocks[i, 64 * part + j] = (a & low) | np.uint8(c << four)
                blocks[i, 64 * part + 32 + j] = (b & low) | np.uint8(d << four)
                pairs = (a >> four) | np.uint8((b >> four) << np.uint8(2))
                pairs |= np.uint8((c >> four) << four) | np.uint8((d >> four) << np.uint8(6))
                blocks[i, 128 + 32 * part + j] = pairs
