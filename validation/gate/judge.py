"""The release gate: which figures of a report miss their limits, and why."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.quant.errors import ValidationError
from lfmq.validation.gate.thresholds import (
    DOMAIN_LIMITS,
    GENERATION_LIMITS,
    LIMITS,
    Document,
    Thresholds,
    sense_of,
)
from lfmq.validation.measure.figures import FIGURES, KLD, ROUTING, Figure, Kind
from lfmq.validation.measure.report import BuildReport, Failure, NoiseFloor, Report, value_in
from lfmq.validation.parity.result import RuntimeParity

_Rows = list[BuildReport]


@dataclass(frozen=True, slots=True)
class _Held:
    """A figure that is held to a limit."""

    row: BuildReport
    place: str
    title: str
    kind: Kind
    value: float | None

    def to(self, key: str, limit: float, why: str) -> Iterator[Failure]:
        """Miss the limit, whose name begins with its sense; a missing figure misses it too."""
        sign = 1 if sense_of(key) == "max" else -1
        if self.value is None or not sign * self.value <= sign * limit:
            yield self.failure(limit, why)

    def failure(self, limit: float | None, why: str) -> Failure:
        """A failure for a reason of its own."""
        return Failure(
            self.row.path,
            self.row.engine,
            self.place,
            self.value,
            limit,
            why,
            self.title,
            self.kind,
        )


def judge(report: Report, thresholds: Thresholds) -> tuple[Failure, ...]:
    """The limits that each build of a report misses, in the order of the builds.

    A figure that is not a number misses its limit, and so does one that no engine measured.
    Metadata, tokens or rendered chats that differ from the checkpoint's are a miss without any
    limit.

    Args:
        report: of :func:`lfmq.validation.measure.validate.validate`.
        thresholds: the limits.

    Raises:
        ValidationError: the baseline has no such build, or the model has no experts and there is
            a limit on routing.
    """
    thresholds.check_experts(any(row.routing is not None for row in report.builds))
    failures = []
    for row in report.builds:
        same_build = [other for other in report.builds if other.path == row.path]
        failures += [
            *(_facts(row) if row is same_build[0] else ()),
            *_absolute(row, same_build, thresholds),
            *_by_domain(row, thresholds),
            *_over_floor(row, report.noise_floor, thresholds),
            *_below_read(row, same_build, thresholds),
            *_generation(row, same_build, thresholds),
            *_against_baseline(row, thresholds),
        ]
    for found in report.parity.by_runtime():
        failures += _parity(found)
    return tuple(failures)


def _parity(row: RuntimeParity) -> Iterator[Failure]:
    at = row.path, row.runtime
    if row.different:
        first, *more = row.different
        why = f"{first.group}: {first.first_difference}"
        if more:
            why += f"; also in {', '.join(found.group for found in more)}"
        yield Failure(*at, "parity.tokenizer", None, None, why, "tokenizer", None)
    if row.template is not None and not row.template.equal:
        why = row.template.first_difference or ""
        yield Failure(*at, "parity.template", None, None, why, "chat template", None)


def _of(row: BuildReport, figure: Figure) -> _Held:
    return _Held(row, figure.key, figure.title, figure.kind, row.value(figure))


def _facts(row: BuildReport) -> Iterator[Failure]:
    for fact in row.facts:
        why = f"the build says {fact.found}, the checkpoint {fact.expected}"
        found, expected = _number(fact.found), _number(fact.expected)
        place = f"facts.{fact.name}"
        yield Failure(row.path, row.engine, place, found, expected, why, fact.name, None)


def _absolute(row: BuildReport, same: _Rows, thresholds: Thresholds) -> Iterator[Failure]:
    for key, limit in thresholds.limits.items():
        figure = LIMITS.get(key)
        if figure is None or _measured_elsewhere(row, same, figure):
            continue
        why = f"{key} = {limit:g}"
        if figure.missing and row.value(figure) is None:
            why += f"; {figure.missing}"
        yield from _of(row, figure).to(key, limit, why)


def _measured_elsewhere(row: BuildReport, same: _Rows, figure: Figure) -> bool:
    """Whether another engine's row of the same build has a figure that this one cannot have."""
    if not figure.missing or row.value(figure) is not None:
        return False
    return row is not same[0] or any(other.value(figure) is not None for other in same)


def _by_domain(row: BuildReport, thresholds: Thresholds) -> Iterator[Failure]:
    for domain, limits in thresholds.domains.items():
        found = row.domains.get(domain)
        for key, limit in limits.items():
            figure = DOMAIN_LIMITS[key]
            why = f"[domains.{domain}] {key} = {limit:g}"
            if found is None:
                why += f"; the text has {', '.join(row.domains)}"
            value = None if found is None else value_in(found, figure)
            place, title = f"domains.{domain}.{figure.flat_key}", f"{figure.title} in {domain}"
            yield from _Held(row, place, title, figure.kind, value).to(key, limit, why)


def _over_floor(row: BuildReport, floor: NoiseFloor, thresholds: Thresholds) -> Iterator[Failure]:
    limits = thresholds.limits
    if (times := limits.get("max_kld_over_floor")) is not None:
        kld = floor.value(KLD) or 0.0
        why = f"max_kld_over_floor = {times:g} times the noise floor's {kld:.6g}"
        yield from _of(row, KLD).to("max_", times * kld, why)
    if (below := limits.get("max_routing_below_floor")) is not None:
        least = floor.value(ROUTING) or 0.0
        why = f"max_routing_below_floor = {below:g} under the noise floor's {least:.6g}"
        yield from _of(row, ROUTING).to("min_", least - below, why)


def _below_read(row: BuildReport, same: _Rows, thresholds: Thresholds) -> Iterator[Failure]:
    below = thresholds.limits.get("max_routing_below_read")
    read = next((other for other in same if other.engine == "read"), None)
    if below is None or row is read:
        return
    if read is None:
        why = "max_routing_below_read; the build has no row of --engine read"
        yield _Held(row, ROUTING.key, ROUTING.title, ROUTING.kind, None).failure(None, why)
        return
    value = read.value(ROUTING) or 0.0
    why = f"max_routing_below_read = {below:g} under the same weights' {value:.6g} in read"
    yield from _of(row, ROUTING).to("min_", value - below, why)


def _generation(row: BuildReport, same: _Rows, thresholds: Thresholds) -> Iterator[Failure]:
    if not thresholds.generation:
        return
    if not row.generation:
        if not any(other.generation for other in same) and row is same[0]:
            why = "[generation] has limits, and no generation check ran on this build"
            yield _Held(row, "generation", "generation", "number", None).failure(None, why)
        return
    for mode, found in row.generation.items():
        for key, limit in thresholds.generation.items():
            figure = GENERATION_LIMITS[key]
            place, title = f"generation.{mode}.{figure.key}", f"{figure.title}, {mode}"
            held = _Held(row, place, title, figure.kind, figure.read(found))
            yield from held.to(key, limit, f"[generation] {key} = {limit:g}")


def _against_baseline(row: BuildReport, thresholds: Thresholds) -> Iterator[Failure]:
    """Figures with a standard error that the baseline has too; an older one may have fewer."""
    if thresholds.baseline is None:
        return
    before = _row_of_baseline(row, thresholds)
    compared = [f for f in FIGURES if f.stem and f in row.figures and _known(before, f.key)]
    for figure in compared or [KLD]:
        base, held = _number(_at(before, figure.key)), _of(row, figure)
        errors = row.figures[figure].stderr, _number(_at(before, f"{figure.stem}stderr"))
        if base is None or errors[0] is None or errors[1] is None or math.isnan(errors[0]):
            why = f"{thresholds.baseline_path} has no figure with a standard error to compare with"
            yield held.failure(None, why)
            continue
        error = math.hypot(errors[0], errors[1])
        room = thresholds.tolerance * error
        key, limit = ("max_", base + room) if figure.less_is_better else ("min_", base - room)
        chance = f"{thresholds.tolerance:g} standard errors of {error:.3g}"
        why = f"the baseline's {base:.6g} and {chance}"
        yield from held.to(key, limit, why)


def _row_of_baseline(row: BuildReport, thresholds: Thresholds) -> Document:
    """The baseline's row of the build of that name in that engine."""
    rows = thresholds.baseline["builds"] if thresholds.baseline is not None else []
    name = Path(row.path).name
    found = [(Path(str(b.get("path"))).name, b.get("engine")) for b in rows]
    if (name, row.engine) not in found:
        there = ", ".join(f"{n} ({engine})" for n, engine in found) or "none"
        raise ValidationError(
            f"{thresholds.baseline_path}: has no build {name} in engine {row.engine}; it has "
            f"{there}; validate that build once and save the --json as the baseline"
        )
    before: Document = rows[found.index((name, row.engine))]
    return before


def _known(document: Document, place: str) -> bool:
    """Whether there is a key at a place such as ``kld.mean``, be it null."""
    *parents, last = place.split(".")
    parent = _at(document, ".".join(parents)) if parents else document
    return isinstance(parent, dict) and last in parent


def _at(document: Any, place: str) -> Any:
    for key in place.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None
