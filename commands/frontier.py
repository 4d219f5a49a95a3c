"""The best predicted KL divergence for every size."""

from pathlib import Path

import click

from lfmq.commands.build_tables import frontier_table
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, common_options
from lfmq.formats.registry import FORMATS


@click.command(
    short_help="List the best builds for every size.",
    epilog=example("lfmq frontier sample --statistics sample.statistics --to gguf --html f.html"),
)
@checkpoint_argument
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    required=True,
    help="Statistics file from lfmq calibrate.",
)
@click.option(
    "--to",
    "container",
    type=click.Choice(sorted(FORMATS)),
    required=True,
    help="Container of the builds.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write the frontier as one HTML page, which loads nothing from the network.",
)
@click.option(
    "--point",
    type=click.IntRange(1),
    metavar="N",
    help="Number of the point to write with --save.",
)
@click.option("--save", type=click.Path(path_type=Path), help="Write the recipe of the point.")
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
    """List the builds with the least predicted KL divergence for their size.

    The same is done for the number of bytes read for each decoded token. The built-in recipes and
    the quantization types of other tools are listed for comparison. No weight is read.
    """
    from lfmq.api.frontier import frontier as trace

    if (point is None) != (save is None):
        raise click.UsageError("--point and --save belong together")
    found = trace(
        common.open(checkpoint), statistics, container, html=html, point=point, save=save
    )
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(frontier_table(found))
