"""What a checkpoint is."""

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, common_options
from lfmq.commands.plan_tables import inspection_table


@click.command(
    short_help="Show what a checkpoint holds.",
    epilog=example("lfmq inspect sample"),
)
@checkpoint_argument
@common_options
def inspect(checkpoint: str, common: Common) -> None:
    """Show what a checkpoint holds: roles, weights, bytes and dtypes, and warnings about it."""
    from lfmq.converter.checkpoint.inspect import inspect_checkpoint

    report = inspect_checkpoint(common.open(checkpoint))
    if common.as_json:
        print_json(report.to_json())
        return
    print_tables(inspection_table(report))
    for line in report.notes:
        click.echo(f"note: {line}")
    for line in report.warnings:
        click.echo(f"warning: {line}")
