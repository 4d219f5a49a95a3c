"""The bit stream against its definition in Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmq.formats.bits import pack_codes, unpack_codes

BITS = (4, 5, 6, 8)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (5, range(16), "2088418a3928a9c59a7b"),
        (6, range(3, 64, 4), "c3b13cd3b57de3b9bef3bdff"),
    ],
)
def test_golden_bytes(bits: int, codes: range, expected: str) -> None:
    row = np.array(codes, np.uint8)
    assert pack_codes(row, bits).tobytes().hex() == expected


@given(bits=st.sampled_from(BITS), groups=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_the_first_code_is_in_the_lowest_bits(bits: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (groups, 32), dtype=np.uint8)
    stream = sum(int(code) << bits * i for i, code in enumerate(codes.flat))
    packed = pack_codes(codes, bits)
    assert packed.tobytes() == stream.to_bytes(codes.size * bits // 8, "little")
    np.testing.assert_array_equal(unpack_codes(packed, bits), codes.reshape(-1))
