"""K-quants' bytes against a plain reading of their layout, gguf-py and ggml."""

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lfmq.formats.gguf.blocks import PACKERS, QUANT_TYPES
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Quantized, Scheme, dequantize

U8 = NDArray[np.uint8]
SCHEMES = (Scheme(4, 32, "kquant"), Scheme(5, 32, "kquant"), Scheme(6, 16, "kquant"))
BYTES = {4: 144, 5: 176, 6: 210}
HALVES = {4: (0, 2), 5: (0, 2), 6: (208,)}  # where the float16 values of a block are


def unpack(block: U8, scheme: Scheme) -> Quantized:
    """One block, weight by weight."""
    codes = np.zeros((1, 256), np.uint8)
    d = block[HALVES[scheme.bits][0] :][:2].view(np.float16)[None]
    if scheme.bits == 6:
        for k in range(256):
            part, run, byte = k // 128, k % 128 // 32, k % 32
            nibble = block[64 * part + 32 * (run % 2) + byte] >> (4 if run >= 2 else 0) & 15
            pair = block[128 + 32 * part + byte] >> (2 * run) & 3
            codes[0, k] = nibble | pair << 4
        return Quantized(codes, d, scheme, None, block[192:208].view(np.int8)[None])
    s, low = block[4:16], block[48 if scheme.bits == 5 else 16 :]
    step, shift = np.zeros((2, 1, 8), np.int8)
    for j in range(8):
        step[0, j] = s[j] & 63 if j < 4 else (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
        shift[0, j] = s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | (s[j] >> 6) << 4
        for byte in range(32):
            code = low[32 * (j // 2) + byte] >> (4 * (j % 2)) & 15
            fifth = block[16 + byte] >> j & 1 if scheme.bits == 5 else 0
            codes[0, 32 * j + byte] = code | fifth << 4
    return Quantized(codes, d, scheme, block[2:4].view(np.float16)[None], step, shift)


def ggml_dequantize(
    library: ctypes.CDLL, packed: U8, kind: GGMLQuantizationType
) -> NDArray[np.float32]:
    found = np.empty(packed.size // BYTES[int(kind.name[1])] * 256, np.float32)
    function = getattr(library, f"dequantize_row_{kind.name.lower().replace('k', 'K')}")
    function(
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_void_p(found.ctypes.data),
        ctypes.c_int64(found.size),
    )
    return found


def assert_all_decode_the_same(packed: U8, expected: Quantized, ggml: ctypes.CDLL) -> None:
    kind = QUANT_TYPES[expected.scheme.grid, expected.scheme.bits]
    values = dequantize(expected).reshape(-1)
    np.testing.assert_array_equal(gguf_dequantize(packed, kind).reshape(-1), values)
    np.testing.assert_array_equal(ggml_dequantize(ggml, packed, kind), values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_any_legal_bytes(scheme: Scheme, seed: int, ggml: ctypes.CDLL) -> None:
    rng = np.random.default_rng(seed)
    block = rng.integers(0, 256, BYTES[scheme.bits], np.uint8)
    for at in HALVES[scheme.bits]:
        block[at + 1] = block[at + 1] if block[at + 1] & 0x7C != 0x7C else 0xBB  # finite
    q = unpack(block, scheme)
    np.testing.assert_array_equal(PACKERS[QUANT_TYPES["kquant", scheme.bits]](q), block)
    assert_all_decode_the_same(block, q, ggml)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 20))
def test_quantized_weights(scheme: Scheme, seed: int, rows: int, ggml: ctypes.CDLL) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, 768)) * np.exp(rng.normal(-4, 3, (rows, 1)))
    q = quantize(np.clip(w, -65504, 65504).astype(np.float32), scheme)
    packed = PACKERS[QUANT_TYPES["kquant", scheme.bits]](q)
    assert packed.size == rows * 3 * BYTES[scheme.bits]
    assert_all_decode_the_same(packed, q, ggml)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_a_block_needs(scheme: Scheme) -> None:
    q = quantize(np.ones((1, 256), np.float32), scheme)
    packer = PACKERS[QUANT_TYPES["kquant", scheme.bits]]
    with pytest.raises(ValueError, match="codes for the scales"):
        packer(Quantized(q.codes, q.scale, scheme, q.offset))
    if scheme.has_offset:
        with pytest.raises(ValueError, match="no offsets"):
            packer(Quantized(q.codes, q.scale, scheme, None, q.sub_scale, q.sub_min))
