"""ggml's blocks: a float16 scale and the codes of 32 weights of a row.

Layouts follow ``ggml/src/ggml-common.h`` (block_q4_0, block_q8_0).
"""

import numpy as np
from numba import njit

from lfmq.formats.build import Bytes
from lfmq.quant.types import Quantized

BLOCK = 32


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


@njit(nogil=True, cache=True)
def _fill_q4_0(codes, scale, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(16):
            blocks[i, 2 + j] = codes[i, j] | np.uint8(codes[i, 16 + j] << np.uint8(4))


@njit(nogil=True, cache=True)
def _fill_q8_0(codes, scale, blocks):  # type: ignore[no-untyped-def] # pragma: no cover
    for i in range(codes.shape[0]):
        blocks[i, 0], blocks[i, 1] = scale[i, 0], scale[i, 1]
        for j in range(32):
            blocks[i, 2 + j] = codes[i, j] ^ np.uint8(0x80)
