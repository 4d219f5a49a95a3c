"""Figures as text: one function for the page, tables and the labels of charts."""

import math
from typing import Any

from lfmq.validation.measure.figures import Kind

UNKNOWN = "\N{EN DASH}"
_DECIMALS: dict[Kind, int] = {"nats": 5, "ratio": 5, "share": 4, "perplexity": 3, "bits": 3}
# Below this, five decimals of nats would leave fewer than two digits.
_TINY = 1e-4


def format_figure(value: Any, kind: Kind) -> str:
    """A figure as people read it; a dash for one that is not known.

    Args:
        value: a number, or None.
        kind: what it measures, which decides the digits.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return UNKNOWN
    if kind == "count":
        return f"{value:,}"
    if kind == "percent":
        return f"{100 * value:.3f} %"
    if kind == "number":
        return f"{value:.6g}"
    if kind == "nats" and 0 < abs(value) < _TINY:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:,.{_DECIMALS[kind]}f}"
