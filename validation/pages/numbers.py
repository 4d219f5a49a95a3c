"""Figures as text: one function for the page, the Markdown table and the labels of charts."""

import math
from typing import Any, Literal

Kind = Literal["nats", "ratio", "share", "perplexity", "bits", "count", "number"]

UNKNOWN = "\N{EN DASH}"
_DECIMALS: dict[Kind, int] = {"nats": 5, "ratio": 5, "share": 4, "perplexity": 3, "bits": 3}
# Below this, five decimals of nats would leave fewer than two digits.
_TINY = 1e-4

# What figures are called and how they are written, by their place in a build's object.
FIGURES: dict[str, tuple[str, Kind]] = {
    "kld.mean": ("mean KLD", "nats"),
    "kld.p99": ("99th percentile of the KLD", "nats"),
    "perplexity_ratio": ("perplexity ratio", "ratio"),
    "top1_agreement": ("same top token", "share"),
    "routing.exact_set": ("same experts", "share"),
    "routing.local_exact_set": ("same experts, local", "share"),
    "generation": ("generation", "number"),
}
_OF_DOMAINS: dict[str, tuple[str, Kind]] = {
    "kld_mean": FIGURES["kld.mean"],
    "routing_exact_set": FIGURES["routing.exact_set"],
}
_OF_GENERATION: dict[str, tuple[str, Kind]] = {
    "answers.accuracy": ("right answers", "share"),
    "tools.valid": ("valid tool calls", "share"),
    "tools.right_function": ("right function", "share"),
    "tools.right_arguments": ("right arguments", "share"),
    "capped": ("answers that hit the length cap", "share"),
    "looped": ("answers that looped", "share"),
    "longest_repeat.max": ("longest repeat, tokens", "count"),
    "longest_repeat.mean": ("mean longest repeat, tokens", "number"),
    "length_ratio": ("length ratio", "ratio"),
    "same_text": ("same text", "share"),
}


def describe_figure(place: str) -> tuple[str, Kind]:
    """The name of a figure that a limit is for, and how it is written.

    Args:
        place: in a build's object: ``kld.mean``, ``domains.en.kld_mean``,
            ``generation.greedy.capped``, ``facts.bos_token_id``.
    """
    first, _, rest = place.partition(".")
    if first == "facts":
        return rest, "number"
    if first == "domains":
        domain, _, key = rest.rpartition(".")
        name, kind = _OF_DOMAINS.get(key) or FIGURES.get(key, (key, "number"))
        return f"{name} in {domain}", kind
    if first == "generation" and rest:
        mode, _, key = rest.partition(".")
        name, kind = _OF_GENERATION.get(key, (key, "number"))
        return f"{name}, {mode}", kind
    return FIGURES.get(place, (place, "number"))


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
    if kind == "number":
        return f"{value:.6g}"
    if kind == "nats" and 0 < abs(value) < _TINY:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:,.{_DECIMALS[kind]}f}"
