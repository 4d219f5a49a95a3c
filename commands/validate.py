"""Builds against their checkpoint."""

from dataclasses import replace
from pathlib import Path

import click
import torch

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Asked,
    Common,
    Gate,
    Reports,
    Text,
    common_options,
    engine_choice,
    gate_options,
    report_options,
    task_options,
    text_options,
)
from lfmq.commands.progress import show_progress
from lfmq.commands.tables import report_table
from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.validation.gate.judge import judge
from lfmq.validation.measure.builds import Engine
from lfmq.validation.measure.validate import validate as validate_builds
from lfmq.validation.tasks.run import Generation, check_builds, generation_lines, with_generation

THRESHOLD_MISSED = 3


@click.command(epilog=example("lfmq validate sample builds/*-int4.gguf --min-routing 0.97"))
@checkpoint_argument
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine",
    "engines",
    type=engine_choice,
    multiple=True,
    default=["read"],
    show_default=True,
    help="read: the file's weights through the reference forward; native: the file in its own "
    "runtime. May be repeated.",
)
@task_options
@click.option(
    "--by-layer",
    is_flag=True,
    help="Also measure the KLD of each layer and the error of each expert.",
)
@gate_options
@report_options
@common_options
@click.pass_context
def validate(
    ctx: click.Context,
    checkpoint: str,
    builds: tuple[Path, ...],
    text: Text,
    engines: tuple[Engine, ...],
    by_layer: bool,
    asked: Asked,
    gate: Gate,
    reports: Reports,
    common: Common,
) -> None:
    """Measure how close each build is to its checkpoint: KL divergence, routing, answers to tasks.

    Opens every build again and runs it on the same tokens as the checkpoint. Exits with status 3
    when a limit is missed. Without --text it uses the sample's evaluation text.
    """
    reports.check()
    opened = common.open(checkpoint)
    torch.set_num_threads(common.threads)
    windows = text.windows(opened, "evaluation.jsonl")
    thresholds = gate.stated(windows, experts=bool(opened.config.moe_layers))
    generation = _generation(opened, builds, asked, common)
    with show_progress("validating", quiet=common.quiet, unit="step") as progress:
        report = validate_builds(
            opened,
            builds,
            windows,
            engines=engines,
            by_layer=by_layer,
            threads=common.threads,
            device=common.device,
            progress=progress,
        )
    report = with_generation(report, generation)
    report = replace(report, failures=judge(report, thresholds))
    reports.write(report)
    for build in report.builds:
        for line in build.warnings:
            common.notice(f"warning: {build.path}: {line}")
    if common.as_json:
        print_json(report.to_json())
    else:
        print_tables(report_table(report))
        for line in generation_lines((b.path, b.generation) for b in report.builds):
            click.echo(line)
        for failure in report.failures:
            click.echo(f"missed: {failure}")
    if not report.passed:
        ctx.exit(THRESHOLD_MISSED)


def _generation(
    opened: Checkpoint, builds: tuple[Path, ...], asked: Asked, common: Common
) -> dict[Path, Generation]:
    """What builds wrote for the tasks, if there are any."""
    checks = asked.checks(opened)
    if checks is None:
        return {}
    with show_progress("generating", quiet=common.quiet, unit="answer") as progress:
        return check_builds(opened, builds, checks, device=common.device, progress=progress)
