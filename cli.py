"""The command line: each command parses, calls one library function and prints."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from lfmq.converter.balance import Balanced
from lfmq.converter.balance import balance as choose_balanced
from lfmq.converter.budget import save_recipe, settle_widths
from lfmq.converter.calibrate import calibrate as gather_statistics
from lfmq.converter.calibration import Calibration
from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.convert import convert as convert_checkpoint
from lfmq.converter.convert import plan_builds, plan_layouts
from lfmq.converter.inspect import inspect_checkpoint
from lfmq.converter.memory import DEFAULT as DEFAULT_MEMORY
from lfmq.converter.memory import parse_bytes, peak_resident
from lfmq.converter.plan import state_bytes
from lfmq.converter.text import Windows
from lfmq.quant.errors import LfmqError
from lfmq.validation.commands import compare, frontier, validate, verify
from lfmq.validation.console import checkpoint_argument, example, print_json, print_tables
from lfmq.validation.options import (
    Common,
    Text,
    Wanted,
    balance_option,
    common_options,
    plan_options,
    text_options,
)
from lfmq.validation.progress import show_conversion, show_progress
from lfmq.validation.runtimes import plan_warnings
from lfmq.validation.tables import (
    builds_table,
    coverage_table,
    inspection_table,
    planned_table,
    roles_table,
    tensors_table,
    widths_table,
)


class Commands(click.Group):
    """The one place where library errors become a line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        try:
            return super().invoke(ctx)
        except LfmqError as error:
            raise click.ClickException(_one_line(str(error))) from error
        except MemoryError as error:
            raise click.ClickException("out of memory; use fewer --threads") from error
        except OSError as error:
            reason = f"{error.filename or 'i/o'}: {error.strerror or error}"
            raise click.ClickException(_one_line(reason)) from error


def _one_line(text: str) -> str:
    """Names in a hostile file may hold line ends or escape sequences; they are shown escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Work on a running Ray cluster; every machine sees the folders under the same paths.",
)


@click.group(
    cls=Commands,
    context_settings={"max_content_width": 100},
    epilog=example("lfmq convert sample --output builds"),
)
@click.version_option(package_name="lfmq")
def main() -> None:
    """Turn an LFM2 mixture-of-experts checkpoint into GGUF, MLX and ONNX builds, and prove them.

    CHECKPOINT is a folder with config.json and safetensors, the word 'sample', or a Hub id
    org/name[@revision].
    """


@main.command(epilog=example("lfmq inspect sample"))
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


@main.command(epilog=example("lfmq plan sample --recipe int4 --to gguf"))
@checkpoint_argument
@plan_options
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the widths of a budget as a recipe."
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens for which the size of the state is told.",
)
@common_options
def plan(
    checkpoint: str,
    wanted: Wanted,
    tensors: bool,
    save: Path | None,
    context: int,
    common: Common,
) -> None:
    """Dry run: the scheme of every tensor and the size of every build; reads no weight.

    With --statistics also the KL divergence they predict, and with a budget the widths they
    choose. Decoding reads the bytes a token of a build, and of the state as much as the context
    has filled.
    """
    opened = common.open(checkpoint)
    widths = settle_widths(opened, wanted.base, wanted.chosen, wanted.known(opened))
    state = state_bytes(opened.geometry, context)
    builds = plan_builds(opened, widths.plan, wanted.chosen)
    if save is not None:
        save_recipe(save, widths.recipe)
    if common.as_json:
        listed = [
            {"name": e.name, "shape": e.shape, "storage": str(e.storage)}
            for e in widths.plan.entries
        ]
        planned = [build.to_json() for build in builds]
        print_json(
            {
                "recipe": widths.plan.recipe,
                "builds": planned,
                "state": state.to_json(),
                **widths.to_json(),
                "tensors": listed,
            }
        )
        return
    print_tables(roles_table(widths.plan), planned_table(builds))
    if widths.units:
        print_tables(widths_table(widths))
    click.echo(str(state))
    if widths.kld is not None:
        click.echo(f"predicted mean KL divergence: {widths.kld:.6f} nats a token")
    for build in builds:
        if build.refused is not None:
            click.echo(f"{build.format}: {build.refused}")
    if tensors:
        print_tables(tensors_table(widths.plan))


@main.command(epilog=example("lfmq calibrate sample --output sample.statistics"))
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
    windows, balanced = _calibration_text(opened, text, balance, common)
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
                "experts": [asdict(expert) for expert in coverage],
            }
        )
        return
    print_tables(coverage_table(coverage))
    click.echo(f"{output}: statistics of {found.tokens:,} tokens")


def _calibration_text(
    opened: Checkpoint, text: Text, balance: int | None, common: Common
) -> tuple[Windows, Balanced | None]:
    """The text's first windows, or those that bring experts to their quotas."""
    if balance is None:
        return text.windows(opened, "calibration.jsonl"), None
    if balance < text.tokens:
        raise click.UsageError(f"--balance {balance} is fewer than --tokens {text.tokens}")
    pool = replace(text, tokens=balance).windows(opened, "calibration.jsonl")
    with show_progress("balancing", quiet=common.quiet) as progress:
        found = choose_balanced(
            opened,
            pool,
            text.tokens,
            threads=common.threads,
            device=common.device,
            progress=progress,
        )
    common.notice(str(found))
    return found.windows, found


@main.command(epilog=example("lfmq convert sample --output builds --to gguf --to onnx"))
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the builds.",
)
@plan_options
@text_options
@balance_option
@click.option("--uncalibrated", is_flag=True, help="Round to nearest, without any text.")
@click.option(
    "--memory",
    default=DEFAULT_MEMORY,
    show_default=True,
    metavar="SIZE",
    help="Most memory to hold without text; with text, hidden states and moments come on top.",
)
@cluster_option
@click.option("--force", is_flag=True, help="Replace builds that exist.")
@common_options
def convert(
    checkpoint: str,
    output: Path,
    wanted: Wanted,
    text: Text,
    balance: int | None,
    uncalibrated: bool,
    memory: str,
    cluster: str | None,
    force: bool,
    common: Common,
) -> None:
    """Quantize a checkpoint once and write a build for each format.

    Every weight is quantized for the inputs it sees in the calibration text, each expert for
    those of its own tokens. Without --text the sample's calibration text is used; with
    --statistics alone no text is read, and scales are chosen by the importance they give.
    """
    if uncalibrated and (text.texts or wanted.statistics):
        raise click.UsageError("--uncalibrated excludes --text and --statistics")
    started, budget = time.monotonic(), parse_bytes(memory)
    opened, base = common.open(checkpoint), wanted.base
    known = wanted.known(opened)
    windows, balanced = None, None
    if text.texts or not (uncalibrated or known):
        windows, balanced = _calibration_text(opened, text, balance, common)
    widths = settle_widths(
        opened,
        base,
        wanted.chosen,
        known,
        windows=windows,
        threads=common.threads,
        device=common.device,
    )
    plan_layouts(opened, widths.plan, wanted.chosen)
    for line in plan_warnings(widths.plan, wanted.chosen, opened.assets):
        common.notice(f"warning: {line}")
    calibration = Calibration(windows) if windows else None
    with show_conversion(quiet=common.quiet) as progress:
        builds = convert_checkpoint(
            opened,
            widths.recipe,
            widths.plan,
            wanted.chosen,
            output,
            calibration=calibration,
            statistics=known,
            force=force,
            threads=common.threads,
            memory=budget,
            device=common.device,
            cluster=cluster,
            progress=progress,
            notice=common.notice,
        )
    if common.as_json:
        print_json(
            {
                "builds": [build.to_json() for build in builds],
                "seconds": time.monotonic() - started,
                "memory_bytes": budget,
                "peak_rss_bytes": peak_resident(),
                "tokens": windows.tokens if windows else 0,
                **widths.to_json(),
                **(calibration.to_json() if calibration else {}),
                **({"balance": balanced.to_json()} if balanced else {}),
            }
        )
        return
    if calibration is not None:
        print_tables(coverage_table(calibration.experts, calibration.routers))
    print_tables(builds_table(builds))


for command in (frontier, verify, validate, compare):
    main.add_command(command)


if __name__ == "__main__":
    main()
