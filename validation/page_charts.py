"""Which charts a document has, and the scales that charts side by side share."""

from collections.abc import Sequence
from dataclasses import dataclass

from lfmq.validation.charts import (
    Forest,
    HeatMap,
    Plot,
    Row,
    forest,
    heat_map,
    histogram,
    layer_bars,
    scatter,
)
from lfmq.validation.document import Build, Located
from lfmq.validation.numbers import FIGURES


@dataclass(frozen=True, slots=True)
class Charts:
    """The drawings of a page; those of builds stand in the builds' order."""

    forests: tuple[Forest, ...]
    heat_maps: tuple[tuple[Build, HeatMap], ...]
    histograms: tuple[tuple[Build, Plot], ...]
    layers: tuple[tuple[Build, Plot], ...]
    experts: tuple[tuple[Build, Plot], ...]


def draw(at: Located, builds: Sequence[Build]) -> Charts:
    """All charts that the document has figures for."""
    return Charts(
        forests=_forests(at, builds),
        heat_maps=tuple(
            (b, chart)
            for b in builds
            if (chart := heat_map(b.found.value["routing"].get("layers", []))) is not None
        ),
        histograms=_histograms(at, builds),
        layers=_layers(builds),
        experts=_experts(builds),
    )


# Title, figure, where its interval and its noise floor are; a ratio is compared with 1.
_COMPARED = (
    ("Mean KLD, nats, log scale", "kld.mean", ("kld", "ci95"), "kld_mean"),
    ("Perplexity ratio", "perplexity_ratio", ("perplexity_ratio_ci95",), None),
    ("Same top token", "top1_agreement", ("top1_ci95",), "top1_agreement"),
    ("Same experts", "routing.exact_set", ("routing", "ci95"), "routing_exact_set"),
)


def _forests(at: Located, builds: Sequence[Build]) -> tuple[Forest, ...]:
    found = []
    for title, figure, interval, floor in _COMPARED:
        _, kind = FIGURES[figure]
        limits = [b.missed[figure].number("limit") for b in builds if figure in b.missed]
        chart = forest(
            title,
            [_row(b, figure, interval) for b in builds],
            kind,
            line=1.0 if floor is None else at.number("noise_floor", floor),
            line_label="no change" if floor is None else "noise floor",
            limit=limits[0] if limits else None,
            log=figure == "kld.mean",
        )
        if chart is not None:
            found.append(chart)
    return tuple(found)


def _row(build: Build, figure: str, interval: tuple[str, ...]) -> Row:
    ends = build.found.get(*interval)
    low, high = ends.value if ends is not None else (None, None)
    return (build.label, build.found.number(*figure.split(".")), low, high, figure in build.missed)


def _histograms(at: Located, builds: Sequence[Build]) -> tuple[tuple[Build, Plot], ...]:
    shown = [
        (b, h.value)
        for b in builds
        if (h := b.found.get("kld", "histogram")) and h.value["counts"]
    ]
    if not shown:
        return ()
    highest = max(max(h["counts"]) / max(sum(h["counts"]), 1) for _, h in shown)
    span = (min(h["edges"][0] for _, h in shown), max(h["edges"][-1] for _, h in shown))
    floor = at.number("noise_floor", "kld_mean")
    found = []
    for build, h in shown:
        marks = [("noise floor, mean", "floor", floor)]
        marks += [(key, key, build.found.number("kld", key)) for key in ("median", "mean", "p99")]
        chart = histogram(h["edges"], h["counts"], marks, highest, span)
        if chart is not None:
            found.append((build, chart))
    return tuple(found)


def _layers(builds: Sequence[Build]) -> tuple[tuple[Build, Plot], ...]:
    shown = [(b, k.value) for b in builds if (k := b.found.get("layers_kld"))]
    highest = max((v["kld_mean"] or 0 for _, k in shown for v in k), default=0)
    return tuple((b, p) for b, k in shown if (p := layer_bars(k, highest)) is not None)


def _experts(builds: Sequence[Build]) -> tuple[tuple[Build, Plot], ...]:
    shown = [(b, e.value) for b in builds if (e := b.found.get("experts"))]
    highest = max((v["error"] or 0 for _, e in shown for v in e), default=0)
    return tuple((b, p) for b, e in shown if (p := scatter(e, highest)) is not None)
