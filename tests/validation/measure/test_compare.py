import json
from dataclasses import replace

import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.compare import compare, differences
from lfmq.validation.measure.predictions import PositionScores
from lfmq.validation.measure.runs import Comparison

SEQUENCE = 128


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def run(sample, sample_folder):
    text = sample_folder.parent / "evaluation.jsonl"

    def make(a, b, windows=22):
        tokens = load_windows(
            [text], sample.assets, sample.config, tokens=windows * SEQUENCE, sequence=SEQUENCE
        )
        return compare(sample, a, b, tokens)

    return make


@pytest.fixture(scope="module")
def build(sample, tmp_path_factory):
    def make(recipe):
        loaded = load_recipe(recipe)
        plan = resolve_plan(sample.config, loaded)
        output = tmp_path_factory.mktemp("builds")
        (found,) = convert(sample, loaded, plan, {"gguf": FORMATS["gguf"]}, output)
        return found.path

    return make


def made_up(offset: float) -> Comparison:
    """A run whose every figure is worse the larger the offset."""
    rng = np.random.default_rng(0)
    nll = rng.random((20, 8))
    same = rng.random((20, 8)) < 0.9 - offset
    scores = PositionScores(nll, nll + offset, nll / 100 + offset, same)
    return Comparison(scores, None, np.clip(nll - offset, 0, 1))


def test_the_better_of_two_is_the_nearer():
    near, far = made_up(0.0), made_up(0.3)
    assert [d.better for d in differences(near, far)] == ["a"] * 5
    assert [d.better for d in differences(far, near)] == ["b"] * 5
    for d in differences(near, far):
        assert d.interval.low <= d.difference <= d.interval.high
        assert d.difference == d.b - d.a


def test_a_dense_model_is_not_compared_in_its_routing():
    near, far = (replace(made_up(offset), same_sets=None) for offset in (0.0, 0.3))
    found = differences(near, far)
    assert [d.figure.key for d in found] == [
        "kld.mean",
        "perplexity",
        "top1_agreement",
        "rms_delta_p",
    ]


def test_int8_and_int4_are_told_apart(build, run):
    found = run(build("int4"), build("int8"))
    by_name = {d.figure.key: d for d in found.figures}
    assert list(by_name) == [
        "kld.mean",
        "perplexity",
        "top1_agreement",
        "rms_delta_p",
        "routing.exact_set",
    ]
    for name in ("kld.mean", "top1_agreement", "rms_delta_p", "routing.exact_set"):
        assert by_name[name].better == "b", name
        assert not by_name[name].equal
        assert by_name[name].difference == by_name[name].b - by_name[name].a
    assert found.top1.p < 0.05
    assert found.top1.only_b > found.top1.only_a


def test_two_conversions_of_the_same_build_are_equal(build, run):
    found = run(build("int4"), build("int4"))
    assert found.a.path != found.b.path
    for d in found.figures:
        assert (d.difference, d.interval.low, d.interval.high) == (0.0, 0.0, 0.0)
        assert d.equal
        assert d.better is None
    assert (found.top1.only_a, found.top1.only_b, found.top1.p) == (0, 0, 1.0)


def test_one_window_shows_nothing(build, run):
    found = run(build("int4"), build("int8"), windows=1)
    assert {d.better for d in found.figures} == {None}
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [d["ci95"] for d in document["figures"]] == [None] * 5
    assert document["a"]["engine"] == "read"
    assert document["conditions"]["sequence"] == SEQUENCE
