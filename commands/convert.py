"""Builds from a checkpoint."""

import time
from pathlib import Path

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    Text,
    Wanted,
    balance_option,
    calibration_text,
    cluster_option,
    common_options,
    plan_options,
    text_options,
)
from lfmq.commands.progress import show_conversion
from lfmq.commands.tables import builds_table, coverage_table
from lfmq.converter.jobs.memory import DEFAULT as DEFAULT_MEMORY
from lfmq.converter.jobs.memory import parse_bytes, peak_resident
from lfmq.converter.mixed_precision.budget import settle_widths
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.convert import convert as convert_checkpoint
from lfmq.converter.run.convert import plan_layouts
from lfmq.validation.engines.installed import plan_warnings


@click.command(epilog=example("lfmq convert sample --output builds --to gguf --to onnx"))
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the builds.",
)
@plan_options
@text_options
@balance_option
@click.option("--uncalibrated", is_flag=True, help="Round to nearest, without any text.")
@click.option(
    "--memory",
    default=DEFAULT_MEMORY,
    show_default=True,
    metavar="SIZE",
    help="Most memory to hold without text; with text, hidden states and moments come on top.",
)
@cluster_option
@click.option("--force", is_flag=True, help="Replace builds that exist.")
@common_options
def convert(
    checkpoint: str,
    output: Path,
    wanted: Wanted,
    text: Text,
    balance: int | None,
    uncalibrated: bool,
    memory: str,
    cluster: str | None,
    force: bool,
    common: Common,
) -> None:
    """Quantize a checkpoint once and write a build for each format.

    Every weight is quantized for the inputs it sees in the calibration text, each expert for
    those of its own tokens. Without --text the sample's calibration text is used; with
    --statistics alone no text is read, and scales are chosen by the importance they give.
    """
    if uncalibrated and (text.texts or wanted.statistics):
        raise click.UsageError("--uncalibrated excludes --text and --statistics")
    started, budget = time.monotonic(), parse_bytes(memory)
    opened, base = common.open(checkpoint), wanted.base
    known = wanted.known(opened)
    windows, balanced = None, None
    if text.texts or not (uncalibrated or known):
        windows, balanced = calibration_text(opened, text, balance, common)
    widths = settle_widths(
        opened,
        base,
        wanted.chosen,
        known,
        windows=windows,
        threads=common.threads,
        device=common.device,
    )
    plan_layouts(opened, widths.plan, wanted.chosen)
    for line in plan_warnings(widths.plan, wanted.chosen, opened.assets):
        common.notice(f"warning: {line}")
    calibration = Calibration(windows) if windows else None
    with show_conversion(quiet=common.quiet) as progress:
        builds = convert_checkpoint(
            opened,
            widths.recipe,
            widths.plan,
            wanted.chosen,
            output,
            calibration=calibration,
            statistics=known,
            force=force,
            threads=common.threads,
            memory=budget,
            device=common.device,
            cluster=cluster,
            progress=progress,
            notice=common.notice,
        )
    if common.as_json:
        print_json(
            {
                "builds": [build.to_json() for build in builds],
                "seconds": time.monotonic() - started,
                "memory_bytes": budget,
                "peak_rss_bytes": peak_resident(),
                "tokens": windows.tokens if windows else 0,
                **widths.to_json(),
                **(calibration.to_json() if calibration else {}),
                **({"balance": balanced.to_json()} if balanced else {}),
            }
        )
        return
    if calibration is not None and calibration.experts:
        print_tables(coverage_table(calibration.experts, calibration.routers))
    print_tables(builds_table(builds))
