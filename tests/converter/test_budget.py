"""Widths from a budget: the best choice at the size, in groups that the formats can hold."""

from itertools import combinations

import pytest

from lfmq.converter.budget import (
    parse_budget,
    predicted_kld,
    save_recipe,
    settle_widths,
    width_groups,
)
from lfmq.converter.checkpoint import open_checkpoint
from lfmq.converter.collect import collect
from lfmq.converter.convert import plan_layouts
from lfmq.converter.plan import resolve_plan
from lfmq.converter.recipe import load_recipe
from lfmq.converter.statistics import Statistics
from lfmq.converter.text import load_windows
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import RecipeError, ValidationError


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def statistics(sample) -> Statistics:
    path = sample.folder.parent / "calibration.jsonl"
    windows = load_windows([path], sample.assets, sample.geometry, tokens=2048, sequence=128)
    return collect(sample, windows)[0]


def of(*names):
    return {name: FORMATS[name] for name in names}


def size(sample, plan, name):
    return plan_layouts(sample, plan, of(name))[name].nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5.5bpw", 687_500),
        ("800000", 800_000),
        ("0.5 MB", 500_000),
        ("2KiB", 2048),
        ("1gb", 10**9),
    ],
)
def test_budget_is_read(text, nbytes):
    assert parse_budget(text).nbytes(1_000_000) == nbytes


@pytest.mark.parametrize("text", ["", "x", "5.5 bits", "-3GB", "0", "5bpw extra", "1e9"])
def test_what_is_no_budget(text):
    with pytest.raises(RecipeError, match="expected bits per weight"):
        parse_budget(text)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 1.1])
@pytest.mark.parametrize("name", ["gguf", "mlx", "onnx"])
def test_the_budget_is_kept_and_spent(sample, statistics, name, share):
    least, most = (
        size(sample, resolve_plan(sample.geometry, load_recipe(r)), name) for r in ("int4", "int8")
    )
    limit = int(least + share * (most - least))
    widths = settle_widths(sample, load_recipe("int4"), of(name), statistics, f"{limit}B")
    nbytes = size(sample, widths.plan, name)
    assert nbytes <= limit
    each = sum(e.size for e in widths.groups[0].entries) // 2
    if len(widths.wide) < len(widths.groups):
        assert limit - nbytes < each + 8192  # a header grows with exceptions
    assert len(widths.groups) == {"gguf": 12, "mlx": 12, "onnx": 64}[name]


def test_no_other_choice_of_that_size_is_better(sample, statistics):
    """All of them tried: twelve stacks, five at 8 bits."""
    base = resolve_plan(sample.geometry, load_recipe("int4"))
    step = sum(e.size for e in base.entries if e.expert is not None) // 12 // 2
    limit = size(sample, base, "gguf") + 5 * step + 4096
    widths = settle_widths(sample, load_recipe("int4"), of("gguf"), statistics, f"{limit}B")
    assert len(widths.wide) == 5
    gains = [g.kld[0] - g.kld[1] for g in widths.groups]
    best = max(sum(c) for c in combinations(gains, 5))
    assert sum(gains[i] for i in widths.wide) == pytest.approx(best, rel=1e-12)
    assert widths.kld == pytest.approx(
        statistics.shared.kld + sum(g.kld[i in widths.wide] for i, g in enumerate(widths.groups))
    )


@pytest.mark.parametrize(
    ("names", "groups"),
    [(["gguf"], 12), (["gguf", "mlx"], 12), (["onnx"], 64), (["gguf", "onnx"], 4)],
)
def test_groups_suit_all_formats(sample, statistics, names, groups):
    plan = resolve_plan(sample.geometry, load_recipe("int4"))
    found = width_groups(plan, statistics, of(*names))
    assert len(found) == groups
    assert sum(len(g.entries) for g in found) == 192
    widths = settle_widths(sample, load_recipe("int4"), of(*names), statistics, "7.2bpw")
    plan_layouts(sample, widths.plan, of(*names))  # which checks that each can hold it


def test_the_choice_is_a_recipe(sample, statistics, tmp_path):
    widths = settle_widths(sample, load_recipe("int4-mixed"), of("onnx"), statistics, "7bpw")
    assert widths.recipe.name == "int4-mixed"
    save_recipe(tmp_path / "mine.toml", widths.recipe)
    again = load_recipe(str(tmp_path / "mine.toml"))
    assert again.budget is None
    assert resolve_plan(sample.geometry, again).entries == widths.plan.entries
    with pytest.raises(RecipeError, match="cannot be written"):
        save_recipe(tmp_path / "mine.toml", widths.recipe)


def test_a_built_in_budget(sample, statistics):
    widths = settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), statistics)
    weights = sum(e.size for e in widths.plan.entries)
    assert 8 * size(sample, widths.plan, "gguf") / weights <= 5.69


def test_prediction_without_a_budget(sample, statistics):
    klds = [
        predicted_kld(statistics, resolve_plan(sample.geometry, load_recipe(name)))
        for name in ("int8", "int4")
    ]
    assert None not in klds
    assert klds == sorted(klds)  # type: ignore[type-var]
    widths = settle_widths(sample, load_recipe("int4"), of("gguf"), statistics)
    assert (widths.kld, widths.groups) == (klds[1], ())


def test_too_small(sample, statistics):
    with pytest.raises(RecipeError, match=r"budget of 2,108,216 bytes: gguf needs 11,"):
        settle_widths(sample, load_recipe("int4"), of("gguf"), statistics, "1bpw")


def test_nothing_to_choose_by(sample, statistics):
    with pytest.raises(RecipeError, match="give --statistics FILE"):
        settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), None)
    bare = Statistics(statistics.identity, (), 1, statistics.inputs, {}, {})
    with pytest.raises(ValidationError, match="no losses"):
        settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), bare)
    assert settle_widths(sample, load_recipe("int4"), of("gguf"), bare).kld is None
