"""The page's table of what builds wrote: a row for each build and mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from lfmq.validation.measure.figures import GENERATION_FIGURES, Kind
from lfmq.validation.measure.generation import GenerationFigures
from lfmq.validation.pages.rows import Number, Row, escaped, number

# What stands below a figure: a word before the number, its place in the mode, its kind.
_BELOW: dict[str, tuple[tuple[str, str, Kind], ...]] = {
    "answers.accuracy": (
        ("reference", "answers.reference_accuracy", "share"),
        ("of", "answers.n", "count"),
    ),
    "tools.valid": (("of", "tools.n", "count"),),
    "tools.right_arguments": (("reference", "tools.reference_right_arguments", "share"),),
    "capped": (("reference", "reference.capped", "share"),),
    "looped": (("reference", "reference.looped", "share"),),
    "longest_repeat.max": (
        ("mean", "longest_repeat.mean", "number"),
        ("reference", "reference.longest_repeat.max", "count"),
    ),
}
_COLUMNS = tuple(
    figure
    for figure in GENERATION_FIGURES
    if not any(figure.key == key for below in _BELOW.values() for _, key, _ in below)
)
HEADINGS = ("tasks", *(figure.title for figure in _COLUMNS))


@dataclass(frozen=True, slots=True)
class Cell:
    """A number and the numbers below it."""

    found: Number
    below: tuple[tuple[str, Number], ...] = ()


@dataclass(frozen=True, slots=True)
class Mode:
    """A row: one mode of one build.

    Attributes:
        name: greedy or sampled.
        cells: the number of tasks, then the figures.
        limit: most tokens of an answer.
        sampling: the settings that are set.
        tasks_sha256: of the file of tasks.
    """

    name: str
    cells: tuple[Cell, ...]
    limit: Number
    sampling: tuple[tuple[str, Number], ...]
    tasks_sha256: str


def generation_rows(rows: Sequence[Row]) -> list[tuple[Row, tuple[Mode, ...]]]:
    """The builds that were asked to write, each with its modes."""
    return [
        (row, tuple(_mode(row, name, found) for name, found in row.report.generation.items()))
        for row in rows
        if row.report.generation
    ]


def _mode(row: Row, name: str, found: GenerationFigures) -> Mode:
    at = f"{row.at}/generation/{escaped(name)}"

    def read(key: str, kind: Kind) -> Number:
        return number(attrgetter(key)(found), f"{at}/{key.replace('.', '/')}", kind)

    def known(*listed: tuple[str, str, Kind]) -> tuple[tuple[str, Number], ...]:
        numbers = ((label, read(key, kind)) for label, key, kind in listed)
        return tuple((label, n) for label, n in numbers if n.value is not None)

    cells = [Cell(read("tasks", "count"), known(("runs each", "runs", "count")))]
    for figure in _COLUMNS:
        below = known(*_BELOW.get(figure.key, ()))
        cells.append(Cell(read(figure.key, figure.kind), below))
    sampling = tuple(
        (key, number(value, f"{at}/sampling/{escaped(key)}", "number"))
        for key, value in (found.sampling or {}).items()
        if isinstance(value, int | float)
    )
    limit = read("new_tokens", "count")
    return Mode(name, tuple(cells), limit, sampling, found.tasks_sha256)
