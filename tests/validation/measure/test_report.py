import dataclasses
import json
import math

import numpy as np
import pytest

from lfmq.validation.measure.figures import (
    FIGURES,
    GENERATION_FIGURES,
    KLD,
    KLD_MAX,
    KLD_MEDIAN,
    PERPLEXITY,
    PERPLEXITY_RATIO,
    RMS_DELTA_P,
    ROUTING,
    TOP1,
)
from lfmq.validation.measure.generation import (
    AnswerFigures,
    GenerationFigures,
    HealthFigures,
    RepeatFigures,
    ToolFigures,
)
from lfmq.validation.measure.predictions import PositionScores
from lfmq.validation.measure.report import (
    Attribution,
    BuildReport,
    Conditions,
    ExpertError,
    Failure,
    LayerDivergence,
    Report,
    columns_of,
)
from lfmq.validation.measure.routing import LayerRouting, MarginBin, RoutingAgreement
from lfmq.validation.measure.runs import Comparison
from lfmq.validation.measure.summaries import (
    histogram,
    measure_domains,
    measure_figures,
    measure_floor,
    measure_positions,
)

SEQUENCE = 18  # positions 9 to 16 are scored


def scores(windows=3) -> PositionScores:
    rng = np.random.default_rng(5)
    reference = rng.random((windows, 8))
    return PositionScores(
        reference, reference + 0.01, rng.random((windows, 8)) / 100, rng.random((windows, 8)) < 0.9
    )


def comparison(windows=3) -> Comparison:
    layers = (
        LayerRouting(2, 0.9, 0.95, 0.1, (0.5, 0.5), (0.4, 0.6), (1.0, math.nan), 1.0),
        LayerRouting(3, 0.8, 0.9, 0.2, (0.5, 0.5), (0.4, 0.6), (1.0, 0.5), 0.9),
    )
    routing = RoutingAgreement(layers, (MarginBin(0.0, 1e-6, 3, 0.5),))
    same = np.random.default_rng(6).choice([0.0, 0.5, 1.0], (windows, 8))
    return Comparison(scores(windows), routing, same)


def build(windows=3, **changes) -> BuildReport:
    found = comparison(windows)
    report = BuildReport(
        path="x.gguf",
        format="gguf",
        engine="read",
        engine_version="lfmq 0",
        nbytes=10,
        bits_per_weight=4.5,
        figures=measure_figures(found),
        histogram=histogram(found.scores.kld),
        routing=found.routing,
        domains=measure_domains(found, ("en", "py", "en")[:windows]),
        positions=measure_positions(found, SEQUENCE),
    )
    return dataclasses.replace(report, **changes)


def report(*builds: BuildReport, windows=3) -> Report:
    return Report(
        checkpoint="m",
        conditions=Conditions("0", "2", 1, "cpu", SEQUENCE, windows * SEQUENCE, "00"),
        tokens_scored=windows * 8,
        reference_perplexity=3.0,
        noise_floor=measure_floor(comparison(windows), ("en", "py", "en")[:windows], SEQUENCE),
        builds=builds,
    )


def test_figures_are_of_the_scored_positions():
    found, s = measure_figures(comparison()), scores()
    assert found[PERPLEXITY].value == pytest.approx(math.exp(s.nll.mean()))
    assert found[PERPLEXITY_RATIO].value == pytest.approx(math.exp(0.01))
    assert found[KLD_MAX].value == s.kld.max()
    assert found[KLD_MEDIAN].value == np.median(s.kld)
    assert found[TOP1].value == s.same_top.mean()
    change = np.exp(-s.nll) - np.exp(-s.reference_nll)
    assert found[RMS_DELTA_P].value == pytest.approx(math.sqrt((change**2).mean()))
    assert found.keys() == {f for f in FIGURES if f.mean or f.of}


def test_domains_are_means_of_their_windows():
    found, of = measure_domains(comparison(), ("en", "py", "en")), comparison()
    assert list(found) == ["en", "py"]
    assert found["en"][KLD].value == pytest.approx(of.scores.kld[[0, 2]].mean())
    assert of.same_sets is not None
    assert found["en"][ROUTING].value == pytest.approx(of.same_sets[[0, 2]].mean())


@pytest.mark.parametrize(("sequence", "ranges"), [(18, 8), (6, 2), (512, 8), (4, 1)])
def test_positions_cover_what_is_scored(sequence, ranges):
    count = sequence - 1 - sequence // 2
    kld = np.arange(2 * count, dtype=float).reshape(2, count)
    s = PositionScores(kld, kld, kld, kld > 3)
    found = measure_positions(Comparison(s, None, None), sequence)
    assert len(found) == ranges
    assert (found[0].start, found[-1].stop) == (sequence // 2, sequence - 1)
    assert [a.stop for a in found[:-1]] == [b.start for b in found[1:]]
    weights = [r.stop - r.start for r in found]
    assert max(weights) - min(weights) <= 1
    mean = np.average([r.figures[KLD].value for r in found], weights=weights)
    assert mean == pytest.approx(kld.mean())


def test_histogram_counts_every_position():
    found = histogram(np.array([[0.0, -1e-9, 1e-12, 1e-4], [3e-4, 0.5, 50.0, 1e6]]))
    assert len(found.edges) == len(found.counts) + 1
    assert sum(found.counts) == 8
    assert found.counts[0] == 3
    assert found.counts[-1] == 1
    assert found.counts[found.edges.index(-4.0)] == 1


def test_routing_weighs_layers_equally():
    found = comparison().routing
    assert found is not None
    assert found.exact_set == pytest.approx(0.85)
    assert found.local_exact_set == pytest.approx(0.95)


def test_each_key_is_of_one_figure():
    for figures in (FIGURES, GENERATION_FIGURES):
        assert len({f.key for f in figures}) == len({f.title for f in figures}) == len(figures)
        limits = [limit for f in figures for limit in f.limits]
        assert len(set(limits)) == len(limits)
        assert all(limit[:4] in ("max_", "min_") for limit in limits)


def test_a_dense_model_has_no_routing_in_its_report():
    """Absent, not null and not 1: in the figures, domains, positions, layers and noise floor."""
    run = Comparison(scores(), None, None)
    dense = build(
        figures=measure_figures(run),
        routing=None,
        domains=measure_domains(run, ("en", "py", "en")),
        positions=measure_positions(run, SEQUENCE),
        attribution=Attribution(0.1, (LayerDivergence(0, 0.2),), ()),
    )
    floor = measure_floor(run, ("en", "py", "en"), SEQUENCE)
    found = dataclasses.replace(report(dense), noise_floor=floor)
    document = found.to_json()
    text = json.dumps(document, allow_nan=False)
    assert "routing" not in text
    assert "experts" not in text
    assert "layers" not in document["noise_floor"]
    assert document["builds"][0]["layers_kld"]
    assert [f.key for f in columns_of(found)] == [
        "kld.mean",
        "perplexity_ratio",
        "top1_agreement",
        "rms_delta_p",
    ]


def test_json_has_the_keys_of_the_contract():
    document = json.loads(json.dumps(report(build()).to_json(), allow_nan=False))
    assert {"checkpoint", "tokens_scored", "reference", "noise_floor", "builds"} <= set(document)
    assert set(document["conditions"]) == {
        "lfmq", "torch", "threads", "device", "sequence", "tokens", "text_sha256",
    }  # fmt: skip
    floor = document["noise_floor"]
    assert {"kld_mean", "kld_stderr", "top1_agreement", "routing_exact_set"} <= set(floor)
    assert {"kld_mean", "top1_agreement"} <= set(floor["domains"]["en"])
    assert document["passed"] is True
    (found,) = document["builds"]
    assert set(found["kld"]) == {
        "mean", "stderr", "median", "p99", "max", "ci95", "histogram",
    }  # fmt: skip
    assert set(found["routing"]["layers"][0]) == {
        "layer", "exact_set", "jaccard", "load_shift", "load", "reference_load", "experts",
        "local_exact_set",
    }  # fmt: skip
    assert found["routing"]["layers"][0]["experts"] == [1.0, None]
    assert set(found["routing"]["margins"][0]) == {"low", "high", "pairs", "exact_set"}
    assert {"perplexity_ratio", "kld_mean", "top1_agreement"} <= set(found["domains"]["en"])
    assert set(found["positions"][0]) == {
        "from", "to", "kld_mean", "top1_agreement", "routing_exact_set",
    }  # fmt: skip
    low, high = found["kld"]["ci95"]
    assert low <= found["kld"]["mean"] <= high
    low, high = found["rms_delta_p_ci95"]
    assert low <= found["rms_delta_p"] <= high
    assert found["rms_delta_p_stderr"] > 0
    assert {"rms_delta_p"} <= set(found["domains"]["en"]) & set(floor)
    low, high = found["perplexity_ratio_ci95"]
    assert low == pytest.approx(high)  # every position is off by the same
    assert found["top1_ci95"][0] <= found["top1_agreement"] <= found["top1_ci95"][1]
    assert found["routing"]["ci95"] is not None
    assert found["warnings"] == []
    assert found["facts"] == []
    assert len(floor["positions"]) == 8
    assert not {"generation", "layers_kld", "experts"} & set(found)


def test_what_others_add_is_in_the_json():
    where = Attribution(0.1, (LayerDivergence(0, 0.2),), (ExpertError(2, 1, 7, 0.05),))
    repeats = RepeatFigures(2, 1.5)
    mode = GenerationFigures(
        tasks=3,
        runs=1,
        answers=AnswerFigures(1.0, 0.5, 3),
        tools=ToolFigures(None, None, None, None, 0),
        capped=0.0,
        longest_repeat=repeats,
        looped=0.0,
        length_ratio=1.0,
        same_text=1.0,
        reference=HealthFigures(0.0, repeats, 0.0),
        new_tokens=8,
        sampling=None,
        tasks_sha256="00",
    )
    more = build(attribution=where, generation={"greedy": mode}, warnings=("old",))
    (found,) = report(more).to_json()["builds"]
    assert found["embedding_kld"] == 0.1
    assert found["layers_kld"] == [{"layer": 0, "kld_mean": 0.2}]
    assert found["experts"] == [{"layer": 2, "expert": 1, "tokens": 7, "error": 0.05}]
    assert found["generation"]["greedy"]["answers"]["reference_accuracy"] == 0.5
    assert found["generation"]["greedy"]["reference"]["longest_repeat"] == {"max": 2, "mean": 1.5}
    assert found["warnings"] == ["old"]


def test_one_window_has_no_standard_error():
    document = report(build(1), windows=1).to_json()
    json.dumps(document, allow_nan=False)
    (found,) = document["builds"]
    assert found["kld"]["stderr"] is None
    assert found["kld"]["ci95"] is None
    assert document["noise_floor"]["kld_stderr"] is None


def test_a_broken_builds_perplexity_has_no_bound():
    worst = np.full((2, 4), 1000.0)
    run = Comparison(PositionScores(worst * 0, worst, worst, worst < 0), None, None)
    assert measure_figures(run)[PERPLEXITY].value == math.inf


def test_a_failure_says_what_and_why():
    missed = Failure("x.gguf", "read", "kld.mean", 0.5, 0.25, "max_kld = 0.25", "mean KLD", "nats")
    assert str(missed) == "x.gguf (read): mean KLD is 0.5, limit 0.25: max_kld = 0.25"
    assert set(missed.to_json()) == {"path", "engine", "figure", "found", "limit", "why"}
    unknown = Failure(
        "x.gguf", "read", "generation", None, None, "nothing ran", "generation", "number"
    )
    assert str(unknown) == "x.gguf (read): generation is not measured: nothing ran"
