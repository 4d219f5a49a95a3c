"""Builds against their checkpoint."""

from pathlib import Path
from typing import Any

import click

import lfmq
from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import (
    Common,
    common_options,
    engine_choice,
    gate_options,
    other_option,
    report_options,
    task_options,
    text_options,
)
from lfmq.commands.progress import show_progress

THRESHOLD_MISSED = 3


@click.command(epilog=example("lfmq validate sample builds/*-int4.gguf --min-routing 0.97"))
@checkpoint_argument
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine",
    type=engine_choice,
    multiple=True,
    default=["read"],
    show_default=True,
    help="read runs the file's weights in the reference forward pass; native runs the file in its "
    "own runtime. May be repeated.",
)
@task_options
@click.option(
    "--by-layer",
    is_flag=True,
    help="Also measure the KL divergence caused by each layer and each expert.",
)
@gate_options
@report_options
@other_option
@common_options
def validate(checkpoint: str, builds: tuple[Path, ...], common: Common, **options: Any) -> None:
    """Measure how close each build is to its checkpoint.

    Every build is read back and run on the same tokens as the checkpoint. The report compares
    perplexity, KL divergence, the choice of experts, and answers to tasks. The tokenizer of each
    build in its runtime must make the checkpoint's tokens. The exit status is 3 when it does not
    or a limit is missed. Without --text the sample's evaluation text is used.
    """
    from lfmq.commands.tables import parity_table, report_table
    from lfmq.validation.pages.files import check_writable
    from lfmq.validation.tasks.run import generation_lines

    check_writable(options["html"], options["markdown"])  # before a checkpoint is downloaded
    source = common.open(checkpoint)
    with show_progress(quiet=common.quiet) as progress:
        report = lfmq.validate(source, builds, execution=common.execution(progress), **options)
    if common.as_json:
        print_json(report.to_json())
    else:
        print_tables(report_table(report), *filter(None, [parity_table(report.parity)]))
        for line in generation_lines((b.path, b.generation) for b in report.builds):
            click.echo(line)
        for failure in report.failures:
            click.echo(f"missed: {failure}")
    if not report.passed:
        click.get_current_context().exit(THRESHOLD_MISSED)
