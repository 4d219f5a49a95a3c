"""The page's tables: builds down; layers, margins, domains or positions across."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lfmq.validation.pages.document import Build, Located
from lfmq.validation.pages.numbers import Kind
from lfmq.validation.pages.scales import floor_step, share_step

# Where a number of a series belongs: a layer, a domain, the two ends of a bin.
Place = tuple[object, ...]
# A table with more is turned, builds across, so that it fits a screen and a sheet.
_MOST_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell: a number of the document and its step on the colour scale, or neither."""

    found: Located | None
    step: int | None


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
    kind: Kind
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
    """A figure of one row: what is at each place."""

    label: str
    places: dict[Place, Located]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure to tabulate: its key at each place, how it is shown, and what a place is."""

    key: str
    caption: str
    kind: Kind = "share"
    scale: str = "share"
    where: str = ""


def tabulate(at: Located, builds: Sequence[Build]) -> Tables:
    """All tables that the document has figures for."""
    return Tables(
        quantiles=_quantiles(builds),
        layers=_layers(at, builds),
        margins=_margins(builds),
        domains=_domains(at, builds),
        positions=_positions(at, builds),
        experts=tuple(t for b in builds if (t := _experts(b)) is not None),
    )


def _series(label: str, listed: Located | None, place: tuple[str, ...]) -> Series:
    """The objects of a list, by the keys that say where each belongs."""
    objects = [] if listed is None else list(listed)
    return Series(label, {tuple(x.value[key] for key in place): x for x in objects})


def _table(
    series: Sequence[Series],
    wanted: Wanted,
    name: Callable[[Place], str],
    floors: Callable[[Place], float | None] = lambda _: None,
) -> Table | None:
    """Rows that have the figure anywhere, columns that any row has; None without any row."""
    shown = [s for s in series if any(x.get(wanted.key) for x in s.places.values())]
    if not shown:
        return None
    places = list(dict.fromkeys(place for s in shown for place in s.places))
    rows = []
    for s in shown:
        cells = [s.places[p].get(wanted.key) if p in s.places else None for p in places]
        entries = (
            Entry(cell, _step(cell, wanted, floors(place)))
            for cell, place in zip(cells, places, strict=True)
        )
        rows.append((s.label, tuple(entries)))
    names = tuple(map(name, places))
    if len(places) <= _MOST_COLUMNS:
        return Table(wanted.caption, "build", names, tuple(rows), wanted.kind, wanted.scale)
    turned = tuple(zip(names, zip(*(cells for _, cells in rows), strict=True), strict=True))
    labels = tuple(label for label, _ in rows)
    return Table(wanted.caption, wanted.where, labels, turned, wanted.kind, wanted.scale)


def _step(cell: Located | None, wanted: Wanted, floor: float | None) -> int | None:
    if cell is None or not wanted.scale:
        return None
    if wanted.scale == "share":
        return share_step(cell.value)
    if wanted.kind == "share":  # what disagrees, over what disagrees at the noise floor
        return None if floor is None else floor_step(1 - cell.value, 1 - floor)
    return floor_step(cell.value, floor)


def _tables(*found: Table | None) -> tuple[Table, ...]:
    return tuple(table for table in found if table is not None)


def _quantiles(builds: Sequence[Build]) -> tuple[Table, ...]:
    keys = ("mean", "stderr", "median", "p99", "max")
    rows = tuple(
        (b.label, tuple(Entry(b.found.get("kld", k), None) for k in keys)) for b in builds
    )
    columns = ("mean", "standard error", "median", "99th percentile", "largest")
    return (Table("KL divergence of a position, nats", "build", columns, rows, "nats"),)


def _layers(at: Located, builds: Sequence[Build]) -> tuple[Table, ...]:
    floor = _series("noise floor", at.get("noise_floor", "layers"), ("layer",))
    layers = (_series(b.label, b.found.get("routing", "layers"), ("layer",)) for b in builds)
    series = [floor, *layers]
    scale = "floor" if floor.places else "share"
    wanted = (
        Wanted("exact_set", "Same experts, by layer", "share", scale, where="layer"),
        Wanted(
            "local_exact_set",
            "Same experts given what the reference reads (local), by layer",
            where="layer",
        ),
        Wanted("load_shift", "Shift of the expert load, by layer", "nats", "", where="layer"),
    )
    return _tables(
        *(_table(series, w, lambda p: str(p[0]), _floor_of(at, floor, w.key)) for w in wanted)
    )


def _margins(builds: Sequence[Build]) -> tuple[Table, ...]:
    series = [_series(b.label, b.found.get("routing", "margins"), ("low", "high")) for b in builds]
    caption = "Same experts, by the gap between the last chosen and the first rejected expert"
    pairs = [Series("(token, layer) pairs", series[0].places)] if series else []
    return _tables(
        _table(series, Wanted("exact_set", caption), _gap),
        _table(pairs, Wanted("pairs", "How many pairs have which gap", "count", ""), _gap),
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


def _domains(at: Located, builds: Sequence[Build]) -> tuple[Table, ...]:
    floor = _by_name("noise floor", at.get("noise_floor", "domains"))
    series = [floor, *(_by_name(b.label, b.found.get("domains")) for b in builds)]
    wanted = (
        Wanted("kld_mean", "Mean KLD, nats, by domain", "nats", "floor", where="domain"),
        Wanted("top1_agreement", "Same top token, by domain", "share", "floor", where="domain"),
        Wanted("routing_exact_set", "Same experts, by domain", "share", "floor", where="domain"),
        Wanted("perplexity_ratio", "Perplexity ratio, by domain", "ratio", "", where="domain"),
    )
    return _tables(
        *(_table(series, w, lambda p: str(p[0]), _floor_of(at, floor, w.key)) for w in wanted)
    )


def _by_name(label: str, named: Located | None) -> Series:
    """The values of an object, by their keys."""
    return Series(label, {} if named is None else {(name,): named[name] for name in named.value})


def _positions(at: Located, builds: Sequence[Build]) -> tuple[Table, ...]:
    place = ("from", "to")
    floor = _series("noise floor", at.get("noise_floor", "positions"), place)
    series = [floor, *(_series(b.label, b.found.get("positions"), place) for b in builds)]
    wanted = (
        Wanted(
            "kld_mean",
            "Mean KLD, nats, by position in the window",
            "nats",
            "floor",
            where="position",
        ),
        Wanted(
            "top1_agreement",
            "Same top token, by position in the window",
            "share",
            "floor",
            where="position",
        ),
        Wanted(
            "routing_exact_set",
            "Same experts, by position in the window",
            "share",
            "floor",
            where="position",
        ),
    )
    return _tables(*(_table(series, w, _stretch, _floor_of(at, floor, w.key)) for w in wanted))


def _floor_of(at: Located, floor: Series, key: str) -> Callable[[Place], float | None]:
    """The noise floor at a place, or over all where it is not known there."""
    overall = at.number("noise_floor", key)

    def found(place: Place) -> float | None:
        own = floor.places[place].number(key) if place in floor.places else None
        return overall if own is None else own

    return found


def _stretch(place: Place) -> str:
    start, stop = place
    return f"{start:,} to {stop:,}"


def _experts(build: Build) -> Table | None:
    """The heat map's numbers: layers down, experts across."""
    layers = build.found.get("routing", "layers")
    drawn = [x for x in layers or () if x.get("experts")]
    if not drawn:
        return None
    most = max(len(x["experts"].value) for x in drawn)
    rows = tuple(
        (
            str(x.value["layer"]),
            tuple(Entry(e, share_step(e.value)) for e in x["experts"]),
        )
        for x in drawn
    )
    caption = f"Share of tokens that reach their expert, {build.label}"
    return Table(caption, "layer", tuple(map(str, range(most))), rows, "share", "")
