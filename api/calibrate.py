"""Statistics of every weight and every expert, from text to a file."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lfmq.api.checkpoint import Source, opened
from lfmq.api.text import SEQUENCE, TOKENS, Paths, Text, paths_of
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import peak_resident
from lfmq.converter.quantize.settings import ExpertCoverage
from lfmq.converter.statistics.balance import Balanced
from lfmq.converter.statistics.calibrate import calibrate as gather_statistics
from lfmq.converter.statistics.statistics import Statistics
from lfmq.quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration gathered.

    Attributes:
        path: the statistics file.
        statistics: what it holds.
        experts: coverage of every expert; empty for a dense model.
        balance: how the windows were chosen; None for the text's first ones.
        seconds: it took.
        peak_rss_bytes: the most memory this process held so far.
    """

    path: Path
    statistics: Statistics
    experts: tuple[ExpertCoverage, ...]
    balance: Balanced | None
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What ``lfmq calibrate --json`` prints."""
        return {
            "path": str(self.path),
            "tokens": self.statistics.tokens,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            **self.statistics.to_json(),
            **({"balance": self.balance.to_json()} if self.balance else {}),
            **({"experts": [asdict(e) for e in self.experts]} if self.experts else {}),
        }


def calibrate(
    checkpoint: Source,
    output: str | PathLike[str],
    *,
    text: Paths = (),
    tokens: int = TOKENS,
    sequence: int = SEQUENCE,
    merge: Iterable[str | PathLike[str]] = (),
    imatrix: str | PathLike[str] | None = None,
    balance: int | None = None,
    force: bool = False,
    execution: Execution = Execution(),
) -> CalibrationReport:
    """Gather statistics of every weight and every expert from text, into a file.

    An interrupted run resumes where it stopped and ends with the same bytes.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        output: the statistics file.
        text: plain text or JSONL, one path or several; default: the calibration set of the sample.
        tokens: how many tokens of the text.
        sequence: tokens in a window.
        merge: statistics files of the same checkpoint to add.
        imatrix: also write llama.cpp's importance matrix there.
        balance: choose the windows among this many tokens of the text, so that every expert gets
            the tokens it needs.
        force: replace a file that exists.
        execution: threads or cluster, device, and whom to tell of progress.

    Raises:
        CheckpointError: the checkpoint cannot be opened or read.
        PlanError: a file exists or cannot be written.
        UsageError: ``balance`` is fewer than ``tokens``, or ``imatrix`` is ``output``.
        ValidationError: the text, or a file to merge, cannot be used, or a hidden state is not
            finite.
    """
    if imatrix is not None and Path(imatrix).resolve() == Path(output).resolve():
        raise UsageError(f"--imatrix and --output are both {str(output)!r}; give two names")
    started, source = time.monotonic(), opened(checkpoint)
    chosen = Text(paths_of(text), tokens, sequence, balance)
    windows, balanced = chosen.calibration_windows(source, execution)
    found, coverage = gather_statistics(
        source,
        windows,
        Path(output),
        merge=paths_of(merge),
        imatrix=None if imatrix is None else Path(imatrix),
        force=force,
        execution=execution,
    )
    seconds = time.monotonic() - started
    experts = tuple(coverage)
    return CalibrationReport(Path(output), found, experts, balanced, seconds, peak_resident())
