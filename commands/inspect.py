"""What a checkpoint is."""

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, common_options
from lfmq.commands.tables import inspection_table
from lfmq.converter.checkpoint.inspect import inspect_checkpoint


@click.command(epilog=example("lfmq inspect sample"))
@checkpoint_argument
@common_options
def inspect(checkpoint: str, common: Common) -> None:
    """Show what a checkpoint is: roles, weights, bytes, dtypes, and what is odd."""
    report = inspect_checkpoint(common.open(checkpoint))
    if common.as_json:
        print_json(report.to_json())
        return
    print_tables(inspection_table(report))
    for line in report.odd:
        click.echo(f"odd: {line}")
