"""Widths from a budget: the best choice at the size, in groups that the formats can hold."""

from itertools import combinations

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.mixed_precision.budget import (
    open_choices,
    predicted_kld,
    settle_widths,
)
from lfmq.converter.mixed_precision.size_limits import parse_budget
from lfmq.converter.mixed_precision.width_groups import expert_groups
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan, token_bytes
from lfmq.converter.plan.presets import peer_bytes
from lfmq.converter.plan.recipe import load_recipe, save_recipe
from lfmq.converter.run.planned import plan_layouts
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.plan import Role
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import RecipeError, ValidationError


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def statistics(sample_statistics) -> Statistics:
    return sample_statistics


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
        size(sample, resolve_plan(sample.config, load_recipe(r)), name) for r in ("int4", "int8")
    )
    limit = int(least + share * (most - least))
    widths = settle_widths(sample, load_recipe("int4"), of(name), statistics, f"{limit}B")
    nbytes = size(sample, widths.plan, name)
    assert nbytes <= limit
    each = sum(e.size for e in widths.units[0].entries) // 2
    if sum(widths.choice) < len(widths.units):
        assert limit - nbytes < each + 8192  # a header grows with exceptions
    assert len(widths.units) == {"gguf": 12, "mlx": 12, "onnx": 64}[name]


def test_no_other_choice_of_that_size_is_better(sample, statistics):
    """All of them tried: twelve stacks, five at 8 bits."""
    base = resolve_plan(sample.config, load_recipe("int4"))
    step = sum(e.size for e in base.entries if e.expert is not None) // 12 // 2
    limit = size(sample, base, "gguf") + 5 * step + 4096
    widths = settle_widths(sample, load_recipe("int4"), of("gguf"), statistics, f"{limit}B")
    assert sum(widths.choice) == 5
    choices = open_choices(
        sample.config, sample.assets, load_recipe("int4"), statistics, of("gguf")
    )
    found = [
        choices.kld(tuple(int(i in wide) for i in range(12)))
        for wide in combinations(range(12), 5)
    ]
    assert widths.kld == pytest.approx(min(found), rel=1e-3)
    assert widths.kld == pytest.approx(choices.kld(widths.choice), rel=1e-9)


@pytest.mark.parametrize(
    ("names", "groups"),
    [(["gguf"], 12), (["gguf", "mlx"], 12), (["onnx"], 64), (["gguf", "onnx"], 4)],
)
def test_units_suit_all_formats(sample, statistics, names, groups):
    plan = resolve_plan(sample.config, load_recipe("int4"))
    found = expert_groups(plan, of(*names))
    assert len(found) == groups
    assert sum(len(unit.entries) for unit in found) == 192
    widths = settle_widths(sample, load_recipe("int4"), of(*names), statistics, "7.2bpw")
    plan_layouts(sample, widths.plan, of(*names))  # which checks that each can hold it


def test_the_choice_is_a_recipe(sample, statistics, tmp_path):
    widths = settle_widths(sample, load_recipe("int4-mixed"), of("onnx"), statistics, "7bpw")
    assert widths.recipe.name == "int4-mixed"
    save_recipe(tmp_path / "mine.toml", widths.recipe)
    again = load_recipe(str(tmp_path / "mine.toml"))
    assert again.budget is None
    assert resolve_plan(sample.config, again).entries == widths.plan.entries
    with pytest.raises(RecipeError, match="cannot be written"):
        save_recipe(tmp_path / "mine.toml", widths.recipe)


def test_a_built_in_budget(sample, statistics):
    widths = settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), statistics)
    weights = sum(e.size for e in widths.plan.entries)
    assert 8 * size(sample, widths.plan, "gguf") / weights <= 5.69


def test_prediction_without_a_budget(sample, statistics):
    klds = [
        predicted_kld(statistics, resolve_plan(sample.config, load_recipe(name)))
        for name in ("int8", "int4")
    ]
    assert None not in klds
    assert klds == sorted(klds)  # type: ignore[type-var]
    widths = settle_widths(sample, load_recipe("int4"), of("gguf"), statistics)
    assert (widths.kld, widths.units) == (klds[1], ())


def test_too_small(sample, statistics):
    with pytest.raises(RecipeError, match=r"budget of 2,108,216 bytes: gguf needs 11,"):
        settle_widths(sample, load_recipe("int4"), of("gguf"), statistics, "1bpw")


def test_nothing_to_choose_by(sample, statistics):
    with pytest.raises(RecipeError, match="give --statistics FILE"):
        settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), None)
    bare = Statistics(statistics.identity, (), 1, statistics.inputs, {}, {}, {})
    with pytest.raises(ValidationError, match="no losses"):
        settle_widths(sample, load_recipe("int4-mixed"), of("gguf"), bare)
    assert settle_widths(sample, load_recipe("int4"), of("gguf"), bare).kld is None


@pytest.mark.parametrize("name", ["gguf", "mlx", "onnx"])
def test_any_weight_within_both_limits(sample, statistics, name):
    base = load_recipe("int4").limited(budget="14MB", token_budget="4.6MB", choose="all")
    widths = settle_widths(sample, base, of(name), statistics)
    layout = plan_layouts(sample, widths.plan, of(name))[name]
    assert layout.nbytes <= 14e6
    assert 4.4e6 < token_bytes(widths.plan, layout) <= 4.6e6
    assert {e.role for u in widths.units for e in u.entries} >= {"embedding", "conv", "expert_up"}
    again = resolve_plan(sample.config, widths.recipe)
    assert again.entries == widths.plan.entries


def test_looser_limits_cost_no_more(sample, statistics):
    klds = []
    for limit in (13, 14, 15, 16):
        base = load_recipe("int4").limited(budget=f"{limit}MB", choose="all")
        klds.append(settle_widths(sample, base, of("mlx"), statistics).kld or 0.0)
    assert klds == sorted(klds, reverse=True)


def test_as_fast_as_the_usual_build(sample, statistics):
    widths = settle_widths(sample, load_recipe("int4-fast"), of("mlx"), statistics)
    layout = plan_layouts(sample, widths.plan, of("mlx"))["mlx"]
    assert token_bytes(widths.plan, layout) <= peer_bytes("mlx-4bit", sample.config)[1]
    with pytest.raises(RecipeError, match="sets no limit for compressed-tensors"):
        settle_widths(sample, load_recipe("int4-fast"), of("compressed-tensors"), statistics)


def test_limits_that_cannot_be_kept(sample, statistics):
    base = load_recipe("int4").limited(token_budget="1MB", choose="all")
    with pytest.raises(RecipeError, match=r"budget of 1,000,000 bytes a token: gguf needs 3,"):
        settle_widths(sample, base, of("gguf"), statistics)


@pytest.fixture(scope="module")
def dense(sample_dense_folder):
    return open_checkpoint(sample_dense_folder)


@pytest.fixture(scope="module")
def dense_statistics(dense) -> Statistics:
    path = dense.folder.parent / "calibration.jsonl"
    windows = load_windows([path], dense.assets, dense.config, tokens=2048, sequence=128)
    return collect(dense, windows)[0]


@pytest.mark.parametrize("name", ["gguf", "compressed-tensors"])
def test_a_budget_chooses_among_a_dense_models_feed_forward(dense, dense_statistics, name):
    narrow, wide = (resolve_plan(dense.config, load_recipe(r)) for r in ("int4", "int8"))
    limit = (size(dense, narrow, name) + size(dense, wide, name)) // 2
    widths = settle_widths(dense, load_recipe("int4"), of(name), dense_statistics, f"{limit}B")
    assert {entry.role for unit in widths.units for entry in unit.entries} == {Role.DENSE}
    assert 0 < sum(widths.choice) < len(widths.units) == {"gguf": 18}.get(name, 12)
    assert size(dense, widths.plan, name) <= limit
    assert widths.routed == 0
    least, most = (predicted_kld(dense_statistics, plan) for plan in (wide, narrow))
    assert least is not None
    assert widths.kld is not None
    assert most is not None
    assert 0 < least < widths.kld < most


def test_a_dense_model_as_fast_as_the_usual_build(dense, dense_statistics):
    widths = settle_widths(dense, load_recipe("int4-fast"), of("gguf"), dense_statistics)
    usual = peer_bytes("q4_k_m", dense.config)
    layout = plan_layouts(dense, widths.plan, of("gguf"))["gguf"]
    assert token_bytes(widths.plan, layout) <= usual[1]
    own = predicted_kld(dense_statistics, resolve_plan(dense.config, load_recipe("q4_k_m")))
    assert own is not None
    assert widths.kld is not None
    assert widths.kld <= own


def test_a_budget_below_what_a_dense_model_needs(dense, dense_statistics):
    with pytest.raises(RecipeError, match="raise the budget or give other weights fewer bits"):
        settle_widths(dense, load_recipe("int4-mixed"), of("gguf"), dense_statistics)
