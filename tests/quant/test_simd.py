"""Vectors of kernels against numpy, lane by lane."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from lfmq.quant import simd as v
from lfmq.quant.simd import LANES

RNG = np.random.default_rng(0)
VALUES = (RNG.standard_normal((64, LANES)) * 10.0 ** RNG.integers(-9, 5, (64, LANES))).astype(
    np.float32
)
VALUES[0, :6] = (0, -0.0, 2.0**-14, 2.0**-25, 65504, np.nan)


def run(operation: Any, *arguments: np.ndarray) -> np.ndarray:
    """The operation on each row of the arguments [n, 16]."""
    out = np.empty_like(arguments[0])
    operation(*arguments, out)
    return out


@njit
def _arithmetic(a, b, out):
    for j in range(a.shape[0]):
        x, y = v.load(a, j), v.load(b, j)
        v.store(out, j, (x + y) * x - np.float32(3) * y / (x + np.float32(0.5)) + -y)


@njit
def _half(a, out):
    for j in range(a.shape[0]):
        v.store(out, j, v.half(v.load(a, j)))


@njit
def _ratio(a, b, out):
    for j in range(a.shape[0]):
        v.store(out, j, v.ratio(v.load(a, j), v.load(b, j)))


@njit
def _choose(a, b, out):
    for j in range(a.shape[0]):
        x, y = v.load(a, j), v.load(b, j)
        v.store(out, j, v.where_above(x, y, v.absolute(x), v.where_within(x, y, y, x)))


@njit
def _nearest(a, out):
    for j in range(a.shape[0]):
        v.store(out, j, v.nearest(v.load(a, j), v.splat(np.float32(-8)), v.splat(np.float32(7))))


@njit
def _any_above(a, b):
    return v.any_above(v.load(a, 0), v.load(b, 0))


@njit
def _copy(rows, out, codes):
    x = np.empty((32, LANES), np.float32)
    for row in range(0, rows.shape[0], LANES):
        for column in range(0, rows.shape[1], 32):
            v.load_columns(rows, row, column, x, 0)
            v.store_columns(out, row, column, x, 0)
            for j in range(32):
                v.store(x, j, v.absolute(v.load(x, j)))
            v.store_codes(codes, row, column, x, 0)


@np.errstate(all="ignore")
def test_arithmetic_rounds_as_numpy_does():
    a, b = VALUES, VALUES[::-1].copy()
    expected = (a + b) * a - np.float32(3) * b / (a + np.float32(0.5)) + -b
    np.testing.assert_array_equal(run(_arithmetic, a, b), expected)


def test_half_is_the_nearest_float16():
    a = np.clip(VALUES, -65504, 65504)
    np.testing.assert_array_equal(run(_half, a), a.astype(np.float16).astype(np.float32))


@np.errstate(all="ignore")
def test_ratio_is_zero_over_zero():
    a, b = VALUES[1:], VALUES[:-1] * (RNG.random((63, LANES)) < 0.5).astype(np.float32)
    np.testing.assert_array_equal(run(_ratio, a, b), np.where(b == 0, 0, a / b))


def test_choices_of_lanes():
    a, b = VALUES, VALUES[::-1].copy()
    expected = np.where(a > b, np.abs(a), np.where(a <= b, b, a))
    np.testing.assert_array_equal(run(_choose, a, b), expected)


def test_nearest_goes_to_even_between_limits():
    a = np.arange(-10, 10, 0.25, dtype=np.float32).reshape(-1, LANES)
    np.testing.assert_array_equal(run(_nearest, a), np.clip(np.rint(a), -8, 7))


def test_any_above():
    low, high = np.zeros((1, LANES), np.float32), np.zeros((1, LANES), np.float32)
    assert not _any_above(high, low)
    high[0, 11] = 1
    assert _any_above(high, low)
    high[0, 11] = np.nan
    assert not _any_above(high, low)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_columns_of_a_matrix_come_and_go(dtype):
    values = RNG.integers(-255, 256, (32, 96)).astype(dtype)
    rows = values if dtype is np.float32 else values.view(np.uint16)
    out, codes = np.zeros(values.shape, np.float32), np.zeros(values.shape, np.uint8)
    _copy(rows, out, codes)
    np.testing.assert_array_equal(out, values.astype(np.float32))
    np.testing.assert_array_equal(codes, np.abs(values.astype(np.float32)))


def test_rows_are_filled_up_with_zeros():
    assert v.whole_lanes(np.ones((16, 4))).shape == (16, 4)
    padded = v.whole_lanes(np.ones((17, 4)))
    assert (padded.shape, padded.sum()) == ((32, 4), 68)
