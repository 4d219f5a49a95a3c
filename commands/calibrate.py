"""Statistics from text."""

import time
from dataclasses import asdict
from pathlib import Path

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    Text,
    balance_option,
    calibration_text,
    cluster_option,
    common_options,
    text_options,
)
from lfmq.commands.progress import show_progress
from lfmq.commands.tables import coverage_table
from lfmq.converter.jobs.memory import peak_resident
from lfmq.converter.statistics.calibrate import calibrate as gather_statistics


@click.command(epilog=example("lfmq calibrate sample --output sample.statistics"))
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The statistics file.",
)
@text_options
@click.option(
    "--merge",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Statistics of the same checkpoint to add; may be repeated.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write llama.cpp's importance matrix.",
)
@balance_option
@cluster_option
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@common_options
def calibrate(
    checkpoint: str,
    output: Path,
    text: Text,
    merge: tuple[Path, ...],
    imatrix: Path | None,
    balance: int | None,
    cluster: str | None,
    force: bool,
    common: Common,
) -> None:
    """Gather statistics of every weight and every expert from text.

    The file tells convert how much each weight's inputs matter and plan what a budget buys. A run
    that was killed goes on where it was. Without --text the sample's calibration text is used.
    """
    started = time.monotonic()
    opened = common.open(checkpoint)
    windows, balanced = calibration_text(opened, text, balance, common)
    with show_progress("calibrating", quiet=common.quiet) as progress:
        found, coverage = gather_statistics(
            opened,
            windows,
            output,
            merge=merge,
            imatrix=imatrix,
            force=force,
            threads=common.threads,
            device=common.device,
            cluster=cluster,
            progress=progress,
        )
    if common.as_json:
        print_json(
            {
                "path": str(output),
                "tokens": found.tokens,
                "seconds": time.monotonic() - started,
                "peak_rss_bytes": peak_resident(),
                **found.to_json(),
                **({"balance": balanced.to_json()} if balanced else {}),
                **({"experts": [asdict(expert) for expert in coverage]} if coverage else {}),
            }
        )
        return
    if coverage:
        print_tables(coverage_table(coverage))
    click.echo(f"{output}: statistics of {found.tokens:,} tokens")
