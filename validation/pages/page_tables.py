"""The page's tables: builds down; layers, margins, domains or positions across."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lfmq.validation.measure.figures import (
    KLD,
    KLD_MAX,
    KLD_MEDIAN,
    KLD_P99,
    ROUTING,
    Estimates,
    Figure,
    Kind,
    Scope,
    figures_of,
)
from lfmq.validation.measure.report import BuildReport, NoiseFloor, Report
from lfmq.validation.pages.rows import Number, Row, escaped, number, number_in
from lfmq.validation.pages.scales import floor_step, share_step

# Where a number of a series belongs: a layer, a domain, the two ends of a bin.
Place = tuple[object, ...]
# A part of the positions: its place, its figures and the JSON pointer of its object.
Part = tuple[Place, Estimates, str]
# A table with more is turned, builds across, so that it fits a screen and a sheet.
_MOST_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell: a number and its step on the colour scale, or neither."""

    found: Number | None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One figure by rows and columns.

    Attributes:
        corner: what the rows are.
        scale: how cells are coloured: by their ``share``, by their distance from the reference
            in noise floors (``floor``), or not at all (empty).
    """

    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    scale: str = ""


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of a page by section."""

    quantiles: tuple[Table, ...]
    layers: tuple[Table, ...]
    margins: tuple[Table, ...]
    domains: tuple[Table, ...]
    positions: tuple[Table, ...]
    experts: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """A figure of one row: its number at each place."""

    label: str
    numbers: Mapping[Place, Number | None]


def tabulate(report: Report, rows: Sequence[Row]) -> Tables:
    """All tables that the report has figures for."""
    return Tables(
        quantiles=(_quantiles(rows),),
        layers=_layers(report, rows),
        margins=_margins(rows),
        domains=_parts(report, rows, "domain", "domain", _domains, lambda p: str(p[0])),
        positions=_parts(report, rows, "position", "position in the window", _positions, _range),
        experts=tuple(t for row in rows if (t := _experts(row)) is not None),
    )


def _table(
    series: Sequence[Series],
    caption: str,
    where: str,
    name: Callable[[Place], str],
    scale: str = "",
    step: Callable[[Place, float], int | None] = lambda *_: None,
) -> Table | None:
    """Rows that have the figure anywhere, columns that any row has; None without any row."""
    shown = [s for s in series if any(n and n.value is not None for n in s.numbers.values())]
    if not shown:
        return None
    places = list(dict.fromkeys(place for s in shown for place in s.numbers))

    def entry(place: Place, found: Number | None) -> Entry:
        known = found is not None and found.value is not None
        return Entry(found, step(place, found.value) if known else None)  # type: ignore[union-attr,arg-type]

    cells = [(s.label, tuple(entry(p, s.numbers.get(p)) for p in places)) for s in shown]
    names = tuple(map(name, places))
    if len(places) <= _MOST_COLUMNS:
        return Table(caption, "build", names, tuple(cells), scale)
    turned = tuple(zip(names, zip(*(entries for _, entries in cells), strict=True), strict=True))
    return Table(caption, where, tuple(label for label, _ in cells), turned, scale)


def _present(*found: Table | None) -> tuple[Table, ...]:
    return tuple(table for table in found if table is not None)


def _caption(figure: Figure, by: str) -> str:
    return f"{figure.heading[0].upper()}{figure.heading[1:]}, by {by}"


def _coloured(
    report: Report, figure: Figure, floor: Mapping[Place, float | None]
) -> tuple[str, Callable[[Place, float], int | None]]:
    """The colour scale of a figure, and the step of a value.

    Args:
        report: its noise floor is used at places where ``floor`` has none.
        figure: in the table.
        floor: the noise floor at each place.
    """
    overall = report.noise_floor.value(figure)
    if overall is None or figure.kind == "ratio":
        if figure.kind == "share":
            return "share", lambda _, value: share_step(value)
        return "", lambda *_: None

    def step(place: Place, value: float) -> int | None:
        own = floor.get(place)
        least = overall if own is None else own
        if figure.less_is_better:
            return floor_step(value, least)
        return floor_step(1 - value, 1 - least)  # what disagrees

    return "floor", step


def _parts(
    report: Report,
    rows: Sequence[Row],
    scope: Scope,
    by: str,
    parts: Callable[[BuildReport | NoiseFloor, str], Iterable[Part]],
    name: Callable[[Place], str],
) -> tuple[Table, ...]:
    """A table of each figure that a scope has."""
    sources = [("noise floor", list(parts(report.noise_floor, "/noise_floor")))]
    sources += [(row.label, list(parts(row.report, row.at))) for row in rows]
    found = []
    for figure in figures_of(scope):
        series = [
            Series(
                label,
                {p: number_in(e, figure, f"{at}/{figure.flat_key}") for p, e, at in measured},
            )
            for label, measured in sources
        ]
        floor = {place: n.value if n else None for place, n in series[0].numbers.items()}
        coloured = _coloured(report, figure, floor)
        found.append(_table(series, _caption(figure, by), scope, name, *coloured))
    return _present(*found)


def _domains(found: BuildReport | NoiseFloor, at: str) -> Iterable[Part]:
    return (((d,), e, f"{at}/domains/{escaped(d)}") for d, e in found.domains.items())


def _positions(found: BuildReport | NoiseFloor, at: str) -> Iterable[Part]:
    ranges = enumerate(found.positions)
    return (((r.start, r.stop), r.figures, f"{at}/positions/{i}") for i, r in ranges)


def _range(place: Place) -> str:
    start, stop = place
    return f"{start:,} to {stop:,}"


def _layers(report: Report, rows: Sequence[Row]) -> tuple[Table, ...]:
    found = []
    floor: dict[Place, float | None] = {(n,): v for n, v in report.noise_floor.layers.items()}
    for figure in figures_of("layer"):
        series = [
            Series(
                row.label,
                {
                    (layer.layer,): number(
                        getattr(layer, figure.layer_key),
                        f"{row.at}/routing/layers/{i}/{figure.layer_key}",
                        figure.kind,
                    )
                    for i, layer in enumerate(row.report.routing.layers)
                },
            )
            for row in rows
            if row.report.routing is not None
        ]
        if figure is ROUTING:
            least = {
                place: number(value, f"/noise_floor/layers/{i}/{figure.layer_key}", figure.kind)
                for i, (place, value) in enumerate(floor.items())
            }
            series = [Series("noise floor", least), *series]
        coloured = _coloured(report, figure, floor)
        name = _caption(figure, "layer")
        found.append(_table(series, name, "layer", lambda p: str(p[0]), *coloured))
    return _present(*found)


def _quantiles(rows: Sequence[Row]) -> Table:
    figures = (KLD_MEDIAN, KLD_P99, KLD_MAX)
    found = []
    for row in rows:
        error = number(row.report.figures[KLD].stderr, f"{row.at}/kld/stderr", KLD.kind)
        numbers = (row.number(KLD), error, *map(row.number, figures))
        found.append((row.label, tuple(map(Entry, numbers))))
    columns = (KLD.title, "standard error", *(figure.title for figure in figures))
    return Table("KL divergence of a position, nats", "build", columns, tuple(found))


def _margins(rows: Sequence[Row]) -> tuple[Table, ...]:
    def series(key: str, kind: Kind) -> list[Series]:
        return [
            Series(
                row.label,
                {
                    (m.low, m.high): number(
                        getattr(m, key), f"{row.at}/routing/margins/{i}/{key}", kind
                    )
                    for i, m in enumerate(row.report.routing.margins)
                },
            )
            for row in rows
            if row.report.routing is not None
        ]

    caption = _caption(ROUTING, "the gap between the last selected and the first rejected expert")
    pairs = [Series("(token, layer) pairs", s.numbers) for s in series("pairs", "count")[:1]]
    return _present(
        _table(
            series(ROUTING.layer_key, ROUTING.kind),
            caption,
            "gap",
            _gap,
            "share",
            lambda _, value: share_step(value),
        ),
        _table(pairs, "Number of pairs with each gap", "gap", _gap),
    )


def _gap(place: Place) -> str:
    low, high = place
    if not low:
        return f"below {_power(high)}"
    return f"from {_power(low)}" if high is None else f"{_power(low)} to {_power(high)}"


def _power(value: object) -> str:
    digits, _, exponent = f"{value:.0e}".partition("e")
    whole = f"{digits}e{int(exponent)}"
    return whole if float(whole) == value and int(exponent) < -1 else f"{value:g}"


def _experts(row: Row) -> Table | None:
    """The heat map's numbers: layers down, experts across."""
    layers = () if row.report.routing is None else row.report.routing.layers
    drawn = [(i, layer) for i, layer in enumerate(layers) if layer.experts]
    if not drawn:
        return None
    rows = tuple(
        (
            str(layer.layer),
            tuple(
                Entry(n, share_step(n.value))
                for n in (
                    number(share, f"{row.at}/routing/layers/{i}/experts/{e}", "share")
                    for e, share in enumerate(layer.experts)
                )
            ),
        )
        for i, layer in drawn
    )
    caption = f"Share of an expert's tokens that the build sends to it too, {row.label}"
    most = max(len(layer.experts) for _, layer in drawn)
    return Table(caption, "layer", tuple(map(str, range(most))), rows)
