"""Progress on stderr: bars on a terminal, a line a layer elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lfmq.converter.run.convert import Amount

# Steps smaller than layers are told this often where there is no bar.
_LINES = 10


@contextmanager
def show_progress(
    label: str, *, quiet: bool, unit: str = "layer"
) -> Iterator[Callable[[int, int], None]]:
    """A bar of layers, or of other units."""
    console = Console(stderr=True)
    if quiet:
        yield lambda step, total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda step, total: bar.update(task, advance=step, total=total)
    else:
        yield _line_printer(label, unit)


def _line_printer(label: str, unit: str) -> Callable[[int, int], None]:
    done = 0

    def advance(step: int, total: int) -> None:
        nonlocal done
        before, done = done, done + step
        if unit == "layer" or before * _LINES // total < done * _LINES // total:
            sys.stderr.write(f"{label}: {unit} {done} of {total}\n")

    return advance


@contextmanager
def show_conversion(*, quiet: bool) -> Iterator[Callable[[Amount, Amount], None]]:
    """Bars of what is read, quantized and written, with rates and the time left."""
    console = Console(stderr=True)
    if quiet:
        yield lambda step, total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _AmountColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            read = bars.add_task("reading", total=None, unit="B")
            weights = bars.add_task("quantizing", total=None, unit=" weights")
            written = bars.add_task("writing", total=None, unit="B")

            def advance(step: Amount, total: Amount) -> None:
                bars.update(read, advance=step.read, total=total.read)
                bars.update(weights, advance=step.weights, total=total.weights)
                bars.update(written, advance=step.written, total=total.written)

            yield advance
    else:
        yield _conversion_printer()


class _AmountColumn(ProgressColumn):
    """Done of all, and the rate."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done, total = (_short(n, unit) for n in (task.completed, task.total or 0))
        speed = task.finished_speed or task.speed
        rate = f"{_short(speed, unit)}/s" if speed else ""
        return Text(f"{done} of {total} {rate:>14}", style="progress.download")


def _short(amount: float, unit: str) -> str:
    """1.2 GB; 1.2 G weights."""
    size, prefix = pick_unit_and_suffix(int(amount), ["", "k", "M", "G", "T"], 1000)
    return f"{amount / size:.1f} {prefix}{unit}"


def _conversion_printer() -> Callable[[Amount, Amount], None]:
    """A line when the first part of a layer is done."""
    started = time.monotonic()
    layer = read = written = 0

    def advance(step: Amount, total: Amount) -> None:
        nonlocal layer, read, written
        read, written = read + step.read, written + step.written
        if step.layers <= layer and read < total.read:
            return
        layer = max(layer, step.layers)
        seconds = max(time.monotonic() - started, 1e-3)
        done = 100 * read // total.read
        # the first part is small; nothing can be told from it
        left = f", {seconds * (total.read - read) / read:,.0f} s left" if done else ""
        sys.stderr.write(
            f"quantizing: layer {layer} of {total.layers}, {done} %, "
            f"read {_short(read / seconds, 'B')}/s, written {_short(written / seconds, 'B')}/s"
            f"{left}\n"
        )

    return advance
