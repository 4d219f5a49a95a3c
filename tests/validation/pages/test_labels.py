"""Names beside points: no two over each other, none over a point where there is room."""

import itertools

import pytest

from lfmq.validation.pages.labels import Label, place_labels

WITHIN = (0.0, 0.0, 600.0, 300.0)


def boxes(points, under):
    labels = place_labels(points, under, WITHIN)
    return [label.box(point[2]) for label, point in zip(labels, points, strict=True)]


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@pytest.mark.parametrize(
    "points",
    [
        [(100, 100, "int4"), (100, 100, "int4-mixed")],
        [(100, 100, "q4_0"), (125, 103, "int4-all"), (127, 115, "q4_k_m")],
        [(590, 290, "int8"), (590, 290, "q8_0")],
    ],
)
def test_names_close_together(points):
    found = boxes(points, [False] * len(points))
    for a, b in itertools.combinations(found, 2):
        assert not overlap(a, b)
    for left, top, right, bottom in found:
        assert left >= 0
        assert top >= 0
        assert right <= 600
        assert bottom <= 300
    for x, y, _ in points:
        assert not any(overlap(box, (x - 4, y - 4, x + 4, y + 4)) for box in found)


def test_numbers_of_a_falling_curve_stand_below_it():
    points = [(100.0 + 40 * i, 200.0 - 100 / (i + 1), str(i)) for i in range(8)]
    for (x, y, _), box in zip(points, boxes(points, [True] * 8), strict=True):
        assert box[1] > y
        assert box[0] < x


def test_a_name_alone_stands_above_and_behind():
    assert place_labels([(50, 50, "q6_k")], [False], WITHIN) == [Label(56, 44, "start")]
