"""Options that several commands share, handed to each as one value."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click
import torch

from lfmq.commands.progress import show_progress
from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import locate_checkpoint, sample_file
from lfmq.converter.model.text import Windows, load_windows
from lfmq.converter.plan.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from lfmq.converter.statistics.balance import Balanced
from lfmq.converter.statistics.balance import balance as choose_balanced
from lfmq.converter.statistics.calibrate import open_statistics
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.build import Format
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import RecipeError, ValidationError
from lfmq.validation.gate.thresholds import LIMITS, Thresholds, load_thresholds, sense_of
from lfmq.validation.measure.report import Report
from lfmq.validation.pages.files import check_writable, write_report
from lfmq.validation.pages.markdown import render_markdown
from lfmq.validation.pages.page import render_page
from lfmq.validation.tasks.run import Checks, prepare_checks

Command = Callable[..., Any]


def _packed(name: str, kind: type, *decorators: Command) -> Command:
    """Options that commands share, handed over as one value."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def unpack(**given: Any) -> Any:
            value = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            return command(**{name: value}, **given)

        return reduce(lambda f, d: d(f), reversed(decorators), unpack)

    return decorate


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    threads: int
    device: str
    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValidationError("--device cuda: torch finds no CUDA device; use --device cpu")

    def notice(self, line: str) -> None:
        """A line about how the work goes."""
        if not self.quiet:
            click.echo(line, err=True)

    def open(self, reference: str) -> Checkpoint:
        """The checkpoint, fetched with a bar on a terminal."""
        location = locate_checkpoint(reference, bars=sys.stderr.isatty() and not self.quiet)
        return open_checkpoint(location.folder, location.name)


@dataclass(frozen=True)
class Text:
    """Text and how much of it."""

    texts: tuple[Path, ...]
    tokens: int
    sequence: int

    def windows(self, opened: Checkpoint, default: str) -> Windows:
        """Its tokens; without a text those of a file of the sample."""
        paths = self.texts or (sample_file(default),)
        return load_windows(
            paths, opened.assets, opened.config, tokens=self.tokens, sequence=self.sequence
        )


@dataclass(frozen=True)
class Reports:
    """Files that a validation is also written to."""

    html: Path | None
    markdown: Path | None

    def check(self) -> None:
        """Refuse names that cannot be written, before the work."""
        check_writable(self.html, self.markdown)

    def write(self, report: Report) -> None:
        """Write those that were asked for."""
        if self.html is not None:
            write_report(self.html, render_page(report))
        if self.markdown is not None:
            write_report(self.markdown, render_markdown(report))


@dataclass(frozen=True)
class Wanted:
    """Which builds."""

    recipe: str
    formats: tuple[str, ...]
    budget: str | None
    budget_bytes: str | None
    budget_token_bytes: str | None
    statistics: Path | None

    @property
    def base(self) -> Recipe:
        """The recipe, with the limits of options in place of its own."""
        recipe = load_recipe(self.recipe)
        every = {"budget": self.budget_bytes, "token_budget": self.budget_token_bytes}
        given = {key: value for key, value in every.items() if value is not None}
        if given and self.budget is not None:
            raise RecipeError(
                "--budget chooses among experts alone; give --budget-bytes in its place"
            )
        if given:
            return recipe.limited(**given, choose="all")
        return recipe if self.budget is None else recipe.limited(budget=self.budget)

    @property
    def chosen(self) -> dict[str, Format]:
        """The containers asked for by name; default: all."""
        return {name: FORMATS[name] for name in (self.formats or FORMATS)}

    def known(self, opened: Checkpoint) -> Statistics | None:
        """The statistics file, if one was given."""
        return open_statistics(self.statistics, opened.config) if self.statistics else None


@dataclass(frozen=True)
class Asked:
    """What builds are asked to write."""

    tasks: Path | None
    task_count: int | None
    task_runs: int
    new_tokens: int

    def checks(self, opened: Checkpoint) -> Checks | None:
        """The tasks, if a file was given."""
        if self.tasks is None:
            return None
        return prepare_checks(
            opened,
            self.tasks,
            count=self.task_count,
            new_tokens=self.new_tokens,
            runs=self.task_runs,
        )


@dataclass(frozen=True)
class Gate:
    """What a build must reach."""

    thresholds: Path | None
    limits: Mapping[str, float | None]

    def stated(self, windows: Windows, *, experts: bool) -> Thresholds:
        """The file's limits, those of options in their place; both are for these tokens.

        Args:
            windows: the tokens.
            experts: whether the model has any.
        """
        given = Thresholds() if self.thresholds is None else load_thresholds(self.thresholds)
        given.check_text(windows.text_sha256, windows.tokens, windows.ids.shape[1])
        found = given.with_limits(**self.limits)
        found.check_experts(experts)
        return found


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


common_options = _packed(
    "common",
    Common,
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
plan_options = _packed(
    "wanted",
    Wanted,
    click.option(
        "--recipe",
        default=DEFAULT_RECIPE,
        show_default=True,
        help="A built-in recipe (int8, int4, int4-all, int4-mixed, int4-fast) or a TOML file.",
    ),
    click.option(
        "--to",
        "formats",
        type=click.Choice(sorted(FORMATS)),
        multiple=True,
        help="Container to write; may be repeated. Default: all.",
    ),
    click.option(
        "--budget",
        help="Size of each build (6.1GB, 5800MiB, 5.69bpw); as far as it goes experts get 8 bits.",
    ),
    click.option(
        "--budget-bytes",
        metavar="SIZE",
        help="Size of each build; every weight gets the grid that serves it best (also q4_k_m).",
    ),
    click.option(
        "--budget-token-bytes",
        metavar="SIZE",
        help="The same for the bytes of weights that are read for a token; both may be given.",
    ),
    click.option(
        "--statistics",
        type=click.Path(path_type=Path),
        help="What lfmq calibrate found, or an imatrix of llama.cpp.",
    ),
)
balance_option = click.option(
    "--balance",
    type=click.IntRange(1),
    metavar="N",
    help="Choose the windows from N tokens of the text, so that every expert gets its quota.",
)
report_options = _packed(
    "reports",
    Reports,
    click.option(
        "--html",
        type=click.Path(path_type=Path),
        help="Also write the report as one page for a browser; it needs no network.",
    ),
    click.option(
        "--markdown",
        type=click.Path(path_type=Path),
        help="Also write the parity table for a model card.",
    ),
)
text_options = _packed(
    "text",
    Text,
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
task_options = _packed(
    "asked",
    Asked,
    click.option(
        "--tasks",
        type=click.Path(path_type=Path),
        help="JSONL of chat tasks; checkpoint and builds do them, greedy and sampled.",
    ),
    click.option(
        "--task-count", type=click.IntRange(1), metavar="N", help="Only the first N tasks."
    ),
    click.option(
        "--task-runs",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="Sampled answers to each task.",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        metavar="N",
        help="Most tokens of an answer.",
    ),
)


def gate_options(command: Command) -> Command:
    """A file of limits, and an option for each limit in the table of figures."""

    @wraps(command)
    def unpack(**given: Any) -> Any:
        limits = {key: given.pop(key) for key in LIMITS}
        return command(gate=Gate(given.pop("thresholds"), limits), **given)

    options = [
        click.option(
            f"--{key.replace('_', '-')}",
            type=float,
            help=f"{'Highest' if sense_of(key) == 'max' else 'Lowest'} {figure.heading}.",
        )
        for key, figure in LIMITS.items()
    ]
    thresholds = click.option(
        "--thresholds",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of limits; options take their place.",
    )
    return reduce(lambda f, option: option(f), reversed([thresholds, *options]), unpack)


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Work on a running Ray cluster; every machine sees the folders under the same paths.",
)
engine_choice = click.Choice(["read", "native"])


def calibration_text(
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
