"""Places, ticks and steps of the page's charts."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from lfmq.validation.measure.report import ExpertError
from lfmq.validation.measure.routing import LayerRouting
from lfmq.validation.pages.charts import (
    WIDTH,
    Measured,
    forest,
    heat_map,
    histogram,
    layer_bars,
    scatter,
)
from lfmq.validation.pages.numbers import UNKNOWN, format_figure
from lfmq.validation.pages.scales import Scale, floor_step, scale_for, share_step

finite = st.floats(1e-9, 1e9)


@given(finite, finite, st.booleans())
@example(1e-9, 1.0000000000000003e-9, False)
@example(0.98, 0.98 + 1e-15, False)
@example(1e-9, 1e9, True)
def test_a_scale_shows_its_values_in_order(one, other, log):
    scale = scale_for([one, other, None, math.nan], 10, 110, log)
    assert scale is not None
    low, high = sorted((one, other))
    assert 10 <= scale.place(low) <= scale.place(high) <= 110
    ticks = scale.ticks()
    assert len(ticks) <= 6
    assert all(10 <= t.place <= 110 for t in ticks)
    assert [t.place for t in ticks] == sorted(t.place for t in ticks)
    assert len({t.label for t in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((1e-9, 1.0000000000000003e-9), ["9.9e-10", "9.95e-10", "1e-9", "1.005e-9", "1.01e-9"]),
        ((0.98, 0.98 + 1e-15), ["0.975", "0.98", "0.985"]),
        ((0.0, 0.0), ["-1", "-0.5", "0", "0.5", "1"]),
    ],
)
def test_values_equal_but_for_rounding_have_a_scale_around_them(values, labels):
    scale = scale_for(values, 0, 100)
    assert scale is not None
    assert [t.label for t in scale.ticks()] == labels
    assert scale.place(values[0]) == scale.place(values[1]) == 50


def test_a_log_scale_of_many_decades_has_ticks_at_decades():
    scale = scale_for([1e-9, 1e9], 0, 100, log=True)
    assert scale is not None
    assert [t.label for t in scale.ticks()] == ["1e-8", "0.0001", "1", "10,000", "100,000,000"]


def test_ticks_are_round():
    assert [t.label for t in Scale(0.0009, 0.012, 0, 1, log=True).ticks()] == [
        "0.001",
        "0.002",
        "0.005",
        "0.01",
    ]
    assert [t.label for t in Scale(0, 1, 0, 1).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    decades = [t.label for t in Scale(1e-7, 50, 0, 1, log=True).ticks()]
    assert decades == ["1e-6", "0.0001", "0.01", "1"]
    assert Scale(0, 1, 0, 100).place(7) == 100


def test_no_value_has_no_scale():
    assert scale_for([None, math.nan], 0, 1) is None
    assert scale_for([0.0, -1.0], 0, 1, log=True) is None


def test_steps():
    assert [share_step(v) for v in (1.0, 0.999, 0.9989, 0.95, 0.5, None)] == [0, 0, 1, 3, 6, None]
    assert [floor_step(v, 0.001) for v in (0.0, 0.0015, 0.0016, 1.0)] == [0, 0, 1, 6]
    assert floor_step(1.0, None) is None
    assert floor_step(1.0, 0.0) is None
    assert floor_step(None, 0.1) is None


def test_a_forest_leaves_out_what_is_no_number():
    rows = [Measured("a", 0.01, 0.009, 0.011), Measured("b", None, missed=True, limit=0.02)]
    chart = forest("t", rows, "nats", line=0.001, line_label="l", log=True)
    assert chart is not None
    a, b = chart.rows
    assert a.x is not None
    assert a.low is not None
    assert a.low < a.x
    assert (b.x, b.text, b.missed) == (None, UNKNOWN, True)
    assert a.limit is None
    assert b.limit is not None
    assert a.high is not None
    assert b.limit > a.high
    assert chart.line is not None
    assert chart.line < a.low
    assert forest("t", rows[1:], "nats", line=0.001, line_label="l") is None


def test_a_divergence_of_zero_is_not_drawn_on_a_log_axis():
    chart = forest("t", [Measured("a", 0.0)], "nats", line=0.1, line_label="l", log=True)
    assert chart is not None
    assert chart.rows[0].x is None
    assert chart.rows[0].text == "0.00000"


@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (22, 32), (38, 64), (1, 1)])
def test_a_heat_map_fits_its_width(layers, experts):
    found = [LayerRouting(i, 0.9, 0.9, 0.0, experts=(0.5,) * experts) for i in range(layers)]
    chart = heat_map(found)
    assert chart is not None
    assert len(chart.rows) == layers
    last = chart.rows[-1].cells[-1]
    assert last.x + chart.cell[0] < WIDTH - 40
    assert chart.height >= chart.rows[-1].y + chart.cell[1]
    assert len(chart.columns) <= 8


def test_a_heat_map_says_the_loads():
    layer = LayerRouting(2, 1.0, 1.0, 0.0, (0.0, 1.0), (0.25, 0.75), (math.nan, 0.98))
    chart = heat_map([layer])
    assert chart is not None
    none, some = chart.rows[0].cells
    assert none.step is None
    assert some.title == "layer 2, expert 1: 0.9800; load 1.0000, reference 0.7500"
    assert heat_map([LayerRouting(2, 1.0, 1.0, 0.0)]) is None


def test_a_histogram_counts_every_position():
    edges = [-3.0, -2.0, -1.0, 0.0]
    marks = [("mean", "mean", 0.02), ("p99", "p99", 0.5), ("median", "median", None)]
    chart = histogram(edges, [1, 0, 3], marks, 0.75, (-3.0, 0.0))
    assert chart is not None
    assert len(chart.bars) == 2
    first, last = chart.bars
    assert last.height == pytest.approx(3 * first.height, abs=0.2)
    assert first.title == "10^-3 to 10^-2 nats: 1 positions, 25.00%"
    assert [m.label for m in chart.marks] == ["mean", "p99"]
    assert [m.before for m in chart.marks] == [False, True]
    assert {t.label for t in chart.x_ticks} == {"10⁻³", "10⁻²", "10⁻¹", "10⁰"}
    assert histogram(edges, [0, 0, 0], [], 1.0, (-3.0, 0.0)) is None


def test_layers_and_experts_share_the_highest_value():
    chart = layer_bars([("embedding", 0.1), ("0", None), ("1", 0.2)], 0.2)
    assert chart is not None
    assert [b.height for b in chart.bars] == [55, 0, 110]
    assert [b.title.partition(":")[0] for b in chart.bars] == ["embedding", "layer 0", "layer 1"]
    assert [t.label for t in chart.x_ticks] == ["0", "1"]
    assert layer_bars([("0", 0.0)], 0.0) is None
    experts = [ExpertError(2, 0, 0, 0.1), ExpertError(2, 1, 1000, math.inf)]
    points = scatter(experts, 0.1)
    assert points is not None
    assert [p.title for p in points.bars] == ["layer 2, expert 0: error 0.10000, 0 tokens"]
    assert scatter([], 1.0) is None


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.00248, "nats", "0.00248"),
        (0.0000312, "nats", "3.1e-5"),
        (0, "nats", "0.00000"),
        (1234567, "count", "1,234,567"),
        (0.98167, "share", "0.9817"),
        (0.0123456, "percent", "1.235 %"),
        (1.00103, "ratio", "1.00103"),
        (12345.678, "perplexity", "12,345.678"),
        (0.005, "number", "0.005"),
        (float("inf"), "nats", UNKNOWN),
        (None, "share", UNKNOWN),
    ],
)
def test_figures_as_text(value, kind, text):
    assert format_figure(value, kind) == text
