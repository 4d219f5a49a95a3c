"""A bar for each phase, drawn on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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

from lfmq.commands.progress import format_bytes
from lfmq.converter.jobs.execution import Step


@contextmanager
def show_bars() -> Iterator[Callable[[Step], None]]:
    """Bars on stderr, moved by the steps that are handed over."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _AmountColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def advance(step: Step) -> None:
            if step.phase not in tasks:
                tasks[step.phase] = bars.add_task(step.phase, total=None, unit=step.unit)
            bars.update(tasks[step.phase], advance=step.done, total=step.total)

        yield advance


class _AmountColumn(ProgressColumn):
    """The part done; for bytes with the rate."""

    def render(self, task: Task) -> Text:
        """See the class."""
        done, total = task.completed, task.total or 0
        if task.fields["unit"] != "byte":
            return Text(f"{done:.0f}/{total:.0f}", style="progress.download")
        speed = task.finished_speed or task.speed
        rate = f"{format_bytes(speed)}/s" if speed else ""
        shown = f"{format_bytes(done)} of {format_bytes(total)} {rate:>11}"
        return Text(shown, style="progress.download")
