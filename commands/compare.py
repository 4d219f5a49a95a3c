"""Two builds against each other."""

from pathlib import Path
from typing import Any

import click

import lfmq
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    common_options,
    engine_choice,
    other_option,
    text_options,
)
from lfmq.commands.progress import show_progress


@click.command(
    short_help="Compare two builds on the same tokens.",
    epilog=example("lfmq compare sample builds/a-int4.gguf builds/b-int4.gguf"),
)
@checkpoint_argument
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine",
    type=engine_choice,
    default="read",
    show_default=True,
    help="Engine that runs both builds; see lfmq validate.",
)
@other_option
@common_options
def compare(checkpoint: str, a: Path, b: Path, common: Common, **options: Any) -> None:
    """Compare two builds of one checkpoint on the same tokens, figure by figure.

    Each difference has a 95 % interval from a bootstrap over windows. Where the interval contains
    zero, no difference is shown. Without --text the sample's evaluation text is used.
    """
    from lfmq.commands.tables import differences_table, parity_table

    source = common.open(checkpoint)
    with show_progress(quiet=common.quiet) as progress:
        found = lfmq.compare(source, a, b, execution=common.execution(progress), **options)
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(differences_table(found), *filter(None, [parity_table(found.parity)]))
    top = found.top1
    click.echo(
        f"positions where one build alone has the reference's most likely token: A {top.only_a}, "
        f"B {top.only_b}; McNemar's p = {top.p:.3g}"
    )
