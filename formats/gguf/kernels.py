"""Compiled loops that fill ggml's blocks; :mod:`.blocks` describes the layouts.

``codes`` and ``scale`` are uint8, the latter the bytes of float16; ``blocks`` is uint8 [blocks,
bytes of a block].
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def fill_q4_0(codes, scale, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    """Code j low and code j + 16 high, after the scale."""
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(16):
            blocks[i, 2 + j] = codes[i, j] | np.uint8(codes[i, 16 + j] << np.uint8(4))


@njit(nogil=True, cache=True)
def fill_q8_0(codes, scale, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    """Codes less 128, after the scale."""
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(32):
            blocks[i, 2 + j] = codes[i, j] ^ np.uint8(0x80)


@njit(nogil=True, cache=True)
def fill_nibbles(codes, start, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    """Low nibbles of pairs of sub-blocks, from byte ``start`` of each block."""
    for i in range(codes.shape[0]):
        for c in range(4):
            for j in range(32):
                high = np.uint8(codes[i, c, 1, j] << np.uint8(4))
                blocks[i, start + 32 * c + j] = (codes[i, c, 0, j] & np.uint8(15)) | high


@njit(nogil=True, cache=True)
def fill_fifth(codes, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    """Fifth bits: bit s of byte l is that of weight l of sub-block s."""
    for i in range(codes.shape[0]):
        for j in range(32):
            blocks[i, 16 + j] = codes[i, 0, j] >> np.uint8(4)
        for s in range(1, 8):
            for j in range(32):
                bit = np.uint8((codes[i, s, j] >> np.uint8(4)) << np.uint8(s))
                blocks[i, 16 + j] |= bit


@njit(nogil=True, cache=True)
def fill_q6_k(codes, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    """Low nibbles of both halves, then their pairs of high bits."""
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
