import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmq.validation.measure.significance import RESAMPLES, bootstrap, mcnemar, standard_error


def test_standard_error_is_by_window():
    values = np.array([[1.0, 1.0], [3.0, 3.0]])
    assert standard_error(values) == pytest.approx(1.0)
    assert np.isnan(standard_error(values[:1]))


def test_bootstrap_is_a_plain_loop_over_drawn_windows():
    """Other draws, the same distribution: ends and spread within the noise of the draws."""
    values = np.random.default_rng(1).exponential(size=(40, 16))
    found, rng = bootstrap(values), np.random.default_rng(2)
    plain = np.array(
        [values[rng.integers(0, 40, 40)].mean() for _ in range(4 * RESAMPLES)], np.float64
    )
    # a quantile of 2,000 draws has an error of a twentieth of the spread: sqrt(p q / n) / density
    slack = 4 * 0.06 * plain.std()
    assert found.low == pytest.approx(np.quantile(plain, 0.025), abs=slack)
    assert found.high == pytest.approx(np.quantile(plain, 0.975), abs=slack)
    assert found.stderr == pytest.approx(plain.std(), rel=0.1)
    assert found.stderr == pytest.approx(standard_error(values), rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Windows with an effect of their own: an interval by position would be far too narrow."""
    rng, covered, naive = np.random.default_rng(4), 0, 0
    for _ in range(200):
        values = 3 + rng.standard_normal((50, 1)) + 0.3 * rng.standard_normal((50, 20))
        found = bootstrap(values)
        covered += found.low <= 3 <= found.high
        naive += abs(values.mean() - 3) <= 1.96 * values.std() / math.sqrt(values.size)
    # 95 % of 200 less three standard deviations, and a little that percentiles lack at 50 windows
    assert covered >= 176
    assert naive < 120


@given(st.integers(2, 30), st.integers(1, 5), st.floats(-10, 10))
def test_bootstrap_of_a_constant_is_the_constant(windows, positions, value):
    found = bootstrap(np.full((windows, positions), value))
    assert found.low == pytest.approx(value, abs=1e-9)
    assert found.high == pytest.approx(value, abs=1e-9)
    assert found.stderr == pytest.approx(0, abs=1e-9)


def test_equal_values_differ_by_exactly_nothing():
    values = np.random.default_rng(3).random((9, 7))
    found = bootstrap(values, values, transform=lambda a, b: np.exp(b) - np.exp(a))
    assert (found.low, found.high, found.stderr) == (0.0, 0.0, 0.0)
    assert not found.excludes(0.0)


def test_a_transform_is_of_the_means():
    values = np.random.default_rng(3).random((9, 7))
    found = bootstrap(values, transform=np.exp)
    plain = bootstrap(values)
    assert found.low == pytest.approx(math.exp(plain.low))  # monotone: quantiles go with it
    assert found.high == pytest.approx(math.exp(plain.high))
    assert found.excludes(0.0)
    assert found.low < found.high


def test_one_window_has_no_interval():
    found = bootstrap(np.ones((1, 4)))
    assert all(math.isnan(x) for x in (found.low, found.high, found.stderr))
    assert not found.excludes(1.0)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 9, 2 * 11 / 1024),
        (6, 16, 2 * 110056 / 2**22),  # 0.0525: sum of C(22, i) for i up to 6
        (150, 86, 3.716e-5),  # Agresti, Categorical Data Analysis, table 10.1: 3e-5 by chi-square
    ],
)
def test_mcnemar_of_known_tables(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-3)
    assert mcnemar(second, first) == mcnemar(first, second)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial(first, second):
    n = first + second
    tail = sum(math.comb(n, i) for i in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_of_many_positions_does_not_overflow():
    assert 0 < mcnemar(50_000, 51_000) < 0.01
    assert mcnemar(100_000, 100_001) > 0.9
