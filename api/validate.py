"""Builds against their checkpoint: figures, answers to tasks, limits, and pages."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from lfmq.api.checkpoint import Source, opened
from lfmq.api.text import SEQUENCE, TOKENS, Paths, Text, paths_of
from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.batches import torch_threads
from lfmq.converter.jobs.execution import Execution
from lfmq.validation.engines.installed import build_warnings
from lfmq.validation.gate.judge import judge
from lfmq.validation.gate.thresholds import Thresholds, load_thresholds
from lfmq.validation.measure.builds import Engine
from lfmq.validation.measure.report import Report
from lfmq.validation.measure.validate import validate as measure_builds
from lfmq.validation.pages.files import check_writable, write_report
from lfmq.validation.pages.markdown import render_markdown
from lfmq.validation.pages.page import render_page
from lfmq.validation.parity.run import measure_parity
from lfmq.validation.tasks.run import Generation, check_builds, prepare_checks, with_generation


@dataclass(frozen=True, slots=True)
class Tasks:
    """What builds are asked to write.

    Attributes:
        path: JSONL of chat tasks.
        count: only the first of them; None for all.
        runs: sampled answers to each task.
        new_tokens: most tokens of an answer.
    """

    path: Path
    count: int | None
    runs: int
    new_tokens: int


def validate(
    checkpoint: Source,
    builds: Paths,
    *,
    text: Paths = (),
    tokens: int = TOKENS,
    sequence: int = SEQUENCE,
    engine: Engine | Iterable[Engine] = ("read",),
    tasks: str | PathLike[str] | None = None,
    task_count: int | None = None,
    task_runs: int = 1,
    new_tokens: int = 256,
    by_layer: bool = False,
    allow_other: bool = False,
    thresholds: str | PathLike[str] | None = None,
    html: str | PathLike[str] | None = None,
    markdown: str | PathLike[str] | None = None,
    execution: Execution = Execution(),
    **limits: float | None,
) -> Report:
    """Run every build and its checkpoint on the same tokens and compare them.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        builds: finished builds of any container, one path or several.
        text: plain text or JSONL, one path or several; default: the sample's evaluation set.
        tokens: how many tokens of the text.
        sequence: tokens in a window; the second half of each window is scored.
        engine: ``read`` runs a file's weights in the reference forward, ``native`` the file in its
            own runtime; one or both.
        tasks: JSONL of chat tasks, which checkpoint and builds answer.
        task_count: only the first of them.
        task_runs: sampled answers to each task.
        new_tokens: most tokens of an answer.
        by_layer: also attribute the divergence to layers and experts.
        allow_other: measure builds of other checkpoints too; the report names them.
        thresholds: TOML file of limits.
        html: also write the report as one page there.
        markdown: also write the table for a model card there.
        execution: threads, device, and whom to tell of progress and warnings.
        **limits: in place of the file's: ``max_kld`` (nats a token), ``max_perplexity_ratio``,
            ``min_top1``, ``min_routing``, ``min_local_routing`` (shares).

    Returns:
        The report; ``failures`` names each limit that a build missed.

    Raises:
        LfmqError: CheckpointError or ValidationError.
    """
    page, table = (None if path is None else Path(path) for path in (html, markdown))
    check_writable(page, table)
    chosen = Text(paths_of(text), tokens, sequence)
    asked = None if tasks is None else Tasks(Path(tasks), task_count, task_runs, new_tokens)
    gate = _limits(thresholds).with_limits(**limits)
    job = _Job(opened(checkpoint), paths_of(builds), chosen, gate, execution, allow_other)
    report = _measure(job, engines_of(engine), asked, by_layer=by_layer)
    if page is not None:
        write_report(page, render_page(report))
    if table is not None:
        write_report(table, render_markdown(report))
    return report


def _limits(path: str | PathLike[str] | None) -> Thresholds:
    return Thresholds() if path is None else load_thresholds(Path(path))


def engines_of(engine: Engine | Iterable[Engine]) -> tuple[Engine, ...]:
    """One engine or several, as a tuple."""
    return (engine,) if isinstance(engine, str) else tuple(engine)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is measured, on which text, against which limits."""

    source: Checkpoint
    builds: tuple[Path, ...]
    text: Text
    thresholds: Thresholds
    execution: Execution
    allow_other: bool


def _measure(
    job: _Job, engines: tuple[Engine, ...], tasks: Tasks | None, *, by_layer: bool
) -> Report:
    """The report, judged; each warning about a build is also told."""
    with torch_threads(job.execution.threads):
        windows = job.text.evaluation_windows(job.source, job.execution)
        sequence = windows.ids.shape[1]
        job.thresholds.check_text(windows.text_sha256, windows.tokens, sequence)
        job.thresholds.check_experts(bool(job.source.config.moe_layers))
        written = {} if tasks is None else _generate(job, tasks)
        report = measure_builds(
            job.source,
            job.builds,
            windows,
            engines=engines,
            by_layer=by_layer,
            allow_other=job.allow_other,
            execution=job.execution,
        )
        parity = measure_parity(
            job.source.assets,
            {Path(build.path): build.format for build in report.builds},
            native="native" in engines,
            threads=job.execution.threads,
        )
    report = _with_warnings(with_generation(report, written), job.source)
    for build in report.builds:
        for line in build.warnings:
            job.execution.tell(f"warning: {build.path}: {line}")
    for missing in parity.not_measured:
        job.execution.tell(f"tokenizer of {missing.path} not compared: {missing.why}")
    report = replace(report, parity=parity)
    return replace(report, failures=judge(report, job.thresholds))


def _generate(job: _Job, tasks: Tasks) -> dict[Path, Generation]:
    """What builds write for the tasks."""
    checks = prepare_checks(
        job.source,
        tasks.path,
        count=tasks.count,
        new_tokens=tasks.new_tokens,
        runs=tasks.runs,
    )
    return check_builds(
        job.source, job.builds, checks, allow_other=job.allow_other, execution=job.execution
    )


def _with_warnings(report: Report, source: Checkpoint) -> Report:
    """The report with what is known to be wrong with each build or its runtime here."""
    builds = []
    for build in report.builds:
        found = build_warnings(Path(build.path), build.format, source.assets)
        builds.append(replace(build, warnings=tuple(dict.fromkeys([*build.warnings, *found]))))
    return replace(report, builds=tuple(builds))
