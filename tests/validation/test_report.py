import json
import math

import numpy as np
import pytest

from lfmq.validation.metrics import LayerRouting, PositionScores
from lfmq.validation.report import (
    BuildReport,
    NoiseFloor,
    Report,
    RoutingAgreement,
    Thresholds,
    summarize_domains,
    summarize_scores,
)


def scores(windows=3) -> PositionScores:
    rng = np.random.default_rng(5)
    reference = rng.random((windows, 8))
    return PositionScores(
        reference, reference + 0.01, rng.random((windows, 8)) / 100, rng.random((windows, 8)) < 0.9
    )


def build(windows=3) -> BuildReport:
    return BuildReport(
        path="x.gguf",
        format="gguf",
        engine="read",
        engine_version="lfmq 0",
        nbytes=10,
        bits_per_weight=4.5,
        overall=summarize_scores(scores(windows)),
        routing=RoutingAgreement(
            (LayerRouting(2, 0.9, 0.95, 0.1), LayerRouting(3, 0.8, 0.9, 0.2))
        ),
        domains=summarize_domains(scores(windows), ("en", "py", "en")[:windows]),
    )


def test_summary_is_of_the_scored_positions():
    found, s = summarize_scores(scores()), scores()
    assert found.perplexity == pytest.approx(math.exp(s.nll.mean()))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.01))
    assert found.kld.max == s.kld.max()
    assert found.kld.median == np.median(s.kld)


def test_domains_are_means_of_their_windows():
    found, s = summarize_domains(scores(), ("en", "py", "en")), scores()
    assert list(found) == ["en", "py"]
    assert found["en"].kld.mean == pytest.approx(s.kld[[0, 2]].mean())


def test_routing_weighs_layers_equally():
    assert build().routing.exact_set == pytest.approx(0.85)
    assert RoutingAgreement(()).exact_set == 1.0


def test_json_has_the_keys_of_the_contract():
    report = Report("m", "00", 24, 3.0, NoiseFloor(0.1, 0.9, 0.9), (build(),), ())
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"checkpoint", "tokens_scored", "reference", "noise_floor", "builds"} <= set(document)
    assert set(document["noise_floor"]) == {"kld_mean", "top1_agreement", "routing_exact_set"}
    assert document["passed"] is True
    (found,) = document["builds"]
    assert set(found["kld"]) == {"mean", "stderr", "median", "p99", "max"}
    assert set(found["routing"]["layers"][0]) == {"layer", "exact_set", "jaccard", "load_shift"}
    assert set(found["domains"]["en"]) == {"perplexity_ratio", "kld_mean", "top1_agreement"}


def test_one_window_has_no_standard_error():
    document = json.loads(json.dumps(build(1).to_json(), allow_nan=False))
    assert document["kld"]["stderr"] is None


@pytest.mark.parametrize(
    ("thresholds", "missed"),
    [
        (Thresholds(), []),
        (Thresholds(1.0, 1.02, 0.8), []),
        (Thresholds(max_kld=1e-6), ["kld.mean"]),
        (Thresholds(max_perplexity_ratio=1.0), ["perplexity_ratio"]),
        (Thresholds(min_routing=0.9), ["routing.exact_set"]),
        (Thresholds(1e-6, 1.0, 0.9), ["kld.mean", "perplexity_ratio", "routing.exact_set"]),
    ],
)
def test_thresholds_name_what_missed_them(thresholds, missed):
    assert [f.figure for f in thresholds.missed_by(build())] == missed


def test_a_figure_that_is_not_a_number_misses():
    unknown = np.full((2, 4), np.nan)
    bad = PositionScores(unknown, unknown, unknown, np.ones((2, 4), bool))
    report = build()
    fields = {f: getattr(report, f) for f in report.__dataclass_fields__}
    fields["overall"] = summarize_scores(bad)
    assert Thresholds(max_kld=1.0).missed_by(BuildReport(**fields))
