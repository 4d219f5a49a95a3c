"""Builds from a checkpoint, with the text, the statistics and the widths that go with them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lfmq.api.checkpoint import Source, opened
from lfmq.api.labels import Labels
from lfmq.api.target import FormatNames, RecipeSource, Target, known_statistics, settle
from lfmq.api.text import SEQUENCE, TOKENS, Paths, Text, paths_of
from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import peak_resident
from lfmq.converter.mixed_precision.widths import Widths
from lfmq.converter.model.text import Windows
from lfmq.converter.plan.builtin import DEFAULT_RECIPE
from lfmq.converter.quantize.settings import Calibrated, Calibration
from lfmq.converter.run.convert import Build
from lfmq.converter.run.convert import convert as write_builds
from lfmq.converter.run.planned import plan_layouts
from lfmq.converter.statistics.balance import Balanced
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.huggingface.front_matter import card_warnings
from lfmq.quant.errors import UsageError
from lfmq.validation.engines.installed import plan_warnings


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion made.

    Attributes:
        builds: one for each container.
        widths: the recipe, and the storage of every tensor.
        windows: the calibration text; None where weights were rounded to nearest.
        calibrated: what calibration found; None without it.
        balance: how the windows were chosen; None for the text's first ones.
        seconds: it took.
        memory_bytes: it was allowed to hold while it rounds to nearest.
        peak_rss_bytes: the most memory this process held so far.
    """

    builds: tuple[Build, ...]
    widths: Widths
    windows: Windows | None
    calibrated: Calibrated | None
    balance: Balanced | None
    seconds: float
    memory_bytes: int
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What ``lfmq convert --json`` prints."""
        return {
            "builds": [build.to_json() for build in self.builds],
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "tokens": self.windows.tokens if self.windows else 0,
            **self.widths.to_json(),
            **({"text_sha256": self.windows.text_sha256} if self.windows else {}),
            **(self.calibrated.to_json() if self.calibrated else {}),
            **({"balance": self.balance.to_json()} if self.balance else {}),
        }


def convert(
    checkpoint: Source,
    output: str | PathLike[str],
    *,
    recipe: RecipeSource = DEFAULT_RECIPE,
    to: FormatNames = (),
    budget: str | None = None,
    budget_bytes: str | None = None,
    budget_token_bytes: str | None = None,
    statistics: Statistics | str | PathLike[str] | None = None,
    text: Paths = (),
    tokens: int = TOKENS,
    sequence: int = SEQUENCE,
    balance: int | None = None,
    uncalibrated: bool = False,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
    execution: Execution = Execution(),
) -> ConversionReport:
    """Quantize a checkpoint once and write a build for each container.

    Every weight is quantized for the inputs it sees in the calibration text. With ``statistics``
    and no ``text`` no text is read, and scales are chosen by the importance they give.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        output: folder for the builds; it is made when missing.
        recipe: a recipe, its built-in name or its TOML file.
        to: containers by name (``gguf``, ``mlx``, ``onnx``, ``compressed-tensors``); default: all.
        budget: maximum size of each build, for instance ``6.1GB`` or ``5.69bpw``.
        budget_bytes: the same, and every weight gets the grid that serves it best.
        budget_token_bytes: maximum bytes of weights read for each decoded token.
        statistics: of the checkpoint, or the file of ``calibrate`` or of llama.cpp's imatrix.
        text: plain text or JSONL, one path or several; default: the calibration set of the sample.
        tokens: how many tokens of the text.
        sequence: tokens in a window.
        balance: choose the windows among this many tokens of the text.
        uncalibrated: round to nearest, without any text.
        name: of the builds and of the model in them; default: the checkpoint's.
        metadata: key-values that a GGUF gets beside or in place of those of the card: texts,
            numbers, truth values, or a list of one of them.
        force: replace builds that exist.
        execution: threads or cluster, device, memory, and whom to tell of progress and warnings.

    Raises:
        LfmqError: CheckpointError, RecipeError or ValidationError for what is given, PlanError for
            the output, UnsupportedError for a container that cannot hold the plan, UsageError for
            arguments that exclude each other. But for a damaged checkpoint nothing was written.
    """
    target = Target(recipe, to, budget, budget_bytes, budget_token_bytes)
    chosen = Text(paths_of(text), tokens, sequence, balance)
    if uncalibrated and (chosen.paths or statistics is not None):
        raise UsageError("--uncalibrated excludes --text and --statistics")
    labels = Labels(name, metadata or {}).checked(target.formats)
    source, known = _inputs(checkpoint, statistics)
    source = labels.applied(source)
    calibrates = bool(chosen.paths) or not (uncalibrated or known)
    job = _Job(source, target, chosen if calibrates else None, known, execution)
    return _convert(job, Path(output), force=force)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is converted, to what, by which text or statistics."""

    source: Checkpoint
    target: Target
    text: Text | None
    statistics: Statistics | None
    execution: Execution


def _inputs(
    checkpoint: Source, statistics: Statistics | str | PathLike[str] | None
) -> tuple[Checkpoint, Statistics | None]:
    source = opened(checkpoint)
    return source, known_statistics(source, statistics)


def _convert(job: _Job, output: Path, *, force: bool) -> ConversionReport:
    started, source, execution = time.monotonic(), job.source, job.execution
    formats = job.target.formats
    windows, balanced = None, None
    for line in source.notes:
        execution.tell(f"note: {line}")
    if job.text is not None:
        windows, balanced = job.text.calibration_windows(source, execution)
    widths = settle(source, job.target, job.statistics, windows=windows, execution=execution)
    plan_layouts(source, widths.plan, formats)  # refuses before the user is warned
    warnings = plan_warnings(widths.plan, formats, source.assets)
    for line in [*warnings, *card_warnings(source.assets)]:
        execution.tell(f"warning: {line}")
    made = write_builds(
        source,
        widths.recipe,
        widths.plan,
        formats,
        output,
        calibration=Calibration(windows) if windows else None,
        statistics=job.statistics,
        force=force,
        execution=execution,
    )
    seconds = time.monotonic() - started
    held = (execution.memory, peak_resident())
    return ConversionReport(
        made.builds, widths, windows, made.calibrated, balanced, seconds, *held
    )
