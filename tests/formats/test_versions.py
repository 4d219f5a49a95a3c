"""The table of proven and known-bad releases: complete, consistent, equal to what is installed."""

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from lfmq.formats.registry import FORMATS
from lfmq.formats.versions import (
    KNOWN_BAD,
    PROVEN,
    KnownBad,
    checkpoint_concerns,
    known_bad,
    plan_concerns,
)
from lfmq.quant.types import Scheme

PINS = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text("utf-8").splitlines()


def test_every_format_is_proven_with_what_is_pinned():
    assert sorted(PROVEN) == sorted(FORMATS)
    for packages in PROVEN.values():
        assert packages
        assert not [p for p in packages if p.replace(" ", "==") not in PINS]


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda r: f"{r.what[:20]} {r.bad[:12]}")
def test_rows_say_what_to_do_and_where_it_is_from(row: KnownBad):
    assert row.formats
    assert set(row.formats) <= set(FORMATS)
    assert row.wrong
    assert row.remedy
    assert row.source.startswith("https://")
    if row.specifier is not None:
        SpecifierSet(row.specifier)


def test_a_proven_version_is_known_bad_only_where_a_switch_helps():
    for format, packages in PROVEN.items():
        for name, version in (p.split(" ") for p in packages):
            for row in KNOWN_BAD:
                if row.what == name and format in row.formats and row.specifier is not None:
                    bad = SpecifierSet(row.specifier).contains(version)
                    assert not bad or row.switch is not None


def test_concerns_of_a_plan(tiny_config, make_plan):
    assert plan_concerns(make_plan(tiny_config)) == {"packed experts", "packed convolutions"}
    wide = make_plan(tiny_config, experts=Scheme(8), shared="float32")
    assert plan_concerns(wide) == {"packed experts", "8-bit experts"}
    assert plan_concerns(make_plan(tiny_config, "float32", "float32")) == frozenset()


def test_concerns_of_a_checkpoint(tiny_assets):
    assert checkpoint_concerns(tiny_assets) == frozenset()
    for change in (
        {"name": "LFM2.5-8B-A1B"},
        {"config_json": {"_name_or_path": "LiquidAI/LFM2.5-8B-A1B"}},
        {"files": {"README.md": b"\xff# LFM2.5-8B-A1B"}},
    ):
        assert checkpoint_concerns(replace(tiny_assets, **change)) == {"LFM2.5-8B-A1B"}
    assert not checkpoint_concerns(replace(tiny_assets, name="LFM2-8B-A1B\udcff"))


def test_only_rows_of_the_format_and_the_build():
    assert {r.what for r in known_bad("mlx", frozenset())} == {"mlx-lm"}
    assert known_bad("onnx", frozenset()) == ()
    assert len(known_bad("onnx", {"packed experts", "8-bit experts"})) == 2
    assert known_bad("gguf", {"packed experts", "packed convolutions"}) == ()
    assert len(known_bad("gguf", {"LFM2.5-8B-A1B"})) == 1
