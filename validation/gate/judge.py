"""The release gate: which figures of a report miss their limits, and why.

It reads the report's JSON, so that a report of today and a baseline of last year are read alike.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfmq.quant.errors import ValidationError
from lfmq.validation.gate.thresholds import (
    DOMAIN_FIGURES,
    FIGURES,
    GENERATION_FIGURES,
    Document,
    Thresholds,
    sense_of,
)
from lfmq.validation.measure.report import Failure

# Figures held to a baseline: place, place of its standard error, whether more is worse.
_COMPARED = (
    ("kld.mean", "kld.stderr", True),
    ("perplexity_ratio", "perplexity_ratio_stderr", True),
    ("top1_agreement", "top1_stderr", False),
    ("routing.exact_set", "routing.stderr", False),
)


def judge(document: Document, thresholds: Thresholds) -> tuple[Failure, ...]:
    """The limits each build of a report misses, in the order of the builds.

    A figure that is not a number misses its limit, and so does one that no engine measured. What
    a build says otherwise than its checkpoint misses without a limit.

    Args:
        document: of ``lfmq validate --json``.
        thresholds: the limits.

    Raises:
        ValidationError: the baseline has no such build.
    """
    rows: list[Document] = document["builds"]
    failures = []
    for row in rows:
        same_build = [other for other in rows if other["path"] == row["path"]]
        failures += [
            *(_facts(row) if row is same_build[0] else ()),
            *_absolute(row, same_build, thresholds),
            *_by_domain(row, thresholds),
            *_relative(row, same_build, document["noise_floor"], thresholds),
            *_generation(row, same_build, thresholds),
            *_against_baseline(row, thresholds),
        ]
    return tuple(failures)


def figure(document: Document, place: str) -> float | None:
    """The number at a place such as ``kld.mean``; None where there is none."""
    value: Any = document
    for key in place.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None


def _facts(row: Document) -> Iterator[Failure]:
    for fact in row.get("facts", ()):
        why = f"the build says {fact['found']}, the checkpoint {fact['expected']}"
        numbers = figure(fact, "found"), figure(fact, "expected")
        yield _failure(row, f"facts.{fact['name']}", *numbers, why)


def _absolute(row: Document, same: list[Document], thresholds: Thresholds) -> Iterator[Failure]:
    for key, limit in thresholds.limits.items():
        if key not in FIGURES or _measured_elsewhere(row, same, FIGURES[key]):
            continue
        why = f"{key} = {limit:g}"
        if key == "min_local_routing" and figure(row, FIGURES[key]) is None:
            why += "; only --engine native measures it"
        yield from _held(row, FIGURES[key], key, limit, why)


def _by_domain(row: Document, thresholds: Thresholds) -> Iterator[Failure]:
    for domain, limits in thresholds.domains.items():
        found = row["domains"].get(domain, {})
        for key, limit in limits.items():
            place = f"domains.{domain}.{DOMAIN_FIGURES[key]}"
            why = f"[domains.{domain}] {key} = {limit:g}"
            if not found:
                why += f"; the text has {', '.join(row['domains'])}"
            value = figure(found, DOMAIN_FIGURES[key])
            yield from _missed(row, place, value, key, limit, why)


def _relative(
    row: Document, same: list[Document], floor: Document, thresholds: Thresholds
) -> Iterator[Failure]:
    limits = thresholds.limits
    if (times := limits.get("max_kld_over_floor")) is not None:
        kld = figure(floor, "kld_mean") or 0.0
        why = f"max_kld_over_floor = {times:g} times the noise floor's {kld:.6g}"
        yield from _held(row, "kld.mean", "max_", times * kld, why)
    least = figure(floor, "routing_exact_set") or 0.0
    if (below := limits.get("max_routing_below_floor")) is not None:
        why = f"max_routing_below_floor = {below:g} under the noise floor's {least:.6g}"
        yield from _held(row, "routing.exact_set", "min_", least - below, why)
    below = limits.get("max_routing_below_read")
    read = next((other for other in same if other["engine"] == "read"), None)
    if below is None or row is read:
        return
    if read is None:
        why = "max_routing_below_read; the build has no row of --engine read"
        yield _failure(row, "routing.exact_set", None, None, why)
        return
    value = figure(read, "routing.exact_set") or 0.0
    why = f"max_routing_below_read = {below:g} under the same weights' {value:.6g} in read"
    yield from _held(row, "routing.exact_set", "min_", value - below, why)


def _generation(row: Document, same: list[Document], thresholds: Thresholds) -> Iterator[Failure]:
    if not thresholds.generation:
        return
    found = row.get("generation")
    if not found:
        if not any(other.get("generation") for other in same) and row is same[0]:
            why = "[generation] has limits, and no generation check ran on this build"
            yield _failure(row, "generation", None, None, why)
        return
    for mode in found:
        for key, limit in thresholds.generation.items():
            place = f"generation.{mode}.{GENERATION_FIGURES[key]}"
            yield from _held(row, place, key, limit, f"[generation] {key} = {limit:g}")


def _against_baseline(row: Document, thresholds: Thresholds) -> Iterator[Failure]:
    if thresholds.baseline is None:
        return
    before = _row_of_baseline(row, thresholds)
    for place, error_place, more_is_worse in _COMPARED:
        base, found = figure(before, place), figure(row, place)
        errors = figure(before, error_place), figure(row, error_place)
        if base is None or errors[0] is None or errors[1] is None:
            why = f"{thresholds.baseline_path} has no figure with a standard error to compare with"
            yield _failure(row, place, found, None, why)
            continue
        room = thresholds.tolerance * math.hypot(errors[0], errors[1])
        limit = base + room if more_is_worse else base - room
        why = (
            f"the baseline's {base:.6g} and {thresholds.tolerance:g} standard errors of "
            f"{math.hypot(errors[0], errors[1]):.3g}"
        )
        yield from _held(row, place, "max_" if more_is_worse else "min_", limit, why)


def _row_of_baseline(row: Document, thresholds: Thresholds) -> Document:
    """The baseline's row of the build of that name in that engine."""
    rows = thresholds.baseline["builds"] if thresholds.baseline is not None else []
    name = Path(row["path"]).name
    found = [(Path(str(b.get("path"))).name, b.get("engine")) for b in rows]
    if (name, row["engine"]) not in found:
        there = ", ".join(f"{n} ({engine})" for n, engine in found) or "none"
        raise ValidationError(
            f"{thresholds.baseline_path}: has no build {name} in engine {row['engine']}; it has "
            f"{there}; validate that build once and save the --json as the baseline"
        )
    before: Document = rows[found.index((name, row["engine"]))]
    return before


def _measured_elsewhere(row: Document, same: list[Document], place: str) -> bool:
    """Whether another engine's row of the same build has a figure that this one cannot have."""
    if place != FIGURES["min_local_routing"] or figure(row, place) is not None:
        return False
    return row is not same[0] or any(figure(other, place) is not None for other in same)


def _held(row: Document, place: str, key: str, limit: float, why: str) -> Iterator[Failure]:
    return _missed(row, place, figure(row, place), key, limit, why)


def _missed(
    row: Document, place: str, found: float | None, key: str, limit: float, why: str
) -> Iterator[Failure]:
    sign = 1 if sense_of(key) == "max" else -1
    if found is None or not sign * found <= sign * limit:
        yield _failure(row, place, found, limit, why)


def _failure(
    row: Document, place: str, found: float | None, limit: float | None, why: str
) -> Failure:
    return Failure(row["path"], row["engine"], place, found, limit, why)
