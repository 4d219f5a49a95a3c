"""The gate reads reports as ``--json`` writes them; these are cut to what it reads."""

import copy
from typing import Any

import pytest

from lfmq.quant.errors import ValidationError
from lfmq.validation.gate.judge import figure, judge
from lfmq.validation.gate.thresholds import FIGURES, RELATIVE, Thresholds

ROW = {
    "path": "new/m-int4.gguf",
    "engine": "read",
    "kld": {"mean": 0.003, "stderr": 0.0003, "p99": 0.05},
    "perplexity_ratio": 1.01,
    "perplexity_ratio_stderr": 0.002,
    "top1_agreement": 0.97,
    "top1_stderr": 0.003,
    "routing": {"exact_set": 0.98, "stderr": 0.001, "local_exact_set": None},
    "domains": {
        "en": {
            "kld_mean": 0.002, "perplexity_ratio": 1.0, "top1_agreement": 0.98,
            "routing_exact_set": 0.99,
        },
    },
}  # fmt: skip
FLOOR = {"kld_mean": 0.001, "routing_exact_set": 0.99}
GENERATION = {
    "tasks": 4,
    "answers": {"accuracy": 0.5, "reference_accuracy": 0.75, "n": 4},
    "tools": {"valid": 1.0, "right_function": 1.0, "right_arguments": 0.5, "n": 2},
    "capped": 0.25,
    "longest_repeat": {"max": 12, "mean": 3.0},
    "looped": 0.0,
    "length_ratio": 1.1,
    "same_text": 0.5,
}


def row(**changes):
    found: dict[str, Any] = copy.deepcopy(ROW)
    for place, value in changes.items():
        *parents, last = place.split("__")
        target = found
        for key in parents:
            target = target[key]
        target[last] = value
    return found


def native(exact_set=0.98, local=1.0):
    return row(engine="llama.cpp", routing__exact_set=exact_set, routing__local_exact_set=local)


def missed(*rows, **thresholds):
    document = {"builds": list(rows or (row(),)), "noise_floor": FLOOR}
    return judge(document, Thresholds(**thresholds))


def figures(*rows, **thresholds):
    return [f.figure for f in missed(*rows, **thresholds)]


def test_figures_are_places_in_the_json():
    assert figure(ROW, "kld.mean") == 0.003
    assert figure(ROW, "routing.local_exact_set") is None
    assert figure(ROW, "kld.mean.deeper") is None
    assert figure({"kld": True}, "kld") is None
    assert figure({"kld": float("nan")}, "kld") is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, []),
        ({"max_kld": 0.003, "max_perplexity_ratio": 1.01, "min_routing": 0.98}, []),
        ({"max_kld": 0.0029}, ["kld.mean"]),
        ({"max_kld_p99": 0.04}, ["kld.p99"]),
        ({"max_perplexity_ratio": 1.0}, ["perplexity_ratio"]),
        ({"min_top1": 0.98}, ["top1_agreement"]),
        ({"min_routing": 0.981}, ["routing.exact_set"]),
        ({"max_kld_over_floor": 3.0}, []),
        ({"max_kld_over_floor": 2.9}, ["kld.mean"]),
        ({"max_routing_below_floor": 0.011}, []),
        ({"max_routing_below_floor": 0.009}, ["routing.exact_set"]),
    ],
)
def test_limits_name_what_missed_them(limits, expected):
    assert figures(limits=limits) == expected


def test_every_limit_is_of_one_kind():
    assert not set(FIGURES) & set(RELATIVE)


def test_a_failure_has_the_figure_the_limit_and_the_reason():
    (failure,) = missed(limits={"max_kld_over_floor": 2.0})
    assert (failure.path, failure.engine) == ("new/m-int4.gguf", "read")
    assert (failure.found, failure.limit) == (0.003, 0.002)
    assert failure.why == "max_kld_over_floor = 2 times the noise floor's 0.001"


def test_a_figure_that_is_not_a_number_misses():
    (failure,) = missed(row(kld__mean=None), limits={"max_kld": 1.0})
    assert failure.found is None


def test_local_routing_is_of_the_native_row():
    limits = {"min_local_routing": 0.999}
    assert figures(row(), native(), limits=limits) == []
    assert [f.engine for f in missed(row(), native(local=0.5), limits=limits)] == ["llama.cpp"]
    (failure,) = missed(row(), limits=limits)
    assert "--engine native" in failure.why


def test_a_runtime_must_route_as_its_weights_do_in_read():
    limits = {"max_routing_below_read": 0.01}
    assert figures(row(), native(0.975), limits=limits) == []
    (failure,) = missed(row(), native(0.9), limits=limits)
    assert (failure.engine, failure.limit) == ("llama.cpp", pytest.approx(0.97))
    (failure,) = missed(native(), limits=limits)
    assert "no row of --engine read" in failure.why


def test_what_a_build_says_otherwise_misses_without_a_limit():
    facts = [
        {"name": "bos_token_id", "found": 7, "expected": 1},
        {"name": "tokenizer.json", "found": "another in model", "expected": "its own"},
    ]
    first, second = missed(row(facts=facts), native() | {"facts": facts})
    assert (first.figure, first.found, first.limit) == ("facts.bos_token_id", 7, 1)
    assert (second.figure, second.found) == ("facts.tokenizer.json", None)
    assert second.why == "the build says another in model, the checkpoint its own"


def test_limits_of_a_domain():
    assert figures(domains={"en": {"max_kld": 0.002, "min_routing": 0.99}}) == []
    assert figures(domains={"en": {"min_top1": 0.99}}) == ["domains.en.top1_agreement"]
    (failure,) = missed(domains={"fr": {"max_kld": 1.0}})
    assert failure.found is None
    assert "the text has en" in failure.why


def test_limits_of_generation_hold_in_every_mode():
    able = row(generation={"greedy": GENERATION, "sampled": GENERATION | {"capped": 0.0}})
    assert figures(able, generation={"max_looped": 0, "min_tool_valid": 1}) == []
    assert figures(able, generation={"max_capped": 0.1}) == ["generation.greedy.capped"]
    assert figures(able, generation={"min_tool_arguments": 0.9}) == [
        "generation.greedy.tools.right_arguments",
        "generation.sampled.tools.right_arguments",
    ]
    assert (
        figures(able, generation={"max_repeat": 11})[0] == "generation.greedy.longest_repeat.max"
    )


def test_generation_that_never_ran_misses_once():
    assert figures(row(), native(), generation={"max_looped": 0}) == ["generation"]
    able = native() | {"generation": {"greedy": GENERATION}}
    assert figures(row(), able, generation={"max_looped": 0}) == []


def test_no_worse_than_the_baseline_but_for_chance():
    """Two standard errors of both: 2 * hypot(0.0003, 0.0003) = 0.00085."""
    before = {"builds": [row(path="old/m-int4.gguf")]}

    def against(*rows, **options):
        return figures(*rows, baseline=before, **options)

    assert against(row()) == []
    assert against(row(kld__mean=0.0038)) == []
    assert against(row(kld__mean=0.0039)) == ["kld.mean"]
    assert against(row(kld__mean=0.0038), tolerance=1.5) == ["kld.mean"]
    assert against(row(kld__mean=0.0001, top1_agreement=0.99)) == []
    assert against(row(perplexity_ratio=1.02, top1_agreement=0.96)) == [
        "perplexity_ratio",
        "top1_agreement",
    ]
    assert against(row(routing__exact_set=0.977)) == ["routing.exact_set"]
    (failure,) = missed(row(kld__mean=0.0039), baseline=before)
    assert "the baseline's 0.003 and 2 standard errors" in failure.why


def test_a_baseline_must_know_the_build():
    before = {"builds": [row(path="old/m-int4.gguf")]}
    with pytest.raises(ValidationError, match=r"no build m-int4.gguf in engine llama.cpp"):
        missed(native(), baseline=before)


def test_a_baseline_of_one_window_cannot_tell():
    before = {"builds": [row(kld__stderr=None)]}
    (failure,) = missed(baseline=before)
    assert failure.figure == "kld.mean"
    assert "standard error" in failure.why
