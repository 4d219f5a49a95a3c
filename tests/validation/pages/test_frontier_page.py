"""The frontier: points on the curve, landmarks beside it, a recipe from a point, the page."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from lfmq.cli import main
from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.mixed_precision.frontier import trace_frontier
from lfmq.converter.plan.plan import resolve_plan, token_bytes
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.planned import plan_layouts
from lfmq.converter.statistics.statistics import save_statistics
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import LfmqError
from lfmq.validation.pages.frontier_page import render_frontier


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def statistics(sample_statistics):
    return sample_statistics


@pytest.fixture(scope="module")
def frontier(sample, statistics):
    return trace_frontier(sample, statistics, "mlx", FORMATS["mlx"])


@pytest.mark.parametrize("kind", ["size", "token"])
def test_more_bytes_cost_less_divergence(frontier, kind):
    points = [p for p in frontier.points if p.kind == kind]
    taken = [p.nbytes if kind == "size" else p.token_bytes for p in points]
    klds = [p.kld for p in points]
    assert len(points) > 8
    assert taken == sorted(taken)
    assert klds == sorted(klds, reverse=True)
    assert klds[0] > 5 * klds[-1]


def test_no_recipe_is_better_at_its_size(frontier):
    points = [p for p in frontier.points if p.kind == "size"]
    for recipe in (p for p in frontier.points if p.kind == "recipe"):
        smaller = [p.kld for p in points if p.nbytes <= recipe.nbytes]
        larger = [p.kld for p in points if p.nbytes >= recipe.nbytes]
        assert min(larger, default=0.0) <= recipe.kld * 1.001
        assert not smaller or min(smaller) < recipe.kld * 1.5


def test_other_tools_types_are_points_once(sample, statistics):
    found = trace_frontier(sample, statistics, "gguf", FORMATS["gguf"]).points
    names = [point.name for point in found]
    assert len(names) == len(set(names))
    assert {"q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0"} <= set(names)


def test_a_point_is_a_recipe(sample, frontier):
    for number in (1, 5, 20):
        point = next(p for p in frontier.points if p.name == str(number))
        plan = resolve_plan(sample.config, frontier.recipe(number))
        layout = plan_layouts(sample, plan, {"mlx": FORMATS["mlx"]})["mlx"]
        assert layout.nbytes == pytest.approx(
            point.nbytes, rel=2e-3
        )  # the config names exceptions
        assert token_bytes(plan, layout) == pytest.approx(point.token_bytes, abs=8)
    with pytest.raises(LfmqError, match="numbered 1 to"):
        frontier.recipe(99)


class _Page(HTMLParser):
    """Tags that fetch or run something, and texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") and v != "data:,"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing(frontier):
    page = _Page()
    text = render_frontier(replace(frontier, checkpoint="<b>tiny & co</b>"))
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5  # three keys, two drawings
    assert not page.sources
    assert not re.search(r"https?://|\sstyle=", text)
    assert "<b>tiny" not in text
    shown = " ".join(page.text)
    for point in frontier.points:
        assert f"{point.nbytes:,}" in shown


def test_the_command(sample, statistics, tmp_path):
    saved, page, file = tmp_path / "mine.toml", tmp_path / "f.html", tmp_path / "s"
    save_statistics(file, statistics)
    command = ["frontier", "sample", "--statistics", str(file), "--to", "gguf"]
    run = CliRunner().invoke(
        main, [*command, "--html", str(page), "--point", "3", "--save", str(saved), "--json"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert {"checkpoint", "format", "weights", "points"} == set(found)
    assert page.read_text("utf-8").startswith("<!doctype html>")
    resolve_plan(sample.config, load_recipe(str(saved)))
    assert CliRunner().invoke(main, [*command, "--point", "3"]).exit_code == 2
