"""A report as the page and the Markdown table show it: numbers with their place, rows, misses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lfmq.validation.measure.figures import Estimates, Figure, Kind
from lfmq.validation.measure.report import BuildReport, Failure, Report
from lfmq.validation.parity.result import Parity


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a report.

    Attributes:
        value: None where the report's JSON has null.
        pointer: where it is in the report's JSON, a JSON pointer (RFC 6901).
        kind: how it is written.
    """

    value: float | None
    pointer: str
    kind: Kind


def number(value: float | None, pointer: str, kind: Kind) -> Number:
    """A number, or null where JSON has no number for it."""
    known = value is not None and math.isfinite(value)
    return Number(value if known else None, pointer, kind)


def number_in(figures: Estimates, figure: Figure, pointer: str) -> Number | None:
    """A figure at a pointer; None where it was not measured."""
    found = figures.get(figure)
    return None if found is None else number(found.value, pointer, figure.kind)


def escaped(key: str) -> str:
    """A key as a step of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, slots=True)
class Miss:
    """A failure and its numbers."""

    failure: Failure
    found: Number | None
    limit: Number | None

    @property
    def metadata(self) -> bool:
        """It is of metadata, which has no unit and no limit."""
        return self.failure.kind is None


@dataclass(frozen=True, slots=True)
class Row:
    """A build in one engine.

    Attributes:
        label: short, and unlike any other's.
        name: of its file or folder.
        at: JSON pointer of its object.
        report: its figures.
        missed: its first miss of each figure, by the figure's place.
    """

    label: str
    name: str
    at: str
    report: BuildReport
    missed: Mapping[str, Miss]

    def number(self, figure: Figure) -> Number | None:
        """A figure; None where it was not measured."""
        place = figure.key.replace(".", "/")
        return number_in(self.report.figures, figure, f"{self.at}/{place}")

    def interval(self, figure: Figure) -> tuple[Number, Number] | None:
        """The ends of its 95 % interval; None where it has none."""
        found = self.report.figures.get(figure)
        if found is None or found.ci95 is None or not all(map(math.isfinite, found.ci95)):
            return None
        at = f"{self.at}/{figure.stem.replace('.', '/')}ci95"
        low, high = found.ci95
        return Number(low, f"{at}/0", figure.kind), Number(high, f"{at}/1", figure.kind)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Known faults, and metadata that differs from the checkpoint's."""
        facts = (
            f"{f.name} is {f.found}, the checkpoint's {f.expected}" for f in self.report.facts
        )
        return (*self.report.warnings, *facts)


def list_misses(report: Report) -> tuple[Miss, ...]:
    """All failures of a report."""
    found = []
    for index, failure in enumerate(report.failures):
        numbers = (
            number(value, f"/failures/{index}/{key}", failure.kind or "number")
            for key, value in (("found", failure.found), ("limit", failure.limit))
        )
        found.append(Miss(failure, *(n if n.value is not None else None for n in numbers)))
    return tuple(found)


def list_rows(report: Report) -> tuple[Row, ...]:
    """The builds of a report, those of one path after each other."""
    builds, misses = report.builds, list_misses(report)
    labels = [f"{b.format} · {b.engine}" for b in builds]
    rows = []
    for index, (build, label) in enumerate(zip(builds, labels, strict=True)):
        name = _name_of(build.path)
        missed: dict[str, Miss] = {}
        for miss in misses:
            if (miss.failure.path, miss.failure.engine) == (build.path, build.engine):
                missed.setdefault(miss.failure.figure, miss)
        unique = label if labels.count(label) == 1 else f"{name} · {build.engine}"
        rows.append(Row(unique, name, f"/builds/{index}", build, missed))
    order = list(dict.fromkeys(b.path for b in builds))
    return tuple(sorted(rows, key=lambda row: order.index(row.report.path)))


@dataclass(frozen=True, slots=True)
class TokenizerRow:
    """A build's tokenizer in a runtime, in words.

    Attributes:
        name: of the build's file or folder.
        runtime: its name.
        tokens: whether they are the checkpoint's.
        chats: whether rendered chats are the checkpoint's.
        difference: the first one, or why nothing was compared; empty where all is equal.
        missed: something differs.
    """

    name: str
    runtime: str
    tokens: str
    chats: str
    difference: str
    missed: bool


def list_tokenizers(parity: Parity) -> list[TokenizerRow]:
    """The runtimes of all builds, those that could not be asked last."""
    rows = [
        TokenizerRow(
            _name_of(found.path),
            found.runtime,
            found.tokenizer,
            found.chats,
            found.first_difference,
            bool(found.first_difference),
        )
        for found in parity.by_runtime()
    ]
    return rows + [
        TokenizerRow(_name_of(found.path), found.runtime, "not compared", "", found.why, False)
        for found in parity.not_measured
    ]


def list_warnings(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Build and line, each once however many engines the build ran in."""
    return list(dict.fromkeys((row.name, line) for row in rows for line in row.warnings))


def _name_of(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path


def shown(text: Any) -> str:
    """Text with line ends, escapes and changes of direction written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
