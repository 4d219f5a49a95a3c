"""The Markdown table: the page's numbers, and text that stays text."""

import copy

import pytest

from lfmq.validation.pages.markdown import render_markdown
from lfmq.validation.pages.numbers import format_figure


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def test_a_row_for_each_build_and_engine_and_the_floor(document):
    header, rule, *body = rows(render_markdown(document))
    assert header[-2:] == ["same experts", "same experts, local"]
    assert {len(r) for r in (header, rule, *body)} == {8}
    assert len(body) == len(document["builds"]) + 1
    for row, build in zip(body, document["builds"], strict=False):
        assert row[0] == build["path"].removeprefix("builds/")
        assert row[1] == build["engine"]
        assert row[5] == format_figure(build["top1_agreement"], "share")
        assert row[6] == format_figure(build["routing"]["exact_set"], "share")
    assert body[-1][0].startswith("noise floor")
    assert body[-1][4] == "0.00120"


def test_what_missed_is_marked_and_listed(document):
    text = render_markdown(document)
    assert "**0.00912** (missed)" in text
    assert "- builds/lfm2moe-tiny-int4-onnx in onnxruntime: mean KLD is 0.00912" in text
    assert "bos\\_token\\_id is not the checkpoint's\n" in text
    assert "same experts, local is not measured, limit 0.9990" in text
    assert "generation is not measured\n" in text
    passed = render_markdown(document | {"passed": True, "failures": []})
    assert "Passed: no limit was missed." in passed


def test_conditions_in_one_line(document):
    (line,) = [x for x in render_markdown(document).splitlines() if "positions of" in x]
    assert line.startswith("8,128 positions of lfm2moe-tiny (reference perplexity 9.123); ")
    for part in ("windows of 256 tokens", "text sha256 ", "2 threads", "mlx-lm 0.32.2"):
        assert part in line


def test_without_optional_keys(document):
    plain = copy.deepcopy(document) | {"failures": []}
    del plain["conditions"]
    for build in plain["builds"]:
        build["routing"]["local_exact_set"] = None
        build.pop("warnings")
    text = render_markdown(plain)
    assert "local" not in text
    assert len(rows(text)[0]) == 7
    assert "text sha256" in text


@pytest.mark.parametrize(
    "bad", ["a | b", "<script>", "`x`", "[a](https://b)", "a\nb\n\n# c", "*a* _b_", "\u202ea\x1b"]
)
def test_hostile_text_stays_in_its_cell(document, bad):
    odd = copy.deepcopy(document)
    for build in odd["builds"]:
        build |= {"path": f"{bad}/{bad}", "engine": bad, "engine_version": bad, "warnings": [bad]}
    text = render_markdown(odd)
    assert len(text.splitlines()) == len(render_markdown(document).splitlines())
    assert bad not in text.replace("\\", "") or bad not in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"
    } == {9}
