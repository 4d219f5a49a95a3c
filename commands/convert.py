"""Builds from a checkpoint."""

from pathlib import Path
from typing import Any

import click

import lfmq
from lfmq.commands.build_tables import builds_table, coverage_table
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    balance_option,
    cluster_option,
    common_options,
    plan_options,
    text_options,
)
from lfmq.commands.progress import show_progress


@click.command(
    short_help="Quantize once, write a build for each format.",
    epilog=example("lfmq convert sample --output builds --to gguf --to onnx"),
)
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
    default="2GB",
    show_default=True,
    metavar="SIZE",
    help="Maximum memory of a conversion that reads no text. With text, the hidden states and "
    "second moments are added to it.",
)
@cluster_option
@click.option(
    "--name",
    help="Name of the builds, and of the model in them. Default: the checkpoint's.",
)
@click.option(
    "--metadata",
    multiple=True,
    metavar="KEY=VALUE",
    help="Metadata for the GGUF, for example general.author=Me; may be repeated. Replaces what "
    "the checkpoint's card says.",
)
@click.option("--force", is_flag=True, help="Replace builds that exist.")
@common_options
def convert(
    checkpoint: str,
    output: Path,
    memory: str,
    metadata: tuple[str, ...],
    cluster: str | None,
    common: Common,
    **options: Any,
) -> None:
    """Quantize a checkpoint once and write a build for each container.

    Every weight is quantized for the inputs it sees in the calibration text, and each expert for
    the inputs of the tokens routed to it. Without --text the sample's calibration text is used.
    With --statistics and without --text no text is read: scales are chosen by the importance of
    each column. An interrupted run resumes and produces identical bytes.
    """
    from lfmq.converter.jobs.memory import parse_bytes
    from lfmq.formats.gguf.user_metadata import parse_pairs

    options["metadata"] = parse_pairs(metadata)
    budget, source = parse_bytes(memory), common.open(checkpoint)
    with show_progress(quiet=common.quiet) as progress:
        execution = common.execution(progress, memory=budget, cluster=cluster)
        report = lfmq.convert(source, output, execution=execution, **options)
    if common.as_json:
        print_json(report.to_json())
        return
    if report.calibrated is not None and report.calibrated.experts:
        print_tables(coverage_table(report.calibrated.experts, report.calibrated.routers))
    print_tables(builds_table(report.builds))
