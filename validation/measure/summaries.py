"""Figures of a run from its values at every position.

W windows, P scored positions a window.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lfmq.validation.measure.predictions import PositionScores, scored_positions
from lfmq.validation.measure.report import (
    Agreement,
    Certainty,
    Divergence,
    DomainAgreement,
    Histogram,
    NoiseFloor,
    PositionRange,
)
from lfmq.validation.measure.runs import Comparison
from lfmq.validation.measure.significance import bootstrap, standard_error

# log10 of nats: below the first lies float32's rounding error, above the last nothing.
_HISTOGRAM_EDGES = np.linspace(-8, 2, 41)
_RANGES = 8


def summarize_scores(scores: PositionScores) -> Agreement:
    """Means and quantiles of scored positions."""
    reference, own = float(scores.reference_nll.mean()), float(scores.nll.mean())
    kld = scores.kld
    return Agreement(
        perplexity=_exp(own),
        perplexity_ratio=_exp(own - reference),
        kld=Divergence(
            float(kld.mean()),
            standard_error(kld),
            float(np.median(kld)),
            float(np.quantile(kld, 0.99)),
            float(kld.max()),
        ),
        top1_agreement=float(scores.same_top.mean()),
    )


def summarize_domains(found: Comparison, domains: tuple[str, ...]) -> dict[str, DomainAgreement]:
    """The same for the windows of each domain, in the order the domains appear."""
    rows = {d: np.array([d == other for other in domains]) for d in dict.fromkeys(domains)}
    return {
        domain: DomainAgreement(
            summarize_scores(found.scores.of(windows)), float(found.same_sets[windows].mean())
        )
        for domain, windows in rows.items()
    }


def summarize_positions(found: Comparison, sequence: int) -> tuple[PositionRange, ...]:
    """The same for eighths of the scored positions, by their place in the window."""
    part = scored_positions(sequence)
    count = part.stop - part.start
    edges = np.linspace(0, count, min(_RANGES, count) + 1).round().astype(int).tolist()
    return tuple(
        PositionRange(
            part.start + low,
            part.start + high,
            float(found.scores.kld[:, low:high].mean()),
            float(found.scores.same_top[:, low:high].mean()),
            float(found.same_sets[:, low:high].mean()),
        )
        for low, high in pairwise(edges)
    )


def summarize_certainty(found: Comparison) -> Certainty:
    """Intervals of the figures over all positions, by window."""
    scores = found.scores
    return Certainty(
        kld=bootstrap(scores.kld),
        perplexity_ratio=bootstrap(scores.nll - scores.reference_nll, transform=np.exp),
        top1=bootstrap(scores.same_top),
        routing=bootstrap(found.same_sets),
    )


def histogram(kld: NDArray[np.float64]) -> Histogram:
    """Positions by the decimal logarithm of their divergence; the ends take what is beyond."""
    low, high = _HISTOGRAM_EDGES[0], _HISTOGRAM_EDGES[-1]
    known = kld[np.isfinite(kld)]
    logs = np.log10(np.clip(known, 10.0**low, 10.0**high))
    counts, _ = np.histogram(np.clip(logs, low, high), _HISTOGRAM_EDGES)
    return Histogram(tuple(_HISTOGRAM_EDGES.tolist()), tuple(counts.tolist()))


def summarize_floor(found: Comparison, domains: tuple[str, ...], sequence: int) -> NoiseFloor:
    """What 16-bit arithmetic alone does."""
    overall = summarize_scores(found.scores)
    return NoiseFloor(
        overall.kld.mean,
        overall.kld.stderr,
        overall.perplexity_ratio,
        overall.top1_agreement,
        found.routing.exact_set,
        summarize_domains(found, domains),
        {layer.layer: layer.exact_set for layer in found.routing.layers},
        summarize_positions(found, sequence),
    )


def _exp(value: float) -> float:
    """Infinite where a double ends: a broken build's perplexity has no bound."""
    return math.exp(value) if value < 709 else (value if math.isnan(value) else math.inf)
