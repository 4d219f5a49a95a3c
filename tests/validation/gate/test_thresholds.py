import json
import re
from pathlib import Path

import pytest

from lfmq.quant.errors import ValidationError
from lfmq.validation.gate.thresholds import (
    DOMAIN_LIMITS,
    GENERATION_LIMITS,
    LIMITS,
    RELATIVE,
    Thresholds,
    load_thresholds,
)

PAGE = Path(__file__).resolve().parents[3] / "docs" / "validation.md"

BASELINE = {"builds": [], "conditions": {"text_sha256": "00", "tokens": 10, "sequence": 5}}


def write(folder, text):
    path = folder / "gate.toml"
    path.write_text(text)
    return path


def test_a_file_of_limits(tmp_path):
    (tmp_path / "before.json").write_text(json.dumps(BASELINE))
    found = load_thresholds(
        write(
            tmp_path,
            """
            baseline = "before.json"
            tolerance_stderr = 3
            [limits]
            max_kld = 0.02
            max_kld_over_floor = 3
            [domains.en]
            min_top1 = 0.9
            [generation]
            max_looped = 0
            """,
        )
    )
    assert found.limits == {"max_kld": 0.02, "max_kld_over_floor": 3.0}
    assert found.domains == {"en": {"min_top1": 0.9}}
    assert found.generation == {"max_looped": 0.0}
    assert found.baseline == BASELINE
    assert found.tolerance == 3


def test_options_take_the_place_of_a_files_limits():
    found = Thresholds({"max_kld": 1.0, "min_top1": 0.5}).with_limits(
        max_kld=2.0, min_routing=None
    )
    assert found.limits == {"max_kld": 2.0, "min_top1": 0.5}
    with pytest.raises(TypeError, match="max_kl'"):
        found.with_limits(max_kl=1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_kld = 1", "unknown key 'max_kld'; there are limits, domains"),
        ("[limits]\nmax_kl = 1", r"\[limits\]: unknown key 'max_kl'; there are max_kld, "),
        ("[domains.en]\nmin_local_routing = 1", r"\[domains.en\]: unknown key"),
        ("[generation]\nmax_loops = 1", r"\[generation\]: unknown key 'max_loops'"),
        ("[limits]\nmax_kld = '1'", "max_kld is '1', expected a number"),
        ("[limits]\nmax_kld = true", "max_kld is True, expected a number"),
        ("[limits]\nmax_kld = nan", "max_kld is nan, expected a number"),
        ("limits = 3", "limits is 3, expected a table"),
        ("domains = 3", "domains is 3, expected a table"),
        ("[domains]\nen = 3", "domains.en is 3, expected a table"),
        ("tolerance_stderr = -1", "tolerance_stderr is -1"),
        ("baseline = 3", "baseline is 3, expected a file's name"),
        ("baseline = 'none.json'", "none.json: cannot be read"),
        ("[limits", "not TOML"),
    ],
)
def test_what_is_not_a_limit_is_refused(tmp_path, text, said):
    with pytest.raises(ValidationError, match=said):
        load_thresholds(write(tmp_path, text))


@pytest.mark.parametrize(
    "limits",
    [
        {"limits": {"min_routing": 0.9}},
        {"limits": {"max_kld": 1.0, "max_routing_below_floor": 0.1}},
        {"domains": {"en": {"min_routing": 0.9}}},
    ],
)
def test_limits_on_routing_are_refused_for_a_dense_model(limits):
    found = Thresholds(**limits)
    found.check_experts(True)
    with pytest.raises(ValidationError, match=r"routing agreement, and the model has no experts"):
        found.check_experts(False)
    Thresholds({"max_kld": 1.0}, {"en": {"max_kld": 1.0}}).check_experts(False)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValidationError, match=r"none\.toml: cannot be read"):
        load_thresholds(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not JSON"), ("[]", "not a report"), ('{"builds": [1]}', "not a")]
)
def test_a_baseline_must_be_a_report(tmp_path, content, said):
    (tmp_path / "before.json").write_text(content)
    with pytest.raises(ValidationError, match=f"before.json: {said}"):
        load_thresholds(write(tmp_path, "baseline = 'before.json'"))


def test_a_baseline_of_other_tokens_is_refused(tmp_path):
    found = Thresholds(baseline=BASELINE, baseline_path=tmp_path / "before.json")
    found.check_text("00", 10, 5)
    with pytest.raises(ValidationError, match="its tokens is 10, this run's 20"):
        found.check_text("00", 20, 5)
    other = Thresholds(baseline={"builds": [], "conditions": {"text_sha256": "00", "tokens": 10}})
    with pytest.raises(ValidationError, match="its sequence is None"):
        other.check_text("00", 10, 5)
    Thresholds().check_text("11", 1, 1)


def test_the_page_shows_every_limit(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "last-release.json").write_text(json.dumps(BASELINE))
    found = load_thresholds(write(tmp_path, text))
    assert found.limits.keys() == {*LIMITS, *RELATIVE}
    assert found.generation.keys() == GENERATION_LIMITS.keys()
    assert all(key in text for key in DOMAIN_LIMITS)
