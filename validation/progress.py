"""Progress on stderr: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def show_progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line for each tenth."""
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
        yield _line_printer(label)


def _line_printer(label: str) -> Callable[[int, int], None]:
    done = 0

    def advance(step: int, total: int) -> None:
        nonlocal done
        before, done = 10 * done // total, done + step
        if 10 * done // total > before:
            sys.stderr.write(f"{label}: {100 * done // total} %\n")

    return advance
