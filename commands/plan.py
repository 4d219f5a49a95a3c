"""A dry run: schemes and sizes."""

from pathlib import Path
from typing import Any

import click

import lfmq
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, common_options, plan_options
from lfmq.commands.plan_tables import planned_table, roles_table, tensors_table, widths_table


@click.command(
    short_help="Dry run: schemes and sizes of all builds.",
    epilog=example("lfmq plan sample --recipe int4 --to gguf"),
)
@checkpoint_argument
@plan_options
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Write a recipe with the widths chosen for the budget.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Context length for which to report the cache size.",
)
@common_options
def plan(checkpoint: str, tensors: bool, common: Common, **options: Any) -> None:
    """Dry run: the scheme of every tensor and the size of every build. No weight is read.

    With --statistics the predicted KL divergence is also reported, and with a budget the widths
    that are chosen. Each decoded token reads the build's bytes per token plus the filled part of
    the KV and convolution cache.
    """
    report = lfmq.plan(common.open(checkpoint), **options)
    if common.as_json:
        print_json(report.to_json())
        return
    widths = report.widths
    print_tables(roles_table(report), planned_table(report.builds))
    if widths.units:
        print_tables(widths_table(widths))
    click.echo(str(report.state))
    if widths.kld is not None:
        click.echo(f"predicted mean KL divergence: {widths.kld:.6f} nats per token")
    for build in report.builds:
        if build.refused is not None:
            click.echo(f"{build.format}: {build.refused}")
    if tensors:
        print_tables(tensors_table(widths.plan))
