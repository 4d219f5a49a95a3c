"""Which charts a report has, and the scales that charts side by side share."""

from collections.abc import Sequence
from dataclasses import dataclass

from lfmq.validation.measure.figures import FIGURES, KLD, KLD_MEDIAN, KLD_P99, Figure
from lfmq.validation.measure.report import Attribution, Report
from lfmq.validation.pages.charts import (
    EMBEDDING,
    Forest,
    HeatMap,
    Measured,
    Plot,
    forest,
    heat_map,
    histogram,
    layer_bars,
    scatter,
)
from lfmq.validation.pages.rows import Row


@dataclass(frozen=True, slots=True)
class Charts:
    """The drawings of a page; those of builds stand in the builds' order."""

    forests: tuple[Forest, ...]
    heat_maps: tuple[tuple[Row, HeatMap], ...]
    histograms: tuple[tuple[Row, Plot], ...]
    layers: tuple[tuple[Row, Plot], ...]
    experts: tuple[tuple[Row, Plot], ...]


def draw(report: Report, rows: Sequence[Row]) -> Charts:
    """All charts that the report has figures for."""
    return Charts(
        forests=tuple(
            drawn
            for figure in FIGURES
            if figure.stem and (drawn := _forest(report, rows, figure)) is not None
        ),
        heat_maps=tuple(
            (row, chart)
            for row in rows
            if row.report.routing is not None
            and (chart := heat_map(row.report.routing.layers)) is not None
        ),
        histograms=_histograms(report, rows),
        layers=_layers(rows),
        experts=_experts(rows),
    )


def _forest(report: Report, rows: Sequence[Row], figure: Figure) -> Forest | None:
    """A figure of every build with its interval; a ratio is compared with 1."""
    ratio, log = figure.kind == "ratio", figure.kind == "nats"
    heading = f"{figure.heading[0].upper()}{figure.heading[1:]}"
    return forest(
        f"{heading}, log scale" if log else heading,
        [_measured(row, figure) for row in rows],
        figure.kind,
        line=1.0 if ratio else report.noise_floor.value(figure),
        line_label="no change" if ratio else "noise floor",
        log=log,
    )


def _measured(row: Row, figure: Figure) -> Measured:
    ends = row.interval(figure)
    low, high = (None, None) if ends is None else (ends[0].value, ends[1].value)
    miss = row.missed.get(figure.key)
    limit = None if miss is None or miss.limit is None else miss.limit.value
    return Measured(row.label, row.report.value(figure), low, high, miss is not None, limit)


def _histograms(report: Report, rows: Sequence[Row]) -> tuple[tuple[Row, Plot], ...]:
    shown = [(row, h) for row in rows if sum((h := row.report.histogram).counts)]
    if not shown:
        return ()
    highest = max(max(h.counts) / sum(h.counts) for _, h in shown)
    filled = [
        (low, high)
        for _, h in shown
        for low, high, count in zip(h.edges, h.edges[1:], h.counts, strict=False)
        if count
    ]
    span = (min(low for low, _ in filled), max(high for _, high in filled))
    found = []
    for row, h in shown:
        marks = [("noise floor, mean", "floor", report.noise_floor.value(KLD))]
        names = (("median", KLD_MEDIAN), ("mean", KLD), ("p99", KLD_P99))
        marks += [(name, name, row.report.value(figure)) for name, figure in names]
        chart = histogram(h.edges, h.counts, marks, highest, span)
        if chart is not None:
            found.append((row, chart))
    return tuple(found)


def _attributions(rows: Sequence[Row]) -> list[tuple[Row, Attribution]]:
    return [(row, found) for row in rows if (found := row.report.attribution) is not None]


def _layers(rows: Sequence[Row]) -> tuple[tuple[Row, Plot], ...]:
    shown = [
        (
            row,
            [
                (EMBEDDING, found.embedding_kld),
                *((str(layer.layer), layer.kld_mean) for layer in found.layers),
            ],
        )
        for row, found in _attributions(rows)
    ]
    highest = max((kld for _, parts in shown for _, kld in parts), default=0)
    return tuple((b, p) for b, parts in shown if (p := layer_bars(parts, highest)) is not None)


def _experts(rows: Sequence[Row]) -> tuple[tuple[Row, Plot], ...]:
    shown = _attributions(rows)
    highest = max((e.error for _, found in shown for e in found.experts), default=0)
    return tuple((b, p) for b, a in shown if (p := scatter(a.experts, highest)) is not None)
