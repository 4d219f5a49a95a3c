"""What a validation found and its JSON; docs/validation.md has every key."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lfmq.validation.measure.figures import (
    FIGURES,
    LOCAL_ROUTING,
    ROUTING,
    Estimate,
    Estimates,
    Figure,
    Kind,
)
from lfmq.validation.measure.generation import GenerationFigures
from lfmq.validation.measure.metadata import Fact
from lfmq.validation.measure.routing import RoutingAgreement
from lfmq.validation.parity.result import NOT_COMPARED, Parity


@dataclass(frozen=True, slots=True)
class Histogram:
    """Positions by the decimal logarithm of a value; counts lie between the edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PositionRange:
    """Figures at positions of the window from ``start`` to before ``stop``."""

    start: int
    stop: int
    figures: Estimates

    def to_json(self) -> dict[str, Any]:
        """An object of ``positions``."""
        return {"from": self.start, "to": self.stop, **_flat(self.figures)}


@dataclass(frozen=True, slots=True)
class LayerDivergence:
    """Mean KL divergence when only this layer's weights are the build's."""

    layer: int
    kld_mean: float


@dataclass(frozen=True, slots=True)
class ExpertError:
    """One expert's weights.

    Attributes:
        layer: index in the model.
        expert: index in the layer.
        tokens: scored tokens the reference sent to it.
        error: norm of what the build's three matrices differ by, over the norm of the reference's.
    """

    layer: int
    expert: int
    tokens: int
    error: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where a build's divergence comes from.

    Attributes:
        embedding_kld: mean KL divergence when only the embedding, also the head, is the build's.
        layers: the same for each layer.
        experts: errors of weights.
    """

    embedding_kld: float
    layers: tuple[LayerDivergence, ...]
    experts: tuple[ExpertError, ...]

    def to_json(self) -> dict[str, Any]:
        """Keys of a build's object."""
        return {
            "embedding_kld": self.embedding_kld,
            "layers_kld": [asdict(layer) for layer in self.layers],
            **({"experts": [asdict(e) for e in self.experts]} if self.experts else {}),
        }


@dataclass(frozen=True, slots=True)
class BuildReport:
    """One build in one engine against the reference.

    Attributes:
        path: the build.
        format: its container.
        engine: what ran it; ``read`` is the reference forward with the file's weights.
        engine_version: of the engine.
        nbytes: size of all its files.
        bits_per_weight: of all its files.
        figures: over all scored positions.
        histogram: of the KL divergence, decimal logarithm of nats.
        routing: by layer and by margin; None for a model without experts.
        domains: by domain of the text.
        positions: by place in the window.
        facts: metadata that differs from the checkpoint's.
        attribution: by layer and expert, if it was asked for.
        generation: what generation checks found by mode, if they ran.
        warnings: known faults of the engine.
        other: why it is not a build of the checkpoint, where that was allowed; else empty.
    """

    path: str
    format: str
    engine: str
    engine_version: str
    nbytes: int
    bits_per_weight: float
    figures: Estimates
    histogram: Histogram
    routing: RoutingAgreement | None
    domains: Mapping[str, Estimates]
    positions: tuple[PositionRange, ...]
    facts: tuple[Fact, ...] = ()
    attribution: Attribution | None = None
    generation: Mapping[str, GenerationFigures] | None = None
    warnings: tuple[str, ...] = ()
    other: str = ""

    def value(self, figure: Figure) -> float | None:
        """A figure over all positions; None if it was not measured or is not a number."""
        return value_in(self.figures, figure)

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq validate --json``."""
        document: dict[str, Any] = {
            "path": self.path,
            "format": self.format,
            "engine": self.engine,
            "engine_version": self.engine_version,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "other_checkpoint": self.other or None,
        }
        if self.routing is not None:  # null, not absent, for an engine that does not measure it
            _put(document, LOCAL_ROUTING.key, None)
        for figure, found in self.figures.items():
            _put(document, figure.key, found.value)
            if figure.stem:
                _put(document, f"{figure.stem}stderr", found.stderr)
                _put(document, f"{figure.stem}ci95", _ends(found))
        _put(document, "kld.histogram", asdict(self.histogram))
        if self.routing is not None:
            document["routing"]["layers"] = [asdict(layer) for layer in self.routing.layers]
            document["routing"]["margins"] = [asdict(margin) for margin in self.routing.margins]
        generation = self.generation
        return document | {
            "domains": {domain: _flat(found) for domain, found in self.domains.items()},
            "positions": [found.to_json() for found in self.positions],
            **(self.attribution.to_json() if self.attribution is not None else {}),
            **({"generation": _modes(generation)} if generation is not None else {}),
            "facts": [asdict(fact) for fact in self.facts],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """A figure of a build that misses its limit.

    Attributes:
        path: the build.
        engine: what ran it.
        figure: its place in the build's JSON.
        found: the figure; None if it was not measured or is not a number.
        limit: what it was held to.
        why: what the limit is, in words.
        title: the figure's name, its domain or mode included.
        kind: how the figure is written; None for metadata, tokenizers and templates.
    """

    path: str
    engine: str
    figure: str
    found: float | None
    limit: float | None
    why: str
    title: str
    kind: Kind | None

    def __str__(self) -> str:
        if self.kind is None:
            return f"{self.path} ({self.engine}): {self.title} is not the checkpoint's: {self.why}"
        found = "not measured" if self.found is None else f"{self.found:.6g}"
        limit = "" if self.limit is None else f", limit {self.limit:.6g}"
        return f"{self.path} ({self.engine}): {self.title} is {found}{limit}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """An object of ``failures``."""
        return {
            "path": self.path,
            "engine": self.engine,
            "figure": self.figure,
            "found": self.found,
            "limit": self.limit,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The reference's own weights in bfloat16 arithmetic against float32.

    Attributes:
        figures: those that domains have too, over all scored positions.
        domains: by domain of the text.
        layers: routing agreement by layer; empty for a model without experts.
        positions: by place in the window.
    """

    figures: Estimates
    domains: Mapping[str, Estimates]
    layers: Mapping[int, float]
    positions: tuple[PositionRange, ...]

    def value(self, figure: Figure) -> float | None:
        """A figure over all positions; None if it was not measured or is not a number."""
        return value_in(self.figures, figure)

    def to_json(self) -> dict[str, Any]:
        """The object ``noise_floor``."""
        layers = [{"layer": n, ROUTING.layer_key: share} for n, share in self.layers.items()]
        return {
            **_flat(self.figures),
            "domains": {domain: _flat(found) for domain, found in self.domains.items()},
            **({"layers": layers} if layers else {}),
            "positions": [found.to_json() for found in self.positions],
        }


@dataclass(frozen=True, slots=True)
class Conditions:
    """What figures depend on beside the weights."""

    lfmq: str
    torch: str
    threads: int
    device: str
    sequence: int
    tokens: int
    text_sha256: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of :func:`lfmq.validation.measure.validate.validate`."""

    checkpoint: str
    conditions: Conditions
    tokens_scored: int
    reference_perplexity: float
    noise_floor: NoiseFloor
    builds: tuple[BuildReport, ...]
    failures: tuple[Failure, ...] = ()
    parity: Parity = NOT_COMPARED

    @property
    def passed(self) -> bool:
        """No limit was missed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq validate --json``; what is not a number is null."""
        document = {
            "checkpoint": self.checkpoint,
            "text_sha256": self.conditions.text_sha256,
            "tokens_scored": self.tokens_scored,
            "conditions": asdict(self.conditions),
            "reference": {"perplexity": self.reference_perplexity},
            "noise_floor": self.noise_floor.to_json(),
            "builds": [build.to_json() for build in self.builds],
            "passed": self.passed,
            "failures": [failure.to_json() for failure in self.failures],
            "parity": self.parity.to_json(),
        }
        return {key: without_nan(value) for key, value in document.items()}


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: the standard error of a single window is unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return value


def columns_of(report: Report) -> tuple[Figure, ...]:
    """The figures of the parity tables: those that any build has."""
    return tuple(
        figure
        for figure in FIGURES
        if figure.in_tables and any(figure in build.figures for build in report.builds)
    )


def value_in(figures: Estimates, figure: Figure) -> float | None:
    """A figure's value; None if it was not measured or is not a number."""
    found = figures.get(figure)
    return None if found is None or not math.isfinite(found.value) else found.value


def _ends(found: Estimate) -> list[float] | None:
    """Null when there is one window only."""
    return None if found.ci95 is None or math.isnan(found.ci95[0]) else list(found.ci95)


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set what is at a place such as ``kld.mean``."""
    *parents, last = key.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
    document[last] = value


def _flat(figures: Estimates) -> dict[str, Any]:
    """Figures of a part of the positions, with the standard errors that are known."""
    found: dict[str, Any] = {}
    for figure, estimate in figures.items():
        found[figure.flat_key] = estimate.value
        if estimate.stderr is not None:
            found[f"{figure.stem}stderr".replace(".", "_")] = estimate.stderr
    return found


def _modes(generation: Mapping[str, GenerationFigures]) -> dict[str, Any]:
    return {mode: found.to_json() for mode, found in generation.items()}
