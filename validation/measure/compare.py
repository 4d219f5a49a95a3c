"""Two builds of one checkpoint against each other, on the same tokens."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.model.forward import Model
from lfmq.converter.model.text import Windows
from lfmq.validation.measure.builds import Engine, EngineBuild, open_builds
from lfmq.validation.measure.figures import FIGURES, Figure, Values
from lfmq.validation.measure.report import Conditions, without_nan
from lfmq.validation.measure.runs import Comparison, run_reference
from lfmq.validation.measure.significance import Interval, bootstrap, mcnemar
from lfmq.validation.measure.validate import conditions_of
from lfmq.validation.parity.result import NOT_COMPARED, Parity

Better = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two builds.

    Attributes:
        figure: which.
        a: of the first build.
        b: of the second build.
        difference: b less a.
        interval: of the difference, from a bootstrap over windows of both at once.
    """

    figure: Figure
    a: float
    b: float
    difference: float
    interval: Interval

    @property
    def equal(self) -> bool:
        """Equal in every window."""
        return self.interval.low == self.interval.high == 0.0 == self.difference

    @property
    def better(self) -> Better | None:
        """The build the interval shows to be better; None when it holds zero, or is unknown."""
        if not self.interval.excludes(0.0):
            return None
        return "b" if (self.difference < 0) == self.figure.less_is_better else "a"

    def to_json(self) -> dict[str, Any]:
        """The object of ``figures``."""
        low, high = self.interval.low, self.interval.high
        return {
            "figure": self.figure.key,
            "a": self.a,
            "b": self.b,
            "difference": self.difference,
            "stderr": self.interval.stderr,
            "ci95": None if np.isnan(low) else [low, high],
            "better": self.better,
        }


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Positions where one build alone has the reference's most likely token.

    Attributes:
        only_a: positions.
        only_b: positions.
        p: of McNemar's exact test that both are as likely.
    """

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True, slots=True)
class PairedReport:
    """The result of :func:`compare`."""

    checkpoint: str
    conditions: Conditions
    tokens_scored: int
    a: EngineBuild
    b: EngineBuild
    figures: tuple[Difference, ...]
    top1: TopTokens
    parity: Parity = NOT_COMPARED

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq compare --json``."""
        document = {
            "checkpoint": self.checkpoint,
            "tokens_scored": self.tokens_scored,
            "conditions": asdict(self.conditions),
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "figures": [figure.to_json() for figure in self.figures],
            "top1": asdict(self.top1),
            "parity": self.parity.to_json(),
        }
        return {key: without_nan(value) for key, value in document.items()}


def compare(
    checkpoint: Checkpoint,
    first: Path,
    second: Path,
    windows: Windows,
    *,
    engine: Engine = "read",
    allow_other: bool = False,
    execution: Execution = Execution(),
) -> PairedReport:
    """Run two builds on the same tokens; what differs, and whether that is more than chance.

    Args:
        checkpoint: the reference of both.
        first: build a.
        second: build b.
        windows: the tokens.
        engine: what runs both.
        allow_other: compare builds of other checkpoints too; the report names them.
        execution: threads of a native runtime, the device of the reference forward, and whom to
            tell of layers and windows.

    Raises:
        ValidationError: a build cannot be read or is of another model, or a runtime fails.
    """
    threads, device = execution.threads, execution.device
    report = execution.counter("comparing", "step")
    builds = open_builds((first, second), (engine,), checkpoint, allow_other=allow_other)
    layers = checkpoint.config.num_hidden_layers
    each = len(windows.ids) if engine == "native" else layers

    def advance(step: int, _: int) -> None:
        report(step, layers + 2 * each)

    model = Model(checkpoint.config, checkpoint.read, device=device)
    reference = run_reference(model, windows, progress=advance)
    a, b = (
        build.run(reference, threads=threads, device=device, progress=advance) for build in builds
    )
    only_a = int((a.scores.same_top & ~b.scores.same_top).sum())
    only_b = int((b.scores.same_top & ~a.scores.same_top).sum())
    return PairedReport(
        checkpoint=checkpoint.assets.name,
        conditions=conditions_of(windows, threads, device),
        tokens_scored=int(a.scores.kld.size),
        a=builds[0],
        b=builds[1],
        figures=differences(a, b),
        top1=TopTokens(only_a, only_b, mcnemar(only_a, only_b)),
    )


def differences(a: Comparison, b: Comparison) -> tuple[Difference, ...]:
    """Every compared figure that both runs beside the same reference have."""
    found = []
    for figure in FIGURES:
        if not figure.compared or figure.mean is None:
            continue
        values = figure.mean.values(a), figure.mean.values(b)
        if values[0] is not None and values[1] is not None:
            found.append(_difference(figure, figure.mean.transform, values[0], values[1]))
    return tuple(found)


def _difference(figure: Figure, of: Callable[[Any], Any], a: Values, b: Values) -> Difference:
    """The difference of ``of`` the means of [W, P] values."""
    means = [float(of(np.asarray(v, np.float64).mean())) for v in (a, b)]
    interval = bootstrap(a, b, transform=lambda p, q: of(q) - of(p))
    return Difference(figure, means[0], means[1], means[1] - means[0], interval)
