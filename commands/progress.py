"""Progress on stderr: a bar for each phase on a terminal, a line for each layer elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lfmq.converter.jobs.execution import Step

# Where there is no bar, units smaller than layers are reported this often in each phase.
_LINES = 10


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """Something to hand every step of a command to, whatever its phases."""
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        from lfmq.commands.bars import show_bars  # imports rich

        with show_bars() as advance:
            yield advance
    else:
        yield _line_printer()


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
            f"read {format_bytes(read / seconds)}/s, "
            f"written {format_bytes(written / seconds)}/s{left}\n"
        )

    return advance


def format_bytes(amount: float) -> str:
    """1.2 GB."""
    for prefix in ("", "k", "M", "G"):
        if abs(amount) < 1000:
            return f"{amount:.1f} {prefix}B"
        amount /= 1000
    return f"{amount:.1f} TB"
