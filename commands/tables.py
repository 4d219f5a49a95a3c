"""Results as tables for a terminal; the command line prints them."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from lfmq.converter.checkpoint.inspect import Inspection
from lfmq.converter.mixed_precision.budget import Widths
from lfmq.converter.mixed_precision.frontier import Frontier
from lfmq.converter.plan.plan import summarize
from lfmq.converter.quantize.settings import ExpertCoverage, RouterStep
from lfmq.converter.run.convert import Build, PlannedBuild
from lfmq.formats.plan import Plan
from lfmq.validation.measure.compare import PairedReport
from lfmq.validation.measure.figures import Estimates, Figure
from lfmq.validation.measure.report import Report, columns_of
from lfmq.validation.pages.numbers import format_figure

Row = tuple[str, ...]


def inspection_table(report: Inspection) -> Table:
    """Roles of a checkpoint."""
    rows = [
        (r.role, f"{r.tensors:,}", f"{r.weights:,}", f"{r.nbytes:,}", r.dtypes)
        for r in report.roles
    ]
    rows.append(("total", f"{report.tensors:,}", f"{report.weights:,}", f"{report.nbytes:,}", ""))
    return _table(report.title, ("role", "tensors", "weights", "bytes", "dtype"), rows)


def roles_table(plan: Plan) -> Table:
    """The storage of every role."""
    rows = [
        (s.role.value, str(s.storage), f"{s.tensors:,}", f"{s.weights:,}") for s in summarize(plan)
    ]
    return _table(plan.recipe, ("role", "stored as", "tensors", "weights"), rows)


def tensors_table(plan: Plan) -> Table:
    """The storage of every tensor."""
    rows = [(e.name, str(list(e.shape)), str(e.storage)) for e in plan.entries]
    return _table("tensors", ("tensor", "shape", "stored as"), rows)


def planned_table(builds: Iterable[PlannedBuild]) -> Table:
    """Size of builds not yet written."""
    rows = [
        (b.format, f"{b.nbytes:,}", f"{b.bits_per_weight:.3f}", f"{b.bytes_per_token:,}")
        if b.refused is None
        else (b.format, "refused", "", "")
        for b in builds
    ]
    return _table("builds", ("format", "bytes", "bits/weight", "bytes/token"), rows)


def widths_table(widths: Widths) -> Table:
    """What each unit gets, and the KL divergence that adds."""
    rows = [
        (
            "" if unit.layer is None else str(unit.layer),
            unit.label,
            str(unit.schemes[index]),
            f"{unit.marginal(index, widths.routed):.6f}",
            f"{unit.marginal(0, widths.routed):.6f}",
        )
        for unit, index in zip(widths.units, widths.choice, strict=True)
    ]
    columns = ("layer", "weights", "gets", "KLD", "KLD at int4")
    return _table("widths", columns, rows)


def frontier_table(frontier: Frontier) -> Table:
    """All points, those of the frontier by number."""
    rows = [
        (
            point.name,
            {"size": "by size", "token": "by bytes/token"}.get(point.kind, point.kind),
            f"{point.nbytes:,}",
            f"{8 * point.nbytes / frontier.weights:.3f}",
            f"{point.token_bytes:,}",
            "unknown" if point.kld is None else f"{point.kld:.6f}",
        )
        for point in frontier.points
    ]
    columns = ("point", "kind", "bytes", "bits/weight", "bytes/token", "predicted KLD")
    return _table(f"{frontier.checkpoint} as {frontier.format}", columns, rows)


def builds_table(builds: Iterable[Build]) -> Table:
    """Builds just written."""
    rows = [(b.format, f"{b.nbytes:,}", f"{b.bits_per_weight:.3f}", str(b.path)) for b in builds]
    return _table("builds", ("format", "bytes", "bits/weight", "path"), rows)


def coverage_table(coverage: Iterable[ExpertCoverage], steps: Iterable[RouterStep] = ()) -> Table:
    """What calibration saw of each layer's experts; the JSON has every expert."""
    rows = []
    routers = {step.layer: step for step in steps}
    coverage = tuple(coverage)
    for layer in dict.fromkeys(e.layer for e in coverage):
        experts = [e for e in coverage if e.layer == layer]
        tokens = [e.tokens for e in experts]
        rules = Counter(e.rule for e in experts)
        nearest = sum(e.error_nearest for e in experts) / len(experts)
        error = sum(e.error for e in experts) / len(experts)
        step = routers.get(layer)
        rows.append(
            (
                str(layer),
                f"{min(tokens):,}",
                f"{max(tokens):,}",
                f"{experts[0].quota:,}",
                ", ".join(f"{n} {rule}" for rule, n in sorted(rules.items())),
                f"{nearest:.6f}",
                f"{error:.6f}",
                "refitted" if step is not None and step.kept else "as it was",
            )
        )
    columns = ("layer", "fewest tokens", "most", "quota", "moments", "nearest", "error", "router")
    return _table("experts", columns, rows)


def report_table(report: Report) -> Table:
    """Every build in every engine against the reference, the noise floor last."""
    figures = columns_of(report)
    rows = [
        (
            Path(b.path).name,
            b.engine,
            f"{b.bits_per_weight:.3f}",
            *(_measured(figure, b.figures) for figure in figures),
        )
        for b in report.builds
    ]
    floor = (_measured(figure, report.noise_floor.figures) for figure in figures)
    rows.append(("noise floor", "bfloat16", "", *floor))
    title = (
        f"{report.checkpoint}: {report.tokens_scored:,} tokens scored, "
        f"reference perplexity {report.reference_perplexity:.3f}"
    )
    columns = ("build", "engine", "bits/weight", *(figure.title for figure in figures))
    return _table(title, columns, rows)


def _measured(figure: Figure, found: Estimates) -> str:
    """A figure; where it is the error of windows, with its standard error."""
    if figure not in found:
        return ""
    estimate = found[figure]
    text = format_figure(estimate.value, figure.kind)
    if not figure.stderr_of_windows or estimate.stderr is None or math.isnan(estimate.stderr):
        return text
    return f"{text} ± {format_figure(estimate.stderr, figure.kind)}"


def differences_table(report: PairedReport) -> Table:
    """Each figure of two builds, its difference, and what that shows."""
    verdicts = {"a": "A better", "b": "B better", None: "no difference shown"}
    rows = [
        (
            d.figure.title,
            f"{d.a:.6f}",
            f"{d.b:.6f}",
            f"{d.difference:+.6f}",
            "unknown"
            if math.isnan(d.interval.low)
            else f"{d.interval.low:+.6f} to {d.interval.high:+.6f}",
            "equal" if d.equal else verdicts[d.better],
        )
        for d in report.figures
    ]
    a, b = report.a, report.b
    title = f"A {a.path} ({a.engine}), B {b.path} ({b.engine}): {report.tokens_scored:,} tokens"
    return _table(title, ("figure", "A", "B", "B - A", "95 %", "verdict"), rows)


def _table(title: str, columns: Row, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        text = i == 0 or column in ("path", "engine", "verdict")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
