"""Which charts a document has, and the scales that charts side by side share."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from lfmq.validation.pages.document import Build, Located
from lfmq.validation.pages.numbers import FIGURES


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
        chart = forest(
            title,
            [_row(b, figure, interval) for b in builds],
            kind,
            line=1.0 if floor is None else at.number("noise_floor", floor),
            line_label="no change" if floor is None else "noise floor",
            log=figure == "kld.mean",
        )
        if chart is not None:
            found.append(chart)
    return tuple(found)


def _row(build: Build, figure: str, interval: tuple[str, ...]) -> Measured:
    ends = build.found.get(*interval)
    low, high = ends.value if ends is not None else (None, None)
    value, failure = build.found.number(*figure.split(".")), build.missed.get(figure)
    limit = None if failure is None else failure.number("limit")
    return Measured(build.label, value, low, high, failure is not None, limit)


def _histograms(at: Located, builds: Sequence[Build]) -> tuple[tuple[Build, Plot], ...]:
    shown = [
        (b, h.value)
        for b in builds
        if (h := b.found.get("kld", "histogram")) and h.value["counts"]
    ]
    if not shown:
        return ()
    highest = max(max(h["counts"]) / max(sum(h["counts"]), 1) for _, h in shown)
    filled = [
        (low, high)
        for _, h in shown
        for low, high, count in zip(h["edges"], h["edges"][1:], h["counts"], strict=False)
        if count
    ]
    if not filled:
        return ()
    span = (min(low for low, _ in filled), max(high for _, high in filled))
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
    shown = [(b, _parts(b)) for b in builds if b.found.get("layers_kld")]
    highest = max((kld or 0 for _, parts in shown for _, kld in parts), default=0)
    return tuple((b, p) for b, parts in shown if (p := layer_bars(parts, highest)) is not None)


def _parts(build: Build) -> list[tuple[str, float | None]]:
    """The embedding, where it is known, and the layers."""
    embedding = build.found.number("embedding_kld")
    layers = build.found.value["layers_kld"]
    parts = [(str(layer["layer"]), layer["kld_mean"]) for layer in layers]
    return parts if embedding is None else [(EMBEDDING, embedding), *parts]


def _experts(builds: Sequence[Build]) -> tuple[tuple[Build, Plot], ...]:
    shown = [(b, e.value) for b in builds if (e := b.found.get("experts"))]
    highest = max((v["error"] or 0 for _, e in shown for v in e), default=0)
    return tuple((b, p) for b, e in shown if (p := scatter(e, highest)) is not None)
