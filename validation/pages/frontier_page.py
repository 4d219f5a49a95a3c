"""The frontier as one HTML page that needs no network and no script."""

import base64
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lfmq.converter.mixed_precision.frontier import Frontier, Point
from lfmq.validation.pages.labels import Label, place_labels
from lfmq.validation.pages.numbers import format_figure
from lfmq.validation.pages.scales import Tick, scale_for

_FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, WIDTH - 16, 12, HEIGHT - 46
_PLOT = (_LEFT, _TOP, WIDTH, _BOTTOM)
_STYLE = """
.best { fill: none; stroke: var(--data); stroke-width: 2; }
.size circle, .token circle { fill: var(--data); }
.recipe circle { fill: var(--good); }
.peer path { fill: var(--bad); }
.drawing { max-width: 52rem; }
"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A point in a drawing."""

    x: float
    y: float
    name: str
    kind: str
    title: str
    label: Label


@dataclass(frozen=True, slots=True)
class Chart:
    """Predicted divergence over one kind of bytes."""

    title: str
    axis: str
    line: str
    points: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def render_frontier(frontier: Frontier) -> str:
    """The page of a frontier: two drawings and a table of all points."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_FOLDER / "page.css").read_text("utf-8") + _STYLE
    charts = [
        _chart(frontier.points, "size", "Size of the build", lambda p: p.nbytes),
        _chart(frontier.points, "token", "Bytes read for a token", lambda p: p.token_bytes),
    ]
    rows = [
        (
            point.name,
            point.kind,
            f"{point.nbytes:,}",
            f"{8 * point.nbytes / frontier.weights:.3f}",
            f"{point.token_bytes:,}",
            format_figure(point.kld, "nats"),
        )
        for point in frontier.points
    ]
    return environment.get_template("frontier.html.j2").render(
        frontier=frontier,
        charts=[chart for chart in charts if chart is not None],
        rows=rows,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        size=(WIDTH, HEIGHT),
        box=(_LEFT, _RIGHT, _TOP, _BOTTOM),
    )


def _chart(
    points: Iterable[Point], kind: str, title: str, amount: Callable[[Point], int]
) -> Chart | None:
    shown = [(p, p.kld) for p in points if p.kld and p.kind in (kind, "recipe", "peer")]
    most = max((amount(p) for p, _ in shown), default=0)
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    x = scale_for([amount(p) / unit for p, _ in shown], _LEFT, _RIGHT, log=False)
    y = scale_for([kld for _, kld in shown], _BOTTOM, _TOP, log=True)
    if x is None or y is None:
        return None
    spots = [(x.place(amount(p) / unit), y.place(kld), p.name) for p, kld in shown]
    # nothing lies below the frontier, whose numbers stand there
    labels = place_labels(spots, [p.kind == kind for p, _ in shown], _PLOT)
    drawn = tuple(
        Drawn(*spot, point.kind, _title(point, kld), label)
        for spot, (point, kld), label in zip(spots, shown, labels, strict=True)
    )
    line = " ".join(
        f"{'L' if i else 'M'}{d.x},{d.y}"
        for i, d in enumerate(sorted((d for d in drawn if d.kind == kind), key=lambda d: d.x))
    )
    return Chart(title, f"{title}, {name}", line, drawn, x.ticks(8), y.ticks())


def _title(point: Point, kld: float) -> str:
    return (
        f"{point.name}: {point.nbytes:,} bytes, {point.token_bytes:,} a token, "
        f"{format_figure(kld, 'nats')} nats"
    )
