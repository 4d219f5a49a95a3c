"""The values themselves."""

import numpy as np

from lfmq.quant.types import Quantized, Scheme, dequantize


def test_dequantize_by_hand() -> None:
    codes = np.full((1, 64), 8, np.uint8)
    codes[0, 0], codes[0, 33] = 0, 15
    scale = np.array([[0.5, -2.0]], np.float16)
    w = dequantize(Quantized(codes, scale, Scheme(4)))
    expected = np.zeros((1, 64), np.float32)
    expected[0, 0], expected[0, 33] = -4.0, -14.0
    np.testing.assert_array_equal(w, expected)


def test_dequantize_offsets_by_hand() -> None:
    codes = np.full((1, 64), 8, np.uint8)
    codes[0, 0], codes[0, 33] = 0, 255
    scale = np.array([[0.5, 2.0]], np.float16)
    offset = np.array([[-3.25, 10.0]], np.float16)
    w = dequantize(Quantized(codes, scale, Scheme(8, 32, "affine_bias"), offset))
    assert w[0, [0, 1, 32, 33]].tolist() == [-3.25, 0.75, 26.0, 520.0]
    zero = np.array([[9, 255]], np.uint8)
    w = dequantize(Quantized(codes, scale, Scheme(8, 32, "affine_zero_point"), zero))
    assert w[0, [0, 1, 32, 33]].tolist() == [-4.5, -0.5, -494.0, 0.0]


def test_scheme_codes() -> None:
    assert (Scheme(4).lowest_code, Scheme(4).highest_code, Scheme(4).zero_point) == (0, 15, 8)
    assert (Scheme(8).lowest_code, Scheme(8).highest_code, Scheme(8).zero_point) == (1, 255, 128)
    assert str(Scheme(8, 64)) == "int8 g64"
    assert (
        Scheme(8, 32, "affine_bias").lowest_code,
        Scheme(8, 32, "affine_bias").highest_code,
    ) == (0, 255)
    assert str(Scheme(4, 64, "affine_bias")) == "int4 g64 affine"
    assert str(Scheme(8, 32, "affine_zero_point")) == "int8 g32 asymmetric"
