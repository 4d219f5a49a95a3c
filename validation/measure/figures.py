"""The table of figures: everything that a report says about a figure, once.

JSON, terminal tables, the Markdown table, the page, ``lfmq compare`` and the release gate read
this table. A new figure is a row here; a figure of the predictions also needs its value at each
position, in :class:`lfmq.validation.measure.predictions.PositionScores`.

W windows, P scored positions a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch comes with it, and the command line's options need this table alone
    from lfmq.validation.measure.runs import Comparison

Kind = Literal["nats", "ratio", "share", "percent", "perplexity", "bits", "count", "number"]
Values = NDArray[Any]

# Where a figure stands beside a build's object. The noise floor has the figures of domains.
Scope = Literal["domain", "position", "layer"]


def _identity(mean: Any) -> Any:
    return mean


def _exp(mean: Any) -> Any:
    """Infinite where a double ends: the perplexity of a broken build has no bound."""
    with np.errstate(over="ignore"):
        return np.exp(mean)


@dataclass(frozen=True, slots=True)
class PositionMean:
    """A figure that depends on the mean of one value at each position.

    Attributes:
        values: [W, P]; None where a run has none.
        transform: makes the figure of the mean.
    """

    values: Callable[[Comparison], Values | None]
    transform: Callable[[Any], Any] = _identity


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One figure of a build.

    Attributes:
        key: its place in a build's object of the JSON, keys joined by dots.
        title: its name in every table, page and message.
        kind: its unit and how it is written.
        meaning: a definition, for readers of a report.
        less_is_better: which way is nearer to the reference.
        mean: how it follows from a value at each position.
        of: how it follows from a run, for figures without ``mean``; None where a run lacks it.
        scopes: where it stands beside a build's object.
        stem: before ``stderr`` and ``ci95`` in the JSON; empty for figures without an interval.
            Such a figure is held to the gate's baseline and drawn with its interval.
        stderr_of_windows: the standard error is that of the windows' means, not of the bootstrap;
            domains and the noise floor state it too.
        compared: ``lfmq compare`` holds two builds against each other in it.
        in_tables: a column of the parity tables.
        routing: only a model with experts has it.
        limits: its limits in TOML; that of ``max_kld`` on the command line is ``--max-kld``.
        missing: why a run may lack it, for the gate.
    """

    key: str
    title: str
    kind: Kind
    meaning: str = ""
    less_is_better: bool = False
    mean: PositionMean | None = None
    of: Callable[[Comparison], float | None] | None = None
    scopes: tuple[Scope, ...] = ()
    stem: str = ""
    stderr_of_windows: bool = False
    compared: bool = False
    in_tables: bool = False
    routing: bool = False
    limits: tuple[str, ...] = ()
    missing: str = ""

    @property
    def flat_key(self) -> str:
        """Its key in a domain, a range of positions and the noise floor."""
        return self.key.replace(".", "_")

    @property
    def layer_key(self) -> str:
        """Its key in a layer, also the attribute of a ``LayerRouting``."""
        return self.key.rpartition(".")[2]

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, nats" if self.kind == "nats" else self.title

    def read(self, value: Any) -> float | None:
        """The figure of a typed value whose attributes are named as the key."""
        found: float | None = attrgetter(self.key)(value)
        return found


KLD = Figure(
    "kld.mean",
    "mean KLD",
    "nats",
    "The Kullback-Leibler divergence of the build's next-token distribution from the reference's, "
    "in nats per token. 0 means that both are identical.",
    less_is_better=True,
    mean=PositionMean(lambda run: run.scores.kld),
    scopes=("domain", "position"),
    stem="kld.",
    stderr_of_windows=True,
    compared=True,
    in_tables=True,
    limits=("max_kld",),
)
KLD_MEDIAN = Figure(
    "kld.median",
    "median KLD",
    "nats",
    less_is_better=True,
    of=lambda run: float(np.median(run.scores.kld)),
)
KLD_P99 = Figure(
    "kld.p99",
    "99th percentile KLD",
    "nats",
    less_is_better=True,
    of=lambda run: float(np.quantile(run.scores.kld, 0.99)),
    limits=("max_kld_p99",),
)
KLD_MAX = Figure(
    "kld.max",
    "largest KLD",
    "nats",
    less_is_better=True,
    of=lambda run: float(run.scores.kld.max()),
)
PERPLEXITY = Figure(
    "perplexity",
    "perplexity",
    "perplexity",
    less_is_better=True,
    mean=PositionMean(lambda run: run.scores.nll, _exp),
    compared=True,
)
PERPLEXITY_RATIO = Figure(
    "perplexity_ratio",
    "perplexity ratio",
    "ratio",
    "The build's perplexity divided by the reference's.",
    less_is_better=True,
    mean=PositionMean(lambda run: run.scores.nll - run.scores.reference_nll, _exp),
    scopes=("domain",),
    stem="perplexity_ratio_",
    in_tables=True,
    limits=("max_perplexity_ratio",),
)
TOP1 = Figure(
    "top1_agreement",
    "top-1 agreement",
    "share",
    "The share of positions where build and reference have the same most likely next token.",
    mean=PositionMean(lambda run: run.scores.same_top),
    scopes=("domain", "position"),
    stem="top1_",
    compared=True,
    in_tables=True,
    limits=("min_top1",),
)
# As llama.cpp's perplexity tool reports it (tools/perplexity/README.md).
RMS_DELTA_P = Figure(
    "rms_delta_p",
    "RMS Δp",
    "percent",
    "The root mean square of the change in the probability of the token that follows. In the JSON "
    "and in limits it is a fraction.",
    less_is_better=True,
    mean=PositionMean(lambda run: run.scores.delta_p**2, np.sqrt),
    scopes=("domain",),
    stem="rms_delta_p_",
    compared=True,
    in_tables=True,
    limits=("max_rms_delta_p",),
)
ROUTING = Figure(
    "routing.exact_set",
    "routing agreement",
    "share",
    "The share of (token, layer) pairs whose set of selected experts equals the reference's.",
    mean=PositionMean(lambda run: run.same_sets),
    scopes=("domain", "position", "layer"),
    stem="routing.",
    compared=True,
    in_tables=True,
    routing=True,
    limits=("min_routing",),
)
JACCARD = Figure(
    "routing.jaccard",
    "mean Jaccard index of expert sets",
    "share",
    of=lambda run: None if run.routing is None else run.routing.jaccard,
    routing=True,
)
LOCAL_ROUTING = Figure(
    "routing.local_exact_set",
    "local routing agreement",
    "share",
    "Routing agreement when each router of the runtime reads the reference's hidden states. It "
    "tests the runtime's routing rule alone.",
    of=lambda run: None if run.routing is None else run.routing.local_exact_set,
    scopes=("layer",),
    in_tables=True,
    routing=True,
    limits=("min_local_routing",),
    missing="only --engine native measures it",
)
LOAD_SHIFT = Figure(
    "load_shift",
    "shift of the expert load",
    "nats",
    less_is_better=True,
    scopes=("layer",),
    routing=True,
)

FIGURES = (
    *(KLD, KLD_MEDIAN, KLD_P99, KLD_MAX),
    *(PERPLEXITY, PERPLEXITY_RATIO, TOP1, RMS_DELTA_P),
    *(ROUTING, JACCARD, LOCAL_ROUTING, LOAD_SHIFT),
)

# Of each mode of the generation check; keys are places in :class:`GenerationFigures`.
GENERATION_FIGURES = (
    Figure("answers.accuracy", "right answers", "share", limits=("min_answers",)),
    Figure("tools.valid", "valid tool calls", "share", limits=("min_tool_valid",)),
    Figure("tools.right_function", "right function", "share", limits=("min_tool_function",)),
    Figure("tools.right_arguments", "right arguments", "share", limits=("min_tool_arguments",)),
    Figure("capped", "answers at the length cap", "share", limits=("max_capped",)),
    Figure("looped", "answers that loop", "share", limits=("max_looped",)),
    Figure("longest_repeat.max", "longest repeat, tokens", "count", limits=("max_repeat",)),
    Figure(
        "longest_repeat.mean", "mean longest repeat, tokens", "number", limits=("max_mean_repeat",)
    ),
    Figure(
        "length_ratio", "length ratio", "ratio", limits=("min_length_ratio", "max_length_ratio")
    ),
    Figure("same_text", "same text", "share", limits=("min_same_text",)),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured figure.

    Attributes:
        value: the figure.
        stderr: its standard error; None where none is stated, not a number with one window.
        ci95: ends of its 95 % interval; None where there is none.
    """

    value: float
    stderr: float | None = None
    ci95: tuple[float, float] | None = None


# What was measured; a figure that is not in it was not.
Estimates = Mapping[Figure, Estimate]


def figures_of(scope: Scope) -> tuple[Figure, ...]:
    """The figures that stand in each domain, range of positions or layer."""
    return tuple(figure for figure in FIGURES if scope in figure.scopes)


def limits_of(figures: tuple[Figure, ...]) -> dict[str, Figure]:
    """The figure of each limit."""
    return {limit: figure for figure in figures for limit in figure.limits}
