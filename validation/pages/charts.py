"""The geometry of the page's charts: figures to places in a drawing; the template draws them.

Every drawing is WIDTH units wide and made for that many pixels, so that it fits a phone unscaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lfmq.validation.measure.figures import Kind
from lfmq.validation.measure.report import ExpertError
from lfmq.validation.measure.routing import LayerRouting
from lfmq.validation.pages.numbers import format_figure
from lfmq.validation.pages.scales import Scale, Tick, scale_for, share_step

WIDTH = 300
EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Interval:
    """A row of a forest chart: a value and its interval; nothing where it is not a number."""

    label: str
    text: str
    y: float
    x: float | None
    low: float | None
    high: float | None
    missed: bool
    limit: float | None


@dataclass(frozen=True, slots=True)
class Forest:
    """Values of all builds under each other on one scale.

    Attributes:
        line: where the noise floor, or no change, is.
    """

    title: str
    height: float
    rows: tuple[Interval, ...]
    ticks: tuple[Tick, ...]
    line: float | None
    line_label: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure of a build, its interval, and the limit it missed."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    missed: bool = False
    limit: float | None = None


_ROW = 34


def forest(
    title: str,
    rows: Sequence[Measured],
    kind: Kind,
    *,
    line: float | None,
    line_label: str,
    log: bool = False,
) -> Forest | None:
    """Intervals of one figure; None when no row has a value."""
    numbers = [v for row in rows for v in (row.value, row.low, row.high, row.limit)]
    scale = scale_for([*numbers, line], 8, WIDTH - 8, log)
    if scale is None or all(row.value is None for row in rows):
        return None

    def place(value: float | None) -> float | None:
        drawn = value is not None and (value > 0 or not log)
        return scale.place(value) if drawn and value is not None else None

    intervals = tuple(
        Interval(
            _shortened(row.label),
            format_figure(row.value, kind),
            14 + i * _ROW,
            place(row.value),
            place(row.low),
            place(row.high),
            row.missed,
            place(row.limit),
        )
        for i, row in enumerate(rows)
    )
    height = 14 + len(rows) * _ROW
    return Forest(title, height, intervals, scale.ticks(), place(line), line_label)


def _shortened(label: str, most: int = 40) -> str:
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[-most // 2 :]}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A place of a heat map."""

    x: float
    step: int | None
    title: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """A layer of a heat map and what it adds up to."""

    y: float
    label: str
    total: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Layers by experts."""

    width: float
    cell: tuple[float, float]
    height: float
    rows: tuple[HeatRow, ...]
    columns: tuple[Tick, ...]


def heat_map(layers: Sequence[LayerRouting]) -> HeatMap | None:
    """Of the tokens the reference sent to each expert, the share the build sent there too."""
    drawn = [layer for layer in layers if layer.experts]
    if not drawn:
        return None
    left, right, top = 30, 44, 15
    experts = max(len(layer.experts) for layer in drawn)
    width = round((WIDTH - left - right) / experts, 2)
    height = max(11.0, width)
    rows = tuple(
        HeatRow(
            round(top + i * height, 1),
            str(layer.layer),
            format_figure(layer.exact_set, "share"),
            tuple(_cell(layer, e, left + e * width) for e in range(len(layer.experts))),
        )
        for i, layer in enumerate(drawn)
    )
    stride = next(s for s in (1, 2, 4, 8, 16, 32) if experts / s <= 8)
    columns = tuple(
        Tick(round(left + (e + 0.5) * width, 1), str(e)) for e in range(0, experts, stride)
    )
    cell = (round(width - min(1.0, width / 8), 2), round(height - 1, 2))
    return HeatMap(WIDTH, cell, top + len(drawn) * height, rows, columns)


def _cell(layer: LayerRouting, expert: int, x: float) -> Cell:
    share = layer.experts[expert]
    title = f"layer {layer.layer}, expert {expert}: {format_figure(share, 'share')}"
    if layer.load and layer.reference_load:
        own, reference = (
            format_figure(load[expert], "share") for load in (layer.load, layer.reference_load)
        )
        title += f"; load {own}, reference {reference}"
    return Cell(round(x, 2), share_step(share), title)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, or a point with no size."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across a chart, named in a row of its own above it."""

    x: float
    label: str
    name: str
    y: float
    before: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """Bars or points between two axes."""

    height: float
    bottom: float
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...] = ()


_LEFT, _RIGHT = 46, WIDTH - 8
_PLOT = 110
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    marks: Sequence[tuple[str, str, float | None]],
    highest: float,
    span: tuple[float, float],
) -> Plot | None:
    """Share of positions by their KL divergence.

    Args:
        edges: of the bins, log10 of nats.
        counts: positions in each bin.
        marks: label, class and value in nats of lines across.
        highest: the largest share any bin of any build has: charts side by side share an axis.
        span: the first and last edge of any build.
    """
    total = sum(counts)
    if not total or len(edges) != len(counts) + 1:
        return None
    top = 12 * len(marks) + 4
    x = Scale(*span, _LEFT, _RIGHT)
    y = Scale(0, highest, top + _PLOT, top)
    bars = tuple(
        Bar(
            x.place(low),
            y.place(count / total),
            round(max(x.place(high) - x.place(low) - 1, 0.5), 1),
            round(top + _PLOT - y.place(count / total), 1),
            f"10^{low:g} to 10^{high:g} nats: {count:,} positions, {count / total:.2%}",
        )
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    lines = tuple(
        Mark(
            x.place(math.log10(value)),
            label,
            name,
            10 + 12 * i,
            x.place(math.log10(value)) > 0.7 * WIDTH,
        )
        for i, (label, name, value) in enumerate(marks)
        if value is not None and value > 0
    )
    decades = range(math.ceil(span[0]), math.floor(span[1]) + 1)
    stride = 1 if len(decades) <= 6 else 2
    ticks = tuple(Tick(x.place(e), _power_of_ten(e)) for e in decades if e % stride == 0)
    return Plot(top + _PLOT + 34, top + _PLOT, bars, ticks, _percent(y), lines)


def _power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(_RAISED)


def _percent(y: Scale) -> tuple[Tick, ...]:
    return tuple(Tick(t.place, f"{100 * float(t.label):g} %") for t in y.ticks(4))


def layer_bars(parts: Sequence[tuple[str, float | None]], highest: float) -> Plot | None:
    """Mean KL divergence with only one part's weights taken from the build.

    Args:
        parts: name (a layer's number) and nats.
        highest: of all builds: charts side by side share an axis.
    """
    if not parts or not highest > 0:
        return None
    x = Scale(0, len(parts), _LEFT + 8, _RIGHT)
    y = Scale(0, highest, 8 + _PLOT, 8)
    wide = (x.stop - x.start) / len(parts)
    bars = tuple(
        Bar(
            round(x.place(i) + 0.1 * wide, 1),
            y.place(kld or 0),
            round(0.8 * wide, 1),
            round(8 + _PLOT - y.place(kld or 0), 1),
            f"{name if name == EMBEDDING else f'layer {name}'}: {format_figure(kld, 'nats')} nats",
        )
        for i, (name, kld) in enumerate(parts)
    )
    stride = next(s for s in (1, 2, 4, 8, 16) if len(parts) / s <= 14)
    numbered = [i for i, (name, _) in enumerate(parts) if name != EMBEDDING]
    ticks = tuple(Tick(round(x.place(i + 0.5), 1), parts[i][0]) for i in numbered[::stride])
    return Plot(8 + _PLOT + 34, 8 + _PLOT, bars, ticks, y.ticks(4))


def scatter(experts: Sequence[ExpertError], highest: float) -> Plot | None:
    """Each expert's relative weight error over the tokens the reference sent to it."""
    shown = [e for e in experts if math.isfinite(e.error)]
    x = scale_for([max(e.tokens, 1) for e in shown], _LEFT + 8, _RIGHT - 4, log=True)
    if x is None or not highest > 0:
        return None
    y = Scale(0, highest * 1.05, 8 + _PLOT, 8)
    points = tuple(
        Bar(
            x.place(max(e.tokens, 1)),
            y.place(e.error),
            0,
            0,
            f"layer {e.layer}, expert {e.expert}: error "
            f"{format_figure(e.error, 'nats')}, {e.tokens:,} tokens",
        )
        for e in shown
    )
    return Plot(8 + _PLOT + 34, 8 + _PLOT, points, x.ticks(), y.ticks(4))
