"""The command line: each command parses, calls one library function and prints."""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lfmq.converter.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.convert import convert as convert_checkpoint
from lfmq.converter.convert import plan_layouts
from lfmq.converter.inspect import inspect_checkpoint
from lfmq.converter.locate import locate_checkpoint
from lfmq.converter.manifest import verify_build
from lfmq.converter.plan import bits_per_weight, resolve_plan, summarize, token_bytes
from lfmq.converter.recipe import DEFAULT_RECIPE, load_recipe
from lfmq.formats.build import Format
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import LfmqError, UnsupportedError

THRESHOLD_MISSED = 3

Command = Callable[..., Any]


class Commands(click.Group):
    """The one place where library errors become a line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        try:
            return super().invoke(ctx)
        except LfmqError as error:
            raise click.ClickException(str(error)) from error
        except MemoryError as error:
            raise click.ClickException("out of memory; use fewer --threads") from error
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'i/o'}: {error.strerror}") from error


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


@click.group(cls=Commands, context_settings={"max_content_width": 100})
@click.version_option(package_name="lfmq")
def main() -> None:
    """Turn an LFM2 mixture-of-experts checkpoint into GGUF, MLX and ONNX builds, and prove them.

    CHECKPOINT is a folder with config.json and safetensors, the word 'sample', or a Hub id
    org/name[@revision].

    \b
    Example:
        lfmq convert sample --output builds
    """


def _open(reference: str) -> Checkpoint:
    return open_checkpoint(locate_checkpoint(reference))


def _chosen(formats: tuple[str, ...]) -> dict[str, Format]:
    return {name: FORMATS[name] for name in (formats or FORMATS)}


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False))


def _print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def _progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line for each tenth."""
    console = Console(stderr=True)
    if quiet:
        yield lambda step, total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda step, total: bar.update(task, advance=step, total=total)
    else:
        yield _line_printer(label)


def _line_printer(label: str) -> Callable[[int, int], None]:
    done = 0

    def advance(step: int, total: int) -> None:
        nonlocal done
        before, done = 10 * done // total, done + step
        if 10 * done // total > before:
            click.echo(f"{label}: {100 * done // total} %", err=True)

    return advance


@main.command()
@checkpoint_argument
@common_options
def inspect(checkpoint: str, threads: int, device: str, as_json: bool, quiet: bool) -> None:
    """Show what a checkpoint is: roles, weights, bytes, dtypes, and what is odd.

    \b
    Example:
        lfmq inspect sample
    """
    report = inspect_checkpoint(_open(checkpoint))
    if as_json:
        _print_json(report.to_json())
        return
    rows = [
        (r.role, f"{r.tensors:,}", f"{r.weights:,}", f"{r.nbytes:,}", r.dtypes)
        for r in report.roles
    ]
    rows.append(("total", f"{report.tensors:,}", f"{report.weights:,}", f"{report.nbytes:,}", ""))
    _print_table(report.title, ("role", "tensors", "weights", "bytes", "dtype"), rows)
    for line in report.odd:
        click.echo(f"odd: {line}")


@main.command()
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
    """Dry run: the scheme of every tensor and the size of every build; reads no weight.

    \b
    Example:
        lfmq plan sample --recipe int4 --to gguf
    """
    opened = _open(checkpoint)
    resolved = resolve_plan(opened.geometry, load_recipe(recipe))
    builds = [_plan_build(opened, resolved, name) for name in _chosen(formats)]
    listed = [{"name": e.name, "shape": e.shape, "storage": str(e.storage)} for e in resolved.entries]
    if as_json:
        _print_json({"recipe": recipe, "builds": builds, "tensors": listed})
        return
    roles = [
        (s.role.value, str(s.storage), f"{s.tensors:,}", f"{s.weights:,}")
        for s in summarize(resolved)
    ]
    _print_table(f"{recipe}", ("role", "stored as", "tensors", "weights"), roles)
    _print_table("builds", ("format", "bytes", "bits/weight", "bytes/token"), [_row(b) for b in builds])
    for build in builds:
        if "refused" in build:
            click.echo(f"{build['format']}: {build['refused']}")
    if tensors:
        rows = [(t["name"], str(list(t["shape"])), t["storage"]) for t in listed]
        _print_table("tensors", ("tensor", "shape", "stored as"), rows)


def _plan_build(opened: Checkpoint, resolved: Any, name: str) -> dict[str, Any]:
    try:
        layout = plan_layouts(opened, resolved, {name: FORMATS[name]})[name]
    except UnsupportedError as error:
        return {"format": name, "refused": str(error)}
    return {
        "format": name,
        "bytes": layout.nbytes,
        "bits_per_weight": bits_per_weight(resolved, layout.nbytes),
        "bytes_per_token": token_bytes(resolved, layout),
    }


def _row(build: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in build:
        return (build["format"], "refused", "", "")
    return (
        build["format"],
        f"{build['bytes']:,}",
        f"{build['bits_per_weight']:.3f}",
        f"{build['bytes_per_token']:,}",
    )


@main.command()
@checkpoint_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the builds.",
)
@plan_options
@click.option("--uncalibrated", is_flag=True, help="Quantize without statistics.")
@click.option("--force", is_flag=True, help="Replace builds that exist.")
@common_options
def convert(
    checkpoint: str,
    output: Path,
    recipe: str,
    formats: tuple[str, ...],
    uncalibrated: bool,
    force: bool,
    threads: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize a checkpoint once and write a build for each format.

    \b
    Example:
        lfmq convert sample --output builds --recipe int4 --to gguf --to onnx
    """
    started = time.monotonic()
    opened, loaded = _open(checkpoint), load_recipe(recipe)
    resolved = resolve_plan(opened.geometry, loaded)
    with _progress("quantizing", quiet=quiet or as_json) as progress:
        builds = convert_checkpoint(
            opened,
            loaded,
            resolved,
            _chosen(formats),
            output,
            force=force,
            threads=threads,
            progress=progress,
        )
    if as_json:
        _print_json(
            {
                "builds": [
                    {
                        "format": b.format,
                        "path": str(b.path),
                        "bytes": b.nbytes,
                        "bits_per_weight": b.bits_per_weight,
                    }
                    for b in builds
                ],
                "seconds": time.monotonic() - started,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "tokens": 0,
            }
        )
        return
    rows = [(b.format, f"{b.nbytes:,}", f"{b.bits_per_weight:.3f}", str(b.path)) for b in builds]
    _print_table("builds", ("format", "bytes", "bits/weight", "path"), rows)


@main.command()
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no tables.")
def verify(builds: tuple[Path, ...], as_json: bool) -> None:
    """Check that builds hold the bytes their manifest says.

    \b
    Example:
        lfmq verify builds/lfm2moe-tiny-int4.gguf
    """
    found = [{"path": str(b), "manifest": str(verify_build(b)), "intact": True} for b in builds]
    if as_json:
        _print_json({"builds": found})
        return
    for build in found:
        click.echo(f"{build['path']}: intact, as {build['manifest']} says")


def _exit(status: int) -> NoReturn:
    raise click.exceptions.Exit(status)


if __name__ == "__main__":
    main()
