"""The gate reads a report; here its builds have just the figures that the gate reads."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from lfmq.quant.errors import ValidationError
from lfmq.tests.validation.reports import estimates, with_figure
from lfmq.validation.gate.judge import judge
from lfmq.validation.gate.thresholds import LIMITS, RELATIVE, Thresholds
from lfmq.validation.measure.figures import (
    KLD,
    KLD_P99,
    LOCAL_ROUTING,
    PERPLEXITY_RATIO,
    RMS_DELTA_P,
    ROUTING,
    TOP1,
    Estimate,
    Figure,
)
from lfmq.validation.measure.generation import (
    AnswerFigures,
    GenerationFigures,
    HealthFigures,
    RepeatFigures,
    ToolFigures,
)
from lfmq.validation.measure.metadata import Fact
from lfmq.validation.measure.report import BuildReport, Conditions, Histogram, NoiseFloor, Report
from lfmq.validation.measure.routing import LayerRouting, RoutingAgreement

FIGURES: Mapping[Figure, Estimate] = {
    KLD: Estimate(0.003, 0.0003),
    KLD_P99: Estimate(0.05),
    PERPLEXITY_RATIO: Estimate(1.01, 0.002),
    TOP1: Estimate(0.97, 0.003),
    RMS_DELTA_P: Estimate(0.01, 0.001),
    ROUTING: Estimate(0.98, 0.001),
}
FLOOR = NoiseFloor(estimates({KLD: 0.001, ROUTING: 0.99}), {}, {}, ())
REPEATS = RepeatFigures(12, 3.0)
GENERATION = GenerationFigures(
    tasks=4,
    runs=1,
    answers=AnswerFigures(0.5, 0.75, 4),
    tools=ToolFigures(1.0, 1.0, 0.5, 1.0, 2),
    capped=0.25,
    longest_repeat=REPEATS,
    looped=0.0,
    length_ratio=1.1,
    same_text=0.5,
    reference=HealthFigures(0.0, REPEATS, 0.0),
    new_tokens=8,
    sampling=None,
    tasks_sha256="00",
)


def row(
    values: Mapping[Figure, Estimate | float] | None = None,
    path: str = "new/m-int4.gguf",
    **changes: Any,
) -> BuildReport:
    found = BuildReport(
        path=path,
        format="gguf",
        engine="read",
        engine_version="lfmq 0",
        nbytes=1,
        bits_per_weight=4.5,
        figures=FIGURES,
        histogram=Histogram((), ()),
        routing=RoutingAgreement((LayerRouting(2, 0.98, 0.99, 0.0),)),
        domains={"en": estimates({KLD: 0.002, PERPLEXITY_RATIO: 1.0, TOP1: 0.98, ROUTING: 0.99})},
        positions=(),
    )
    for figure, value in (values or {}).items():
        if not isinstance(value, Estimate):
            value = Estimate(value, FIGURES[figure].stderr if figure in FIGURES else None)
        found = with_figure(found, figure, value)
    return replace(found, **changes)


def native(exact_set=0.98, local=1.0):
    return row({ROUTING: exact_set, LOCAL_ROUTING: local}, engine="llama.cpp")


def report(*rows: BuildReport) -> Report:
    conditions = Conditions("0", "2", 1, "cpu", 8, 64, "00")
    return Report("m", conditions, 32, 3.0, FLOOR, rows or (row(),))


def missed(*rows, **thresholds):
    return judge(report(*rows), Thresholds(**thresholds))


def figures(*rows, **thresholds):
    return [f.figure for f in missed(*rows, **thresholds)]


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
        ({"max_rms_delta_p": 0.02}, []),
        ({"max_rms_delta_p": 0.009}, ["rms_delta_p"]),
        ({"max_kld_over_floor": 3.0}, []),
        ({"max_kld_over_floor": 2.9}, ["kld.mean"]),
        ({"max_routing_below_floor": 0.011}, []),
        ({"max_routing_below_floor": 0.009}, ["routing.exact_set"]),
    ],
)
def test_limits_name_what_missed_them(limits, expected):
    assert figures(limits=limits) == expected


def test_every_limit_is_of_one_kind():
    assert not set(LIMITS) & set(RELATIVE)


def test_a_failure_has_the_figure_the_limit_and_the_reason():
    (failure,) = missed(limits={"max_kld_over_floor": 2.0})
    assert (failure.path, failure.engine) == ("new/m-int4.gguf", "read")
    assert (failure.found, failure.limit) == (0.003, 0.002)
    assert failure.why == "max_kld_over_floor = 2 times the noise floor's 0.001"


def test_a_figure_that_is_not_a_number_misses():
    (failure,) = missed(row({KLD: math.nan}), limits={"max_kld": 1.0})
    assert failure.found is None
    assert figures(row({PERPLEXITY_RATIO: math.inf}), limits={"max_perplexity_ratio": 2.0}) == [
        "perplexity_ratio"
    ]


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
    facts = (
        Fact("bos_token_id", 7, 1),
        Fact("tokenizer.json", "another in model", "its own"),
    )
    first, second = missed(row(facts=facts), replace(native(), facts=facts))
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
    able = row(generation={"greedy": GENERATION, "sampled": replace(GENERATION, capped=0.0)})
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
    able = replace(native(), generation={"greedy": GENERATION})
    assert figures(row(), able, generation={"max_looped": 0}) == []


def test_no_worse_than_the_baseline_but_for_chance():
    """Two standard errors of both: 2 * hypot(0.0003, 0.0003) = 0.00085."""
    before = report(row(path="old/m-int4.gguf")).to_json()

    def against(*rows, **options):
        return figures(*rows, baseline=before, **options)

    assert against(row()) == []
    assert against(row({KLD: 0.0038})) == []
    assert against(row({KLD: 0.0039})) == ["kld.mean"]
    assert against(row({KLD: 0.0038}), tolerance=1.5) == ["kld.mean"]
    assert against(row({KLD: 0.0001, TOP1: 0.99})) == []
    assert against(row({PERPLEXITY_RATIO: 1.02, TOP1: 0.96})) == [
        "perplexity_ratio",
        "top1_agreement",
    ]
    assert against(row({ROUTING: 0.977})) == ["routing.exact_set"]
    (failure,) = missed(row({KLD: 0.0039}), baseline=before)
    assert "the baseline's 0.003 and 2 standard errors" in failure.why


def test_a_baseline_must_know_the_build():
    before = report(row(path="old/m-int4.gguf")).to_json()
    with pytest.raises(ValidationError, match=r"no build m-int4.gguf in engine llama.cpp"):
        missed(native(), baseline=before)


def test_a_baseline_of_one_window_cannot_tell():
    before = report(row({KLD: Estimate(0.003, math.nan)})).to_json()
    (failure,) = missed(baseline=before)
    assert failure.figure == "kld.mean"
    assert "standard error" in failure.why


def test_a_baseline_from_before_a_figure_is_compared_in_the_others():
    before = report(row()).to_json()
    del before["builds"][0]["top1_agreement"]
    assert figures(row({TOP1: 0.5, KLD: 0.0039}), baseline=before) == ["kld.mean"]
    before["builds"] = [{"path": "m-int4.gguf", "engine": "read"}]
    assert figures(row(), baseline=before) == ["kld.mean"]


def test_a_dense_model_has_no_routing_to_hold_to_a_limit():
    dense = with_figure(row(routing=None, domains={}), ROUTING, None)
    assert figures(dense, limits={"max_kld": 0.0029}) == ["kld.mean"]
    assert figures(dense, baseline=report(dense).to_json()) == []
    for key in ("min_routing", "max_routing_below_read"):
        with pytest.raises(ValidationError, match=f"{key} limits the routing agreement"):
            missed(dense, limits={key: 0.9})


def test_a_failure_is_written_with_the_figures_title():
    (failure,) = missed(domains={"en": {"min_top1": 0.99}})
    assert (failure.title, failure.kind) == ("top-1 agreement in en", "share")
    able = row(generation={"greedy": GENERATION})
    (failure,) = missed(able, generation={"max_repeat": 11})
    assert (failure.title, failure.kind) == ("longest repeat, tokens, greedy", "count")
    (failure,) = missed(row(facts=(Fact("bos_token_id", 7, 1),)))
    assert (failure.title, failure.kind) == ("bos_token_id", None)
