"""The command line: each command parses, calls one library function and prints."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from lfmq.converter.calibration import Calibration
from lfmq.converter.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.convert import convert as convert_checkpoint
from lfmq.converter.convert import plan_builds, plan_layouts
from lfmq.converter.inspect import inspect_checkpoint
from lfmq.converter.locate import locate_checkpoint, sample_file
from lfmq.converter.manifest import verify_build
from lfmq.converter.plan import resolve_plan
from lfmq.converter.recipe import DEFAULT_RECIPE, load_recipe
from lfmq.converter.text import Windows, load_windows
from lfmq.formats.build import Format
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import LfmqError, ValidationError
from lfmq.validation.progress import show_progress
from lfmq.validation.report import Thresholds
from lfmq.validation.tables import (
    builds_table,
    coverage_table,
    inspection_table,
    planned_table,
    report_table,
    roles_table,
    tensors_table,
)
from lfmq.validation.validate import validate as validate_builds

THRESHOLD_MISSED = 3

Command = Callable[..., Any]


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


def _options(*decorators: Command) -> Command:
    return lambda command: reduce(lambda f, d: d(f), reversed(decorators), command)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


checkpoint_argument = click.argument("checkpoint")
common_options = _options(
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        default=_threads,
        show_default="all cores",
        help="Threads to use; results do not depend on it.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where matrices are multiplied.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no tables."),
    click.option("--quiet", is_flag=True, help="No progress on stderr."),
)
plan_options = _options(
    click.option(
        "--recipe",
        default=DEFAULT_RECIPE,
        show_default=True,
        help="A built-in recipe (int8, int4, int4-all) or a TOML file.",
    ),
    click.option(
        "--to",
        "formats",
        type=click.Choice(sorted(FORMATS)),
        multiple=True,
        help="Container to write; may be repeated. Default: all.",
    ),
)
text_options = _options(
    click.option(
        "--text",
        "texts",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Plain text or JSONL; may be repeated.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(1),
        default=32768,
        show_default=True,
        help="How many tokens of the text.",
    ),
    click.option(
        "--sequence",
        type=click.IntRange(4),
        default=512,
        show_default=True,
        help="Length of a window, tokens.",
    ),
)


def _example(command: str) -> str:
    return f"\b\nExample:\n    {command}"


@click.group(
    cls=Commands,
    context_settings={"max_content_width": 100},
    epilog=_example("lfmq convert sample --output builds"),
)
@click.version_option(package_name="lfmq")
def main() -> None:
    """Turn an LFM2 mixture-of-experts checkpoint into GGUF, MLX and ONNX builds, and prove them.

    CHECKPOINT is a folder with config.json and safetensors, the word 'sample', or a Hub id
    org/name[@revision].
    """


def _open(reference: str, *, quiet: bool) -> Checkpoint:
    location = locate_checkpoint(reference, bars=sys.stderr.isatty() and not quiet)
    return open_checkpoint(location.folder, location.name)


def _chosen(formats: tuple[str, ...]) -> dict[str, Format]:
    return {name: FORMATS[name] for name in (formats or FORMATS)}


def _print_tables(*tables: Table) -> None:
    """To the terminal's width; elsewhere as wide as they are, so that no path is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    console.print(*tables)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False))


@main.command(epilog=_example("lfmq inspect sample"))
@checkpoint_argument
@common_options
def inspect(checkpoint: str, threads: int, device: str, as_json: bool, quiet: bool) -> None:
    """Show what a checkpoint is: roles, weights, bytes, dtypes, and what is odd."""
    report = inspect_checkpoint(_open(checkpoint, quiet=quiet))
    if as_json:
        _print_json(report.to_json())
        return
    _print_tables(inspection_table(report))
    for line in report.odd:
        click.echo(f"odd: {line}")


@main.command(epilog=_example("lfmq plan sample --recipe int4 --to gguf"))
@checkpoint_argument
@plan_options
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@common_options
def plan(
    checkpoint: str,
    recipe: str,
    formats: tuple[str, ...],
    tensors: bool,
    threads: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Dry run: the scheme of every tensor and the size of every build; reads no weight."""
    opened = _open(checkpoint, quiet=quiet)
    resolved = resolve_plan(opened.geometry, load_recipe(recipe))
    builds = plan_builds(opened, resolved, _chosen(formats))
    if as_json:
        listed = [
            {"name": e.name, "shape": e.shape, "storage": str(e.storage)} for e in resolved.entries
        ]
        planned = [build.to_json() for build in builds]
        _print_json({"recipe": resolved.recipe, "builds": planned, "tensors": listed})
        return
    _print_tables(roles_table(resolved), planned_table(builds))
    for build in builds:
        if build.refused is not None:
            click.echo(f"{build.format}: {build.refused}")
    if tensors:
        _print_tables(tensors_table(resolved))


@main.command(epilog=_example("lfmq convert sample --output builds --to gguf --to onnx"))
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the builds.",
)
@plan_options
@text_options
@click.option("--uncalibrated", is_flag=True, help="Round to nearest, without any text.")
@click.option("--force", is_flag=True, help="Replace builds that exist.")
@common_options
def convert(
    checkpoint: str,
    output: Path,
    recipe: str,
    formats: tuple[str, ...],
    texts: tuple[Path, ...],
    tokens: int,
    sequence: int,
    uncalibrated: bool,
    force: bool,
    threads: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize a checkpoint once and write a build for each format.

    Every weight is quantized for the inputs it sees in the calibration text, each expert for
    those of its own tokens. Without --text the sample's calibration text is used.
    """
    if uncalibrated and texts:
        raise click.UsageError("--text and --uncalibrated exclude each other")
    started = time.monotonic()
    opened, loaded = _open(checkpoint, quiet=quiet), load_recipe(recipe)
    resolved = resolve_plan(opened.geometry, loaded)
    chosen = _chosen(formats)
    plan_layouts(opened, resolved, chosen)
    calibration = None
    if not uncalibrated:
        windows = _load_text(opened, texts, "calibration.jsonl", tokens, sequence)
        calibration = Calibration(windows)
    with show_progress("quantizing", quiet=quiet) as progress:
        builds = convert_checkpoint(
            opened,
            loaded,
            resolved,
            chosen,
            output,
            calibration=calibration,
            force=force,
            threads=threads,
            progress=progress,
        )
    if as_json:
        _print_json(
            {
                "builds": [build.to_json() for build in builds],
                "seconds": time.monotonic() - started,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "tokens": calibration.windows.tokens if calibration else 0,
                **(calibration.to_json() if calibration else {}),
            }
        )
        return
    if calibration is not None:
        _print_tables(coverage_table(calibration))
    _print_tables(builds_table(builds))


@main.command(epilog=_example("lfmq verify builds/lfm2moe-tiny-int4.gguf"))
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no tables.")
def verify(builds: tuple[Path, ...], as_json: bool) -> None:
    """Check that builds hold the bytes their manifest says."""
    found = [{"path": str(b), "manifest": str(verify_build(b)), "intact": True} for b in builds]
    if as_json:
        _print_json({"builds": found})
        return
    for build in found:
        click.echo(f"{build['path']}: intact, as {build['manifest']} says")


@main.command(epilog=_example("lfmq validate sample builds/*-int4.gguf --min-routing 0.97"))
@checkpoint_argument
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@text_options
@click.option(
    "--engine",
    type=click.Choice(["read"]),
    default="read",
    show_default=True,
    help="read: the file's weights through the reference forward.",
)
@click.option("--max-kld", type=float, help="Highest mean KL divergence allowed, nats a token.")
@click.option("--max-perplexity-ratio", type=float, help="Highest perplexity ratio allowed.")
@click.option("--min-routing", type=float, help="Lowest routing exact-set agreement allowed.")
@common_options
@click.pass_context
def validate(
    ctx: click.Context,
    checkpoint: str,
    builds: tuple[Path, ...],
    texts: tuple[Path, ...],
    tokens: int,
    sequence: int,
    engine: str,
    max_kld: float | None,
    max_perplexity_ratio: float | None,
    min_routing: float | None,
    threads: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare builds with their checkpoint: perplexity, KL divergence, routing.

    Every build is opened again and its weights run through the reference forward pass on the same
    tokens. Exits with status 3 when a threshold is missed. Without --text the sample's evaluation
    text is used.
    """
    opened = _open(checkpoint, quiet=quiet)
    _set_up_torch(threads, device)
    windows = _load_text(opened, texts, "evaluation.jsonl", tokens, sequence)
    with show_progress("validating", quiet=quiet) as progress:
        report = validate_builds(
            opened,
            builds,
            windows,
            thresholds=Thresholds(max_kld, max_perplexity_ratio, min_routing),
            device=device,
            progress=progress,
        )
    if as_json:
        _print_json(report.to_json())
    else:
        _print_tables(report_table(report))
        for f in report.failures:
            click.echo(f"missed: {f.path}: {f.figure} is {f.found:.6g}, limit {f.limit:.6g}")
    if not report.passed:
        ctx.exit(THRESHOLD_MISSED)


def _load_text(
    opened: Checkpoint, texts: tuple[Path, ...], default: str, tokens: int, sequence: int
) -> Windows:
    paths = texts or (sample_file(default),)
    return load_windows(paths, opened.assets, opened.geometry, tokens=tokens, sequence=sequence)


def _set_up_torch(threads: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValidationError("--device cuda: torch finds no CUDA device; use --device cpu")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
