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

    Runs the checkpoint, A and B. Each difference has a 95 % interval from a bootstrap over
    windows; an interval that contains zero shows no difference. Without --text it uses the
    sample's evaluation text.
    """
    opened = common.open(checkpoint)
    torch.set_num_threads(common.threads)
    windows = text.windows(opened, "evaluation.jsonl")
    with show_progress("comparing", quiet=common.quiet, unit="step") as progress:
        found = compare_builds(
            opened,
            a,
            b,
            windows,
            engine=engine,
            threads=common.threads,
            device=common.device,
            progress=progress,
        )
    if common.as_json:
        print_json(found.to_json())
        return
    print_tables(differences_table(found))
    top = found.top1
    click.echo(
        f"positions where one build alone has the reference's most likely token: A {top.only_a}, "
        f"B {top.only_b}; McNemar's p = {top.p:.3g}"
    )
