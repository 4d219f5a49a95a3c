"""The commands that judge builds, made or not: frontier, verify, validate, compare."""

from dataclasses import replace
from pathlib import Path

import click
import torch

from lfmq.converter.budget import save_recipe
from lfmq.converter.calibrate import open_statistics
from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.frontier import trace_frontier
from lfmq.converter.manifest import verify_build
from lfmq.formats.registry import FORMATS
from lfmq.validation.builds import Engine
from lfmq.validation.console import checkpoint_argument, example, print_json, print_tables
from lfmq.validation.frontier_page import render_frontier
from lfmq.validation.gate import judge
from lfmq.validation.generation import Generation, check_builds, generation_lines, with_generation
from lfmq.validation.options import (
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
from lfmq.validation.paired import compare as compare_builds
from lfmq.validation.progress import show_progress
from lfmq.validation.reports import check_writable, write_report
from lfmq.validation.runtimes import with_warnings
from lfmq.validation.tables import differences_table, frontier_table, report_table
from lfmq.validation.validate import validate as validate_builds

THRESHOLD_MISSED = 3


@click.command(
    epilog=example("lfmq frontier sample --statistics sample.statistics --to gguf --html f.html")
)
@checkpoint_argument
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    required=True,
    help="What lfmq calibrate found.",
)
@click.option(
    "--to",
    "container",
    type=click.Choice(sorted(FORMATS)),
    required=True,
    help="The container whose builds are looked at.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also draw it as one page for a browser; it needs no network.",
)
@click.option(
    "--point", type=click.IntRange(1), metavar="N", help="The point to write with --save."
)
@click.option("--save", type=click.Path(path_type=Path), help="Write the point's recipe.")
@common_options
def frontier(
    checkpoint: str,
    statistics: Path,
    container: str,
    html: Path | None,
    point: int | None,
    save: Path | None,
    common: Common,
) -> None:
    """The least predicted KL divergence for each size, and for each number of bytes a token.

    Beside them stand the built-in recipes and the types of other tools. No weight is read.
    """
    if (point is None) != (save is None):
        raise click.UsageError("--point and --save belong together")
    check_writable(html)
    opened = common.open(checkpoint)
    known = open_statistics(statistics, opened.geometry)
    found = trace_frontier(opened, known, container, FORMATS[container])
    if point is not None and save is not None:
        save_recipe(save, found.recipe(point))
    if html is not None:
        write_report(html, render_frontier(found))
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(frontier_table(found))


@click.command(epilog=example("lfmq verify builds/lfm2moe-tiny-int4.gguf"))
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no tables.")
def verify(builds: tuple[Path, ...], as_json: bool) -> None:
    """Check that builds hold the bytes their manifest says."""
    found = [{"path": str(b), "manifest": str(verify_build(b)), "intact": True} for b in builds]
    if as_json:
        print_json({"builds": found})
        return
    for build in found:
        click.echo(f"{build['path']}: intact, as {build['manifest']} says")


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
@click.option("--by-layer", is_flag=True, help="Also the divergence of each layer and expert.")
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
    """Compare builds with their checkpoint: perplexity, KL divergence, routing, answers to tasks.

    Every build is opened again and run on the same tokens as the checkpoint. Exits with status 3
    when a limit is missed. Without --text the sample's evaluation text is used.
    """
    reports.check()
    opened = common.open(checkpoint)
    torch.set_num_threads(common.threads)
    windows = text.windows(opened, "evaluation.jsonl")
    thresholds = gate.stated(windows)
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
    report = replace(report, failures=judge(report.to_json(), thresholds))
    document = with_warnings(report.to_json(), opened.assets)
    reports.write(document)
    for build in document["builds"]:
        for line in build["warnings"]:
            common.notice(f"warning: {build['path']}: {line}")
    if common.as_json:
        print_json(document)
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


@click.command(epilog=example("lfmq compare sample builds/a-int4.gguf builds/b-int4.gguf"))
@checkpoint_argument
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine", type=engine_choice, default="read", show_default=True, help="What runs both."
)
@common_options
def compare(checkpoint: str, a: Path, b: Path, text: Text, engine: Engine, common: Common) -> None:
    """Compare two builds of one checkpoint on the same tokens, figure by figure.

    A and B are run beside the checkpoint. Each difference has a 95 % interval from a bootstrap
    over windows; where it holds zero no difference is shown. Without --text the sample's
    evaluation text is used.
    """
    opened = common.open(checkpoint)
    torch.set_num_threads(common.threads)
    windows = text.windows(opened, "evaluation.jsonl")
    with show_progress("comparing", quiet=common.quiet, unit="step") as progress:
        found = compare_builds(
            opened,
            a,
            b,
            windows,
            engine=engine,
            threads=common.threads,
            device=common.device,
            progress=progress,
        )
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(differences_table(found))
    top = found.top1
    click.echo(
        f"the reference's most likely token: {top.only_a} positions only A, {top.only_b} only B, "
        f"McNemar p = {top.p:.3g}"
    )
