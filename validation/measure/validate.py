"""Builds against the checkpoint they came from, on the same tokens."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.model.forward import Model
from lfmq.converter.model.text import Windows
from lfmq.validation.measure.builds import Engine, EngineBuild, open_builds
from lfmq.validation.measure.by_layer import attribute
from lfmq.validation.measure.report import Attribution, BuildReport, Conditions, Report
from lfmq.validation.measure.runs import (
    Comparison,
    Progress,
    Reference,
    compare_model,
    count_native_windows,
    open_recorder,
    run_reference,
)
from lfmq.validation.measure.summaries import (
    histogram,
    measure_domains,
    measure_figures,
    measure_floor,
    measure_positions,
)


def validate(
    checkpoint: Checkpoint,
    builds: Iterable[Path],
    windows: Windows,
    *,
    engines: tuple[Engine, ...] = ("read",),
    by_layer: bool = False,
    allow_other: bool = False,
    execution: Execution = Execution(),
) -> Report:
    """Run every build in every engine and compare it with the reference.

    The reference runs once; its final hidden states (not its logits) are kept, so that 16 k tokens
    of a 128 k vocabulary take 134 MB.

    Args:
        checkpoint: the reference.
        builds: finished builds of any format.
        windows: the tokens.
        engines: ``read`` runs the file's weights through the reference forward, ``native`` the
            file in its format's own runtime.
        by_layer: also attribute the divergence to layers and experts.
        allow_other: measure builds of other checkpoints too; the report names them.
        execution: threads of the runtimes (torch has its own setting), the device of the
            reference forward, and whom to tell of layers and windows.

    Raises:
        ValidationError: a build cannot be read or is of another model, or a runtime fails.
    """
    opened = open_builds(tuple(builds), engines, checkpoint, allow_other=allow_other)
    threads, device = execution.threads, execution.device
    advance = _count(execution, opened, windows, checkpoint.config.num_hidden_layers, by_layer)
    native = any(build.native for build in opened)
    recording = open_recorder(checkpoint.config, windows) if native else nullcontext()
    model = Model(checkpoint.config, checkpoint.read, device=device)
    with recording as recorder:
        reference = run_reference(model, windows, recorder=recorder, progress=advance)
        half = Model(checkpoint.config, checkpoint.read, torch.bfloat16, device)
        floor = compare_model(reference, half, progress=advance)
        reports = []
        for build in opened:
            found = build.run(reference, threads=threads, device=device, progress=advance)
            where = None
            if by_layer and not build.native:
                where = attribute(reference, model, build.model(device), progress=advance)
            reports.append(report_build(build, found, windows, where))
    return Report(
        checkpoint=checkpoint.assets.name,
        conditions=conditions_of(windows, threads, device),
        tokens_scored=int(floor.scores.kld.size),
        reference_perplexity=perplexity_of(reference, floor),
        noise_floor=measure_floor(floor, windows.domains, windows.ids.shape[1]),
        builds=tuple(reports),
    )


def report_build(
    build: EngineBuild,
    found: Comparison,
    windows: Windows,
    attribution: Attribution | None = None,
) -> BuildReport:
    """All figures of a build's run."""
    return BuildReport(
        path=str(build.path),
        format=build.format,
        engine=build.engine,
        engine_version=build.engine_version,
        nbytes=build.nbytes,
        bits_per_weight=build.bits_per_weight,
        figures=measure_figures(found),
        histogram=histogram(found.scores.kld),
        routing=found.routing,
        domains=measure_domains(found, windows.domains),
        positions=measure_positions(found, windows.ids.shape[1]),
        facts=build.facts,
        attribution=attribution,
        warnings=build.warnings,
        other=build.other,
    )


def conditions_of(windows: Windows, threads: int, device: str) -> Conditions:
    """What figures of these windows depend on."""
    return Conditions(
        lfmq=version("lfmq"),
        torch=version("torch"),
        threads=threads,
        device=device,
        sequence=windows.ids.shape[1],
        tokens=windows.tokens,
        text_sha256=windows.text_sha256,
    )


def perplexity_of(reference: Reference, beside: Comparison) -> float:
    """The reference's perplexity, as a run beside it was given."""
    return math.exp(float(beside.scores.reference_nll.mean()))


def _count(
    execution: Execution,
    builds: list[EngineBuild],
    windows: Windows,
    layers: int,
    by_layer: bool,
) -> Progress:
    """Progress over all runs: layers of those in the reference forward, windows of the others."""
    report = execution.counter("validating", "step")
    native = sum(build.native for build in builds)
    read = (len(builds) - native) * (2 if by_layer else 1)
    total = layers * (2 + read) + count_native_windows(windows) * native
    return lambda step, _: report(step, total)
