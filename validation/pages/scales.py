"""Numbers to places in a drawing, and to the steps of a colour scale."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# A share of agreement, and a divergence in multiples of the noise floor, fall into seven steps;
# fixed ones, so that two pages compare.
SHARE_STEPS = (0.999, 0.99, 0.98, 0.95, 0.9, 0.75)
FLOOR_STEPS = (1.5, 3.0, 6.0, 12.0, 25.0, 50.0)

# Values that differ by less, relative to the largest, are shown as equal: labels have ten digits,
# which tell the ticks of any wider range apart.
_EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from ``low`` to ``high`` to places from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is drawn; at the ends what lies beyond them."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, most: int = 5) -> tuple[Tick, ...]:
        """At round numbers, ``most`` at most, each with a label of its own."""
        values = _decades(self.low, self.high, most) if self.log else ()
        values = values or _round_numbers(self.low, self.high, most)
        return tuple(Tick(self.place(v), f"{v:,.10g}".replace("e-0", "e-")) for v in values)


def _decades(low: float, high: float, most: int) -> tuple[float, ...]:
    """The finest of 1-2-5, 1-3 and every n-th decade that has few enough, but more than one."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = [((1,), stride) for stride in range(1, len(exponents))]
    for digits, stride in (((1, 2, 5), 1), ((1, 3), 1), *wide):
        every = [e for e in exponents if e % stride == 0]
        found = tuple(d * 10.0**e for e in every for d in digits if low <= d * 10.0**e <= high)
        if 2 <= len(found) <= most:
            return tuple(float(f"{v:.3g}") for v in found)
    return ()


def _round_numbers(low: float, high: float, most: int) -> tuple[float, ...]:
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10, 20) if unit * m * most >= high - low)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.10g}") for i in range(first, last + 1))


def scale_for(
    values: Iterable[float | None], start: float, stop: float, log: bool = False
) -> Scale | None:
    """A scale that shows all finite (for ``log`` all positive) values; None when there is none.

    Values that are equal, but for rounding, get 1 % of them on both sides.
    """
    shown = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    if log:
        return Scale(low / 1.25, high * 1.25, start, stop, log=True)
    size = max(abs(low), abs(high))
    margin = 0.08 * (high - low) if high - low > _EQUAL * size else 0.01 * size or 1.0
    return Scale(low - margin, high + margin, start, stop)


def share_step(share: float | None) -> int | None:
    """The step of an agreement: 0 nearly all, 6 less than three quarters."""
    if share is None or math.isnan(share):
        return None
    return sum(share < limit for limit in SHARE_STEPS)


def floor_step(kld: float | None, floor: float | None) -> int | None:
    """The step of a divergence over the noise floor's."""
    if kld is None or not floor:
        return None
    return sum(kld > limit * floor for limit in FLOOR_STEPS)
