"""How sure a figure is: block bootstrap over windows, and McNemar's test.

Positions of one window depend on each other, windows do not: a window is the block that is drawn
(Efron and Tibshirani 1993, sec. 8.6). W windows, P scored positions a window, B resamples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_SEED = 20261015
_LEVEL = 0.95

Transform = Callable[..., NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval and a standard error; not numbers for one window or without a bound."""

    low: float
    high: float
    stderr: float

    def excludes(self, value: float) -> bool:
        """Whether the interval lies on one side of a value."""
        return self.low > value or self.high < value


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of [W, P] values, from the means of windows."""
    windows = values.mean(axis=1)
    if len(windows) < 2:
        return float("nan")
    return float(windows.std(ddof=1) / np.sqrt(len(windows)))


def bootstrap(*values: NDArray[Any], transform: Transform | None = None) -> Interval:
    """Interval of the mean of [W, P] values, or of ``transform`` of the means of several.

    Windows are drawn with replacement, ``RESAMPLES`` times, from a fixed seed: the draws are the
    same for all figures of as many windows. The interval is that of the percentiles, the standard
    error that of the draws.

    Args:
        values: arrays [W, P] of the same windows.
        transform: takes as many arrays [B] and gives one; needed for more than one.
    """
    means = [np.asarray(v, np.float64).mean(axis=1) for v in values]
    if len(means[0]) < 2:
        return Interval(math.nan, math.nan, math.nan)
    draws = _draws(len(means[0]))
    drawn = [draws @ m / len(m) for m in means]
    found = drawn[0] if transform is None else transform(*drawn)
    if not np.isfinite(found).all():  # the perplexity of a broken build
        return Interval(math.nan, math.nan, math.nan)
    low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(low), float(high), float(found.std(ddof=1)))


def _draws(windows: int) -> NDArray[np.float64]:
    """How often each resample holds each window, [B, W]."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(windows, np.full(windows, 1 / windows), RESAMPLES).astype(np.float64)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (McNemar 1947; the binomial of the discordant).

    Args:
        only_first: cases in which the first alone is right.
        only_second: cases in which the second alone is right.
    """
    n, fewest = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    # sum of binomial(n, i) / 2^n for i up to the smaller count, each term from its logarithm
    terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(fewest + 1)
    ]
    largest = max(terms)
    tail = math.exp(largest) * math.fsum(math.exp(t - largest) for t in terms)
    return min(1.0, 2 * tail)
