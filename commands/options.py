"""Options that several commands share, spelled like the arguments of the library they set."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lfmq
from lfmq.converter.jobs.execution import (
    DEFAULT_MEMORY,
    Device,
    Execution,
    Progress,
    available_threads,
)
from lfmq.converter.plan.builtin import DEFAULT_RECIPE, builtin_recipes
from lfmq.formats.registry import FORMATS
from lfmq.quant.kernels import on_first_compile
from lfmq.validation.gate.thresholds import LIMITS, sense_of

if TYPE_CHECKING:
    from lfmq.converter.checkpoint.checkpoint import Checkpoint

Command = Callable[..., Any]


def _together(*decorators: Command) -> Command:
    """Options that commands share, as one decorator."""

    def decorate(command: Command) -> Command:
        return reduce(lambda f, add: add(f), reversed(decorators), command)

    return decorate


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    threads: int
    device: Device
    as_json: bool
    quiet: bool

    def notice(self, line: str) -> None:
        """A line about how the work goes."""
        if not self.quiet:
            click.echo(line, err=True)

    def execution(
        self,
        progress: Progress | None = None,
        *,
        memory: int = DEFAULT_MEMORY,
        cluster: str | None = None,
    ) -> Execution:
        """How the library runs work, and whom it tells."""
        return Execution(self.threads, self.device, cluster, memory, progress, self.notice)

    def open(self, reference: str) -> "Checkpoint":
        """The checkpoint, fetched with a bar on a terminal."""
        return lfmq.open_checkpoint(reference, bars=sys.stderr.isatty() and not self.quiet)


def common_options(command: Command) -> Command:
    """The options of every command, handed over as one value ``common``."""

    @wraps(command)
    def unpack(**given: Any) -> Any:
        common = Common(**{f.name: given.pop(f.name) for f in fields(Common)})
        on_first_compile(lambda: common.notice("compiling kernels, cached for next time"))
        return command(common=common, **given)

    decorated: Command = _common(unpack)
    return decorated


_common = _together(
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        default=available_threads,
        show_default="all cores",
        help="Number of threads. Results do not depend on it.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Device for matrix products.",
    ),
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of tables."
    ),
    click.option("--quiet", is_flag=True, help="Print no progress and no notices on stderr."),
)
plan_options = _together(
    click.option(
        "--recipe",
        default=DEFAULT_RECIPE,
        show_default=True,
        help=f"A built-in recipe ({', '.join(builtin_recipes())}) or a TOML file.",
    ),
    click.option(
        "--to",
        type=click.Choice(sorted(FORMATS)),
        multiple=True,
        help="Container to write; may be repeated. Default: all.",
    ),
    click.option(
        "--budget",
        metavar="SIZE",
        help="Maximum size of each build (6.1GB, 5800MiB, 5.69bpw). Experts are raised from 4 to "
        "8 bits, most useful first, until it is used up.",
    ),
    click.option(
        "--budget-bytes",
        metavar="SIZE",
        help="Maximum size of each build. Every weight gets the grid that serves it best within "
        "this size; also q4_k_m, for at most the size of llama.cpp's Q4_K_M.",
    ),
    click.option(
        "--budget-token-bytes",
        metavar="SIZE",
        help="Maximum number of bytes of weights read for each decoded token. Can be combined "
        "with --budget-bytes.",
    ),
    click.option(
        "--statistics",
        type=click.Path(path_type=Path),
        help="Statistics file from lfmq calibrate, or an importance matrix from llama.cpp.",
    ),
)
balance_option = click.option(
    "--balance",
    type=click.IntRange(1),
    metavar="N",
    help="Choose the windows among the first N tokens of the text, so that every expert gets the "
    "tokens it needs.",
)
report_options = _together(
    click.option(
        "--html",
        type=click.Path(path_type=Path),
        help="Also write the report as one HTML page, which loads nothing from the network.",
    ),
    click.option(
        "--markdown",
        type=click.Path(path_type=Path),
        help="Also write the table of figures for a model card.",
    ),
)
text_options = _together(
    click.option(
        "--text",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Plain text or JSONL file; may be repeated.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(1),
        default=32768,
        show_default=True,
        help="Number of tokens to take from the text.",
    ),
    click.option(
        "--sequence",
        type=click.IntRange(4),
        default=512,
        show_default=True,
        help="Window length in tokens.",
    ),
)
task_options = _together(
    click.option(
        "--tasks",
        type=click.Path(path_type=Path),
        help="JSONL file of chat tasks. The checkpoint and every build answer them, with greedy "
        "decoding and with sampling.",
    ),
    click.option(
        "--task-count", type=click.IntRange(1), metavar="N", help="Use only the first N tasks."
    ),
    click.option(
        "--task-runs",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="Number of sampled answers to each task.",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        metavar="N",
        help="Maximum number of tokens in an answer.",
    ),
)


def gate_options(command: Command) -> Command:
    """A file of limits, and an option for each limit in the table of figures."""
    options = [
        click.option(
            f"--{key.replace('_', '-')}",
            type=float,
            help=f"{'Maximum' if sense_of(key) == 'max' else 'Minimum'} {figure.heading}.",
        )
        for key, figure in LIMITS.items()
    ]
    thresholds = click.option(
        "--thresholds",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of limits. The options below replace its limits.",
    )
    decorated: Command = _together(thresholds, *options)(command)
    return decorated


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Run on a Ray cluster. Every machine must see the folders under the same paths.",
)
engine_choice = click.Choice(["read", "native"])
other_option = click.option(
    "--allow-other",
    is_flag=True,
    help="Also take builds that are not of this checkpoint (a fine-tune, other weights); the "
    "report says so.",
)
