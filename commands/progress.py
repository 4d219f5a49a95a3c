"""Progress on stderr: a bar for each phase on a terminal, a line for each layer elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lfmq.converter.jobs.execution import Step

# Where there is no bar, units smaller than layers are reported this often in each phase.
_LINES = 10


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """Something to hand every step of a command to, whatever its phases."""
    console = Console(stderr=True)
    if quiet:
        yield lambda step: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _AmountColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            yield _bar_drawer(bars)
    else:
        yield _line_printer()


def _bar_drawer(bars: Progress) -> Callable[[Step], None]:
    tasks: dict[str, TaskID] = {}

    def advance(step: Step) -> None:
        if step.phase not in tasks:
            tasks[step.phase] = bars.add_task(step.phase, total=None, unit=step.unit)
        bars.update(tasks[step.phase], advance=step.done, total=step.total)

    return advance


class _AmountColumn(ProgressColumn):
    """The part done; for bytes with the rate."""

    def render(self, task: Task) -> Text:
        done, total = task.completed, task.total or 0
        if task.fields["unit"] != "byte":
            return Text(f"{done:.0f}/{total:.0f}", style="progress.download")
        speed = task.finished_speed or task.speed
        rate = f"{_bytes(speed)}/s" if speed else ""
        return Text(f"{_bytes(done)} of {_bytes(total)} {rate:>11}", style="progress.download")


def _bytes(amount: float) -> str:
    """1.2 GB."""
    size, prefix = pick_unit_and_suffix(int(amount), ["", "k", "M", "G", "T"], 1000)
    return f"{amount / size:.1f} {prefix}B"


def _line_printer() -> Callable[[Step], None]:
    printers: dict[str, Callable[[Step], None]] = {}

    def advance(step: Step) -> None:
        if step.phase not in printers:
            printers[step.phase] = _rate_printer() if step.unit == "byte" else _count_printer()
        printers[step.phase](step)

    return advance


def _count_printer() -> Callable[[Step], None]:
    """A line for each layer; of other units a line for each tenth."""
    done = 0

    def advance(step: Step) -> None:
        nonlocal done
        before, done = done, done + step.done
        if step.unit == "layer" or before * _LINES // step.total < done * _LINES // step.total:
            sys.stderr.write(f"{step.phase}: {step.unit} {done} of {step.total}\n")

    return advance


def _rate_printer() -> Callable[[Step], None]:
    """A line when the first part of a layer is done, with rates and the time left."""
    started = time.monotonic()
    layer = read = written = 0

    def advance(step: Step) -> None:
        nonlocal layer, read, written
        done, total = step.amounts
        read, written = read + done.read, written + done.written
        if done.layers <= layer and read < total.read:
            return
        layer = max(layer, done.layers)
        seconds = max(time.monotonic() - started, 1e-3)
        percent = 100 * read // total.read
        # the first part is too small to estimate from
        left = f", {seconds * (total.read - read) / read:,.0f} s left" if percent else ""
        sys.stderr.write(
            f"{step.phase}: layer {layer} of {total.layers}, {percent} %, "
            f"read {_bytes(read / seconds)}/s, written {_bytes(written / seconds)}/s{left}\n"
        )

    return advance
