"""The best predicted KL divergence for every size."""

from pathlib import Path

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, common_options
from lfmq.commands.tables import frontier_table
from lfmq.converter.mixed_precision.budget import save_recipe
from lfmq.converter.mixed_precision.frontier import trace_frontier
from lfmq.converter.statistics.calibrate import open_statistics
from lfmq.formats.registry import FORMATS
from lfmq.validation.pages.files import check_writable, write_report
from lfmq.validation.pages.frontier_page import render_frontier


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
    known = open_statistics(statistics, opened.config)
    found = trace_frontier(opened, known, container, FORMATS[container])
    if point is not None and save is not None:
        save_recipe(save, found.recipe(point))
    if html is not None:
        write_report(html, render_frontier(found))
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(frontier_table(found))
