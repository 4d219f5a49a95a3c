"""Two builds against each other."""

from pathlib import Path

import click
import torch

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, Text, common_options, engine_choice, text_options
from lfmq.commands.progress import show_progress
from lfmq.commands.tables import differences_table
from lfmq.validation.measure.builds import Engine
from lfmq.validation.measure.compare import compare as compare_builds


@click.command(epilog=example("lfmq compare sample builds/a-int4.gguf builds/b-int4.gguf"))
@checkpoint_argument
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine", type=engine_choice, default="read", show_default=True, help="What runs both."
)
@common_options
def compare(checkpoint: str, a: Path, b: Path, text: Text, engine: Engine, common: Common) -> None:
    """Compare two builds of one checkpoint on the same tokens, figure by figure.

    A and B are run beside the checkpoint. Each difference has a 95 % interval from a bootstrap
    over windows; where it holds zero no difference is shown. Without --text the sample's
    evaluation text is used.
    """
    opened = common.open(checkpoint)
    torch.set_num_threads(common.threads)
    windows = text.windows(opened, "evaluation.jsonl")
    with show_progress(quiet=common.quiet) as progress:
        found = compare_builds(
            opened,
            a,
            b,
            windows,
            engine=engine,
            execution=common.execution(progress),
        )
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(differences_table(found))
    top = found.top1
    click.echo(
        f"the reference's most likely token: {top.only_a} positions only A, {top.only_b} only B, "
        f"McNemar p = {top.p:.3g}"
    )
