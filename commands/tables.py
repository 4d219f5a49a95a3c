"""Figures of builds as tables for a terminal; the command line prints them."""

import math
from pathlib import Path

from lfmq.commands.console import Table
from lfmq.commands.console import make_table as _table
from lfmq.validation.measure.compare import PairedReport
from lfmq.validation.measure.report import Report


def report_table(report: Report) -> Table:
    """Every build in every engine against the reference, the noise floor last."""
    rows = [
        (
            Path(b.path).name,
            b.engine,
            f"{b.bits_per_weight:.3f}",
            f"{b.overall.perplexity_ratio:.5f}",
            _with_error(b.overall.kld.mean, b.overall.kld.stderr),
            f"{b.overall.top1_agreement:.4f}",
            f"{b.routing.exact_set:.4f}",
            "" if b.routing.local_exact_set is None else f"{b.routing.local_exact_set:.4f}",
        )
        for b in report.builds
    ]
    n = report.noise_floor
    rows.append(
        (
            "noise floor",
            "bfloat16",
            "",
            f"{n.perplexity_ratio:.5f}",
            _with_error(n.kld_mean, n.kld_stderr),
            f"{n.top1_agreement:.4f}",
            f"{n.routing_exact_set:.4f}",
            "",
        )
    )
    title = (
        f"{report.checkpoint}: {report.tokens_scored:,} tokens scored, "
        f"reference perplexity {report.reference_perplexity:.3f}"
    )
    columns = ("build", "engine", "bits/weight", "ppl ratio", "mean KLD")
    return _table(title, (*columns, "top-1", "routing", "local"), rows)


def differences_table(report: PairedReport) -> Table:
    """Each figure of two builds, its difference, and what that shows."""
    verdicts = {"a": "A better", "b": "B better", None: "no difference shown"}
    rows = [
        (
            d.figure,
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


def _with_error(value: float, error: float) -> str:
    """A single window has no standard error."""
    return f"{value:.6f}" if math.isnan(error) else f"{value:.6f} ± {error:.6f}"
