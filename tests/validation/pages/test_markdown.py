"""The Markdown table: the page's numbers, and text that stays text."""

from dataclasses import replace

import pytest

from lfmq.tests.validation.reports import with_figure, without_routing
from lfmq.validation.measure.figures import LOCAL_ROUTING, RMS_DELTA_P, ROUTING, TOP1
from lfmq.validation.pages.markdown import render_markdown
from lfmq.validation.pages.numbers import format_figure


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def test_a_row_for_each_build_and_engine_and_the_floor(report):
    header, rule, *body = rows(render_markdown(report))
    assert header[3:] == [
        "mean KLD, nats",
        "perplexity ratio",
        "top-1 agreement",
        "RMS Δp",
        "routing agreement",
        "local routing agreement",
    ]
    assert {len(r) for r in (header, rule, *body)} == {9}
    assert len(body) == len(report.builds) + 1
    for row, build in zip(body, report.builds, strict=False):
        assert row[0] == build.path.removeprefix("builds/")
        assert row[1] == build.engine
        assert row[5] == format_figure(build.value(TOP1), "share")
        assert row[6] == format_figure(build.value(RMS_DELTA_P), "percent")
        assert row[7] == format_figure(build.value(ROUTING), "share")
    assert body[-1][0].startswith("noise floor")
    assert body[-1][3] == "0.00120"


def test_what_missed_is_marked_and_listed(report):
    text = render_markdown(report)
    assert "**0.00912** (missed)" in text
    assert "- builds/lfm2moe-tiny-int4-onnx in onnxruntime: mean KLD is 0.00912" in text
    assert "bos\\_token\\_id differs from the checkpoint's\n" in text
    assert "local routing agreement is not measured, limit 0.9990" in text
    assert "generation is not measured\n" in text
    assert "Passed: no limit was missed." in render_markdown(replace(report, failures=()))


def test_conditions_in_one_line(report):
    (line,) = [x for x in render_markdown(report).splitlines() if "positions of" in x]
    assert line.startswith("8,128 positions of lfm2moe-tiny (reference perplexity 9.123); ")
    for part in ("windows of 256 tokens", "text sha256 ", "2 threads", "mlx-lm 0.32.2"):
        assert part in line


def test_without_local_routing(report):
    builds = tuple(with_figure(b, LOCAL_ROUTING, None) for b in report.builds)
    text = render_markdown(replace(report, builds=builds, failures=()))
    assert "local" not in text
    assert len(rows(text)[0]) == 8


def test_a_dense_model_has_no_column_of_routing(report):
    text = render_markdown(without_routing(report))
    assert "routing" not in text
    assert {len(r) for r in rows(text)} == {7}


@pytest.mark.parametrize(
    "bad", ["a | b", "<script>", "`x`", "[a](https://b)", "a\nb\n\n# c", "*a* _b_", "\u202ea\x1b"]
)
def test_hostile_text_stays_in_its_cell(report, bad):
    builds = tuple(
        replace(b, path=f"{bad}/{bad}", engine=bad, engine_version=bad, warnings=(bad,))
        for b in report.builds
    )
    text = render_markdown(replace(report, builds=builds))
    assert len(text.splitlines()) == len(render_markdown(report).splitlines())
    assert bad not in text.replace("\\", "") or bad not in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"
    } == {10}
