"""What a validation found and its JSON; docs/validation.md has every key."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lfmq.validation.measure.metadata import Fact
from lfmq.validation.measure.routing import RoutingAgreement
from lfmq.validation.measure.significance import Interval

# What a generation check found, as docs/validation.md describes the key "generation".
Generation = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distribution of the KL divergence over scored positions, nats."""

    mean: float
    stderr: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Positions by the decimal logarithm of a value; counts lie between the edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one set of predictions compares with the reference's."""

    perplexity: float
    perplexity_ratio: float
    kld: Divergence
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class DomainAgreement:
    """A domain's predictions, and the share of its (token, layer) pairs with the same experts."""

    predictions: Agreement
    routing_exact_set: float


@dataclass(frozen=True, slots=True)
class PositionRange:
    """Agreement at positions of the window from ``start`` to before ``stop``."""

    start: int
    stop: int
    kld_mean: float
    top1_agreement: float
    routing_exact_set: float


@dataclass(frozen=True, slots=True)
class Certainty:
    """Intervals of a build's figures, from a bootstrap over windows."""

    kld: Interval
    perplexity_ratio: Interval
    top1: Interval
    routing: Interval


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
            "experts": [asdict(expert) for expert in self.experts],
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
        overall: over all scored positions.
        certainty: intervals of ``overall`` and of routing.
        histogram: of the KL divergence, decimal logarithm of nats.
        routing: of experts.
        domains: by domain of the text.
        positions: by place in the window.
        facts: what the build says otherwise than the checkpoint.
        attribution: by layer and expert, if it was asked for.
        generation: what generation checks found, if they ran.
        warnings: what is known to be wrong with the engine.
    """

    path: str
    format: str
    engine: str
    engine_version: str
    nbytes: int
    bits_per_weight: float
    overall: Agreement
    certainty: Certainty
    histogram: Histogram
    routing: RoutingAgreement
    domains: Mapping[str, DomainAgreement]
    positions: tuple[PositionRange, ...]
    facts: tuple[Fact, ...] = ()
    attribution: Attribution | None = None
    generation: Generation | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq validate --json``."""
        found, sure = self.overall, self.certainty
        kld = asdict(found.kld) | {"ci95": _ends(sure.kld), "histogram": asdict(self.histogram)}
        return {
            "path": self.path,
            "format": self.format,
            "engine": self.engine,
            "engine_version": self.engine_version,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "perplexity": found.perplexity,
            "perplexity_ratio": found.perplexity_ratio,
            "perplexity_ratio_stderr": sure.perplexity_ratio.stderr,
            "perplexity_ratio_ci95": _ends(sure.perplexity_ratio),
            "kld": kld,
            "top1_agreement": found.top1_agreement,
            "top1_stderr": sure.top1.stderr,
            "top1_ci95": _ends(sure.top1),
            "routing": _routing_json(self.routing, sure.routing),
            "domains": {domain: _domain_json(d) for domain, d in self.domains.items()},
            "positions": [_position_json(p) for p in self.positions],
            **(self.attribution.to_json() if self.attribution is not None else {}),
            **({"generation": dict(self.generation)} if self.generation is not None else {}),
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
    """

    path: str
    engine: str
    figure: str
    found: float | None
    limit: float | None
    why: str

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.6g}"
        limit = "" if self.limit is None else f", limit {self.limit:.6g}"
        return f"{self.path} ({self.engine}): {self.figure} is {found}{limit}: {self.why}"


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The reference's own weights in bfloat16 arithmetic against float32.

    Attributes:
        kld_mean: nats.
        kld_stderr: its standard error, by window.
        perplexity_ratio: over float32's.
        top1_agreement: with float32.
        routing_exact_set: with float32.
        domains: by domain of the text.
        layers: ``routing_exact_set`` by layer.
        positions: by place in the window.
    """

    kld_mean: float
    kld_stderr: float
    perplexity_ratio: float
    top1_agreement: float
    routing_exact_set: float
    domains: Mapping[str, DomainAgreement]
    layers: Mapping[int, float]
    positions: tuple[PositionRange, ...]

    def to_json(self) -> dict[str, Any]:
        """The object ``noise_floor``."""
        return {
            "kld_mean": self.kld_mean,
            "kld_stderr": self.kld_stderr,
            "perplexity_ratio": self.perplexity_ratio,
            "top1_agreement": self.top1_agreement,
            "routing_exact_set": self.routing_exact_set,
            "domains": {domain: _domain_json(d) for domain, d in self.domains.items()},
            "layers": [{"layer": n, "exact_set": share} for n, share in self.layers.items()],
            "positions": [_position_json(p) for p in self.positions],
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
            "failures": [asdict(failure) for failure in self.failures],
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


def _ends(interval: Interval) -> list[float] | None:
    """Null when there is one window only."""
    return None if math.isnan(interval.low) else [interval.low, interval.high]


def _routing_json(routing: RoutingAgreement, interval: Interval) -> dict[str, Any]:
    return {
        "exact_set": routing.exact_set,
        "stderr": interval.stderr,
        "ci95": _ends(interval),
        "jaccard": routing.jaccard,
        "local_exact_set": routing.local_exact_set,
        "layers": [asdict(layer) for layer in routing.layers],
        "margins": [asdict(margin) for margin in routing.margins],
    }


def _domain_json(found: DomainAgreement) -> dict[str, Any]:
    return {
        "perplexity_ratio": found.predictions.perplexity_ratio,
        "kld_mean": found.predictions.kld.mean,
        "kld_stderr": found.predictions.kld.stderr,
        "top1_agreement": found.predictions.top1_agreement,
        "routing_exact_set": found.routing_exact_set,
    }


def _position_json(found: PositionRange) -> dict[str, Any]:
    return {
        "from": found.start,
        "to": found.stop,
        "kld_mean": found.kld_mean,
        "top1_agreement": found.top1_agreement,
        "routing_exact_set": found.routing_exact_set,
    }
