"""Statistics from text."""

from pathlib import Path
from typing import Any

import click

import lfmq
from lfmq.commands.build_tables import coverage_table
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    balance_option,
    cluster_option,
    common_options,
    text_options,
)
from lfmq.commands.progress import show_progress


@click.command(
    short_help="Gather statistics of weights from text.",
    epilog=example("lfmq calibrate sample --output sample.statistics"),
)
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The statistics file to write.",
)
@text_options
@click.option(
    "--merge",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Statistics file of the same checkpoint to add; may be repeated.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write an importance matrix for llama.cpp.",
)
@balance_option
@cluster_option
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@common_options
def calibrate(
    checkpoint: str, output: Path, cluster: str | None, common: Common, **options: Any
) -> None:
    """Gather statistics of every weight and every expert from text.

    The statistics tell convert how much each weight's inputs matter, and tell plan which widths
    to choose for a budget. An interrupted run resumes and produces identical bytes. Without
    --text the sample's calibration text is used.
    """
    source = common.open(checkpoint)
    with show_progress(quiet=common.quiet) as progress:
        execution = common.execution(progress, cluster=cluster)
        report = lfmq.calibrate(source, output, execution=execution, **options)
    if common.as_json:
        print_json(report.to_json())
        return
    if report.experts:
        print_tables(coverage_table(report.experts))
    click.echo(f"{output}: statistics of {report.statistics.tokens:,} tokens")
