"""The parity table as Markdown, for a model card or a release note."""

import re
from typing import Any

from lfmq.validation.measure.figures import Figure
from lfmq.validation.measure.report import Report, columns_of
from lfmq.validation.pages.numbers import format_figure
from lfmq.validation.pages.rows import (
    Miss,
    Row,
    list_misses,
    list_rows,
    list_tokenizers,
    list_warnings,
    shown,
)

# What Markdown or HTML would take for its own.
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&])")


def render_markdown(report: Report) -> str:
    """A table of all builds and engines, the verdict and the conditions."""
    rows, figures = list_rows(report), columns_of(report)
    header = ("build", "engine", "bits/weight", *(figure.heading for figure in figures))
    lines = [_line(header), _line(("---", "---", *("---:",) * (len(header) - 2)))]
    lines += [_line(_cells(row, figures)) for row in rows]
    floor = (format_figure(report.noise_floor.value(f), f.kind) for f in figures)
    name = "noise floor: the reference in 16-bit arithmetic"
    lines.append(_line((name, "", "", *floor)))
    lines += _tokenizers(report)
    lines += ["", _conditions(report), "", _verdict(report)]
    warned = list_warnings(rows)
    if warned:
        lines += ["", "Known faults:", ""]
        lines += [f"- {_plain(name)}: {_plain(line)}" for name, line in warned]
    return "\n".join(lines) + "\n"


def _tokenizers(report: Report) -> list[str]:
    """A table of the builds' tokenizers in their runtimes; empty where none was asked."""
    rows = list_tokenizers(report.parity)
    if not rows:
        return []
    header = ("build", "runtime", "tokens", "chats", "first difference")
    cells = ((r.name, r.runtime, r.tokens, r.chats, r.difference) for r in rows)
    lines = ["", _line(header), _line(("---",) * len(header))]
    return lines + [_line(tuple(map(_plain, row))) for row in cells]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, figures: tuple[Figure, ...]) -> tuple[str, ...]:
    bits = format_figure(row.report.bits_per_weight, "bits")
    cells = [_plain(row.name), _plain(row.report.engine), bits]
    for figure in figures:
        text = format_figure(row.report.value(figure), figure.kind)
        cells.append(f"**{text}** (missed)" if figure.key in row.missed else text)
    return tuple(cells)


def _conditions(report: Report) -> str:
    """Under what the figures were found, in one line."""
    found = report.conditions
    engines = dict.fromkeys(b.engine_version for b in report.builds if b.engine != "read")
    parts = [
        f"{format_figure(report.tokens_scored, 'count')} positions of "
        f"{_plain(report.checkpoint)} (reference perplexity "
        f"{format_figure(report.reference_perplexity, 'perplexity')})",
        f"windows of {format_figure(found.sequence, 'count')} tokens",
        f"text sha256 {_plain(found.text_sha256)}",
        f"lfmq {_plain(found.lfmq)}",
        f"torch {_plain(found.torch)}",
        f"{found.threads} threads",
        *map(_plain, engines),
    ]
    return "; ".join(parts) + "."


def _verdict(report: Report) -> str:
    misses = list_misses(report)
    if not misses:
        return "Passed: no limit was missed."
    return "\n".join(["Missed:", "", *map(_miss, misses)])


def _miss(miss: Miss) -> str:
    failure, kind = miss.failure, miss.failure.kind
    where = f"{_plain(failure.path)} in {_plain(failure.engine)}: {_plain(failure.title)}"
    if kind is None:
        return f"- {where} differs from the checkpoint's"
    found = "not measured" if miss.found is None else format_figure(miss.found.value, kind)
    limit = "" if miss.limit is None else f", limit {format_figure(miss.limit.value, kind)}"
    return f"- {where} is {found}{limit}"


def _plain(text: Any) -> str:
    """Text that stays text, in one cell."""
    return _SPECIAL.sub(r"\\\1", shown(text))
