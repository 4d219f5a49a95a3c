"""What a validation found, its JSON and whether it passes; see docs/validation.md for the keys."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lfmq.validation.metrics import LayerRouting, PositionScores, standard_error


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distribution of the KL divergence over scored positions, nats."""

    mean: float
    stderr: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one set of predictions compares with the reference's."""

    perplexity: float
    perplexity_ratio: float
    kld: Divergence
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class RoutingAgreement:
    """Routing compared in every MoE layer; the means weigh layers equally."""

    layers: tuple[LayerRouting, ...]

    @property
    def exact_set(self) -> float:
        """Share of (token, layer) pairs with the reference's set of experts."""
        return float(np.mean([r.exact_set for r in self.layers])) if self.layers else 1.0

    @property
    def jaccard(self) -> float:
        """Mean intersection over union of the two sets."""
        return float(np.mean([r.jaccard for r in self.layers])) if self.layers else 1.0


@dataclass(frozen=True, slots=True)
class BuildReport:
    """One build against the reference."""

    path: str
    format: str
    engine: str
    engine_version: str
    nbytes: int
    bits_per_weight: float
    overall: Agreement
    routing: RoutingAgreement
    domains: Mapping[str, Agreement]
    generation: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq validate --json``."""
        return {
            "path": self.path,
            "format": self.format,
            "engine": self.engine,
            "engine_version": self.engine_version,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "perplexity": self.overall.perplexity,
            "perplexity_ratio": self.overall.perplexity_ratio,
            "kld": _without_nan(asdict(self.overall.kld)),
            "top1_agreement": self.overall.top1_agreement,
            "routing": {
                "exact_set": self.routing.exact_set,
                "jaccard": self.routing.jaccard,
                "layers": [asdict(r) for r in self.routing.layers],
            },
            "domains": {
                domain: {
                    "perplexity_ratio": found.perplexity_ratio,
                    "kld_mean": found.kld.mean,
                    "top1_agreement": found.top1_agreement,
                }
                for domain, found in self.domains.items()
            },
            **({} if self.generation is None else {"generation": self.generation}),
        }


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a build must reach; None asks for nothing."""

    max_kld: float | None = None
    max_perplexity_ratio: float | None = None
    min_routing: float | None = None

    def missed_by(self, build: BuildReport) -> list["Failure"]:
        """The thresholds a build misses; a figure that is not a number misses all."""
        limits = (
            ("kld.mean", build.overall.kld.mean, self.max_kld, 1),
            ("perplexity_ratio", build.overall.perplexity_ratio, self.max_perplexity_ratio, 1),
            ("routing.exact_set", build.routing.exact_set, self.min_routing, -1),
        )
        return [
            Failure(build.path, figure, found, limit)
            for figure, found, limit, sign in limits
            if limit is not None and not sign * found <= sign * limit
        ]


@dataclass(frozen=True, slots=True)
class Failure:
    """A figure of a build that misses its threshold."""

    path: str
    figure: str
    found: float
    limit: float


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The reference's own weights in bfloat16 arithmetic against float32."""

    kld_mean: float
    top1_agreement: float
    routing_exact_set: float


@dataclass(frozen=True, slots=True)
class Report:
    """The result of :func:`lfmq.validation.validate.validate`."""

    checkpoint: str
    text_sha256: str
    tokens_scored: int
    reference_perplexity: float
    noise_floor: NoiseFloor
    builds: tuple[BuildReport, ...]
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """No threshold was missed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq validate --json``."""
        return {
            "checkpoint": self.checkpoint,
            "text_sha256": self.text_sha256,
            "tokens_scored": self.tokens_scored,
            "reference": {"perplexity": self.reference_perplexity},
            "noise_floor": asdict(self.noise_floor),
            "builds": [build.to_json() for build in self.builds],
            "passed": self.passed,
            "failures": [asdict(failure) for failure in self.failures],
        }


def summarize_scores(scores: PositionScores) -> Agreement:
    """Means and quantiles of scored positions."""
    reference, own = float(scores.reference_nll.mean()), float(scores.nll.mean())
    kld = scores.kld
    return Agreement(
        perplexity=math.exp(own),
        perplexity_ratio=math.exp(own - reference),
        kld=Divergence(
            float(kld.mean()),
            standard_error(kld),
            float(np.median(kld)),
            float(np.quantile(kld, 0.99)),
            float(kld.max()),
        ),
        top1_agreement=float(scores.same_top.mean()),
    )


def summarize_domains(scores: PositionScores, domains: tuple[str, ...]) -> dict[str, Agreement]:
    """The same for the windows of each domain, in the order the domains appear."""
    found = {}
    for domain in dict.fromkeys(domains):
        rows = np.array([d == domain for d in domains])
        part = PositionScores(
            scores.reference_nll[rows], scores.nll[rows], scores.kld[rows], scores.same_top[rows]
        )
        found[domain] = summarize_scores(part)
    return found


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN; the standard error of a single window is unknown."""
    return {key: None if math.isnan(value) else value for key, value in values.items()}
