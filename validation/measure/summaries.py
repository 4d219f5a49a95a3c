"""Figures of a run from its values at every position.

W windows, P scored positions a window.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lfmq.validation.measure.figures import (
    FIGURES,
    Estimate,
    Estimates,
    Figure,
    PositionMean,
    Values,
    figures_of,
)
from lfmq.validation.measure.predictions import scored_positions
from lfmq.validation.measure.report import Histogram, NoiseFloor, PositionRange
from lfmq.validation.measure.runs import Comparison
from lfmq.validation.measure.significance import bootstrap, standard_error

# log10 of nats: below the first lies float32's rounding error, above the last nothing.
_HISTOGRAM_EDGES = np.linspace(-8, 2, 41)
_RANGES = 8


def measure_figures(run: Comparison) -> dict[Figure, Estimate]:
    """Every figure of a run over all scored positions, with intervals from a bootstrap."""
    found = {}
    for figure in FIGURES:
        if figure.of is not None:
            value = figure.of(run)
            if value is not None:
                found[figure] = Estimate(value)
        elif figure.mean is not None:
            values = figure.mean.values(run)
            if values is not None:
                found[figure] = _with_interval(figure, figure.mean, values)
    return found


def _with_interval(figure: Figure, mean: PositionMean, values: Values) -> Estimate:
    found = _estimate(figure, mean, values)
    if not figure.stem:
        return found
    drawn = bootstrap(values, transform=mean.transform)
    stderr = drawn.stderr if found.stderr is None else found.stderr
    return Estimate(found.value, stderr, (drawn.low, drawn.high))


def _estimate(figure: Figure, mean: PositionMean, values: Values) -> Estimate:
    """The figure of [W, P] values; its standard error if that is one of windows."""
    value = float(mean.transform(np.asarray(values, np.float64).mean()))
    return Estimate(value, standard_error(values) if figure.stderr_of_windows else None)


def measure_domains(run: Comparison, domains: tuple[str, ...]) -> dict[str, Estimates]:
    """The figures of the windows of each domain, in the order the domains appear."""
    rows = {d: np.array([d == other for other in domains]) for d in dict.fromkeys(domains)}
    return {
        domain: {
            figure: _estimate(figure, mean, values[windows])
            for figure, mean, values in _position_means(run, figures_of("domain"))
        }
        for domain, windows in rows.items()
    }


def measure_positions(run: Comparison, sequence: int) -> tuple[PositionRange, ...]:
    """The figures of eighths of the scored positions, by their place in the window."""
    part = scored_positions(sequence)
    count = part.stop - part.start
    edges = np.linspace(0, count, min(_RANGES, count) + 1).round().astype(int).tolist()
    found = _position_means(run, figures_of("position"))
    return tuple(
        PositionRange(
            part.start + low,
            part.start + high,
            {
                figure: Estimate(_estimate(figure, mean, values[:, low:high]).value)
                for figure, mean, values in found
            },
        )
        for low, high in pairwise(edges)
    )


def _position_means(
    run: Comparison, figures: tuple[Figure, ...]
) -> list[tuple[Figure, PositionMean, Values]]:
    """Those figures that the run has a value of at each position."""
    return [
        (figure, figure.mean, values)
        for figure in figures
        if figure.mean is not None and (values := figure.mean.values(run)) is not None
    ]


def histogram(kld: NDArray[np.float64]) -> Histogram:
    """Positions by the decimal logarithm of their divergence; the ends take what is beyond."""
    low, high = _HISTOGRAM_EDGES[0], _HISTOGRAM_EDGES[-1]
    known = kld[np.isfinite(kld)]
    logs = np.log10(np.clip(known, 10.0**low, 10.0**high))
    counts, _ = np.histogram(np.clip(logs, low, high), _HISTOGRAM_EDGES)
    return Histogram(tuple(_HISTOGRAM_EDGES.tolist()), tuple(counts.tolist()))


def measure_floor(run: Comparison, domains: tuple[str, ...], sequence: int) -> NoiseFloor:
    """The noise floor: the effect of 16-bit arithmetic alone."""
    layers = () if run.routing is None else run.routing.layers
    return NoiseFloor(
        {
            figure: _estimate(figure, mean, values)
            for figure, mean, values in _position_means(run, figures_of("domain"))
        },
        measure_domains(run, domains),
        {layer.layer: layer.exact_set for layer in layers},
        measure_positions(run, sequence),
    )
