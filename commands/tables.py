"""Figures of builds as tables for a terminal; the command line prints them."""

import math
from pathlib import Path

from lfmq.commands.console import Table
from lfmq.commands.console import make_table as _table
from lfmq.validation.measure.compare import PairedReport
from lfmq.validation.measure.figures import Estimates, Figure
from lfmq.validation.measure.report import Report, columns_of
from lfmq.validation.pages.numbers import format_figure
from lfmq.validation.pages.rows import list_tokenizers, shown
from lfmq.validation.parity.result import Parity


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
    return Table(title, columns, tuple(rows), turns=True)


def _measured(figure: Figure, found: Estimates) -> str:
    """A figure; where it is the error of windows, with its standard error."""
    if figure not in found:
        return ""
    estimate = found[figure]
    text = format_figure(estimate.value, figure.kind)
    if not figure.stderr_of_windows or estimate.stderr is None or math.isnan(estimate.stderr):
        return text
    return f"{text} ± {format_figure(estimate.stderr, figure.kind)}"


def parity_table(parity: Parity) -> Table | None:
    """A row for each build and runtime; None where no runtime was asked."""
    rows = [
        (shown(r.name), r.runtime, r.tokens, r.chats, shown(r.difference))
        for r in list_tokenizers(parity)
    ]
    columns = ("build", "runtime", "tokens", "chats", "first difference")
    return _table("Tokenizers of the builds and the checkpoint's", columns, rows) if rows else None


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
