"""Where the names of points in a drawing stand: covering neither each other nor the points."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["start", "middle", "end"]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# Of the page's font at 12 pixels: a character's width, and a line above and below its baseline.
_WIDTH, _ABOVE, _BELOW = 6.6, 9.5, 2.5
_MARKER = 4.5  # half of a point's width
# From the point to where its name is anchored. Names of points on a falling curve stand below it.
_BESIDE: tuple[tuple[float, float, Anchor], ...] = (
    (6, -6, "start"),
    (6, 15, "start"),
    (-6, -6, "end"),
    (9, 4, "start"),
    (0, -10, "middle"),
    (-9, 4, "end"),
    (6, -18, "start"),
    (-6, -18, "end"),
)
_UNDER: tuple[tuple[float, float, Anchor], ...] = (
    (-4, 15, "end"),
    (0, 18, "middle"),
    (-8, 4, "end"),
    (-4, 26, "end"),
)


@dataclass(frozen=True, slots=True)
class Label:
    """A name's baseline and which end of it stands there."""

    x: float
    y: float
    anchor: Anchor

    def box(self, text: str) -> Box:
        """What the name covers."""
        width = _WIDTH * len(text)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - _ABOVE, left + width, self.y + _BELOW


def place_labels(
    points: Sequence[tuple[float, float, str]], under: Sequence[bool], within: Box
) -> list[Label]:
    """A place for each name: the first that is free, or the one that covers least.

    Args:
        points: x, y and name.
        under: whether the name belongs below its point.
        within: what no name may leave.
    """
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y, _ in points]
    places = []
    for (x, y, text), below in zip(points, under, strict=True):
        tried = [Label(x + dx, y + dy, a) for dx, dy, a in (_UNDER if below else _BESIDE)]
        best = min(tried, key=lambda place: _covered(place.box(text), taken, within))
        taken.append(best.box(text))
        places.append(best)
    return places


def _covered(box: Box, taken: Sequence[Box], within: Box) -> float:
    """Area of others that a box covers, and of itself that is outside."""
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_common(box, other) for other in taken) + whole - _common(box, within)


def _common(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
