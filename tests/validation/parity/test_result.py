"""What runtimes' tokenizers did, in reports: JSON, tables, pages, and the gate."""

from dataclasses import replace

import pytest

from lfmq.commands.tables import parity_table
from lfmq.tests.validation.reports import MakeReport
from lfmq.validation.gate.judge import judge
from lfmq.validation.gate.thresholds import Thresholds
from lfmq.validation.measure.report import Report
from lfmq.validation.pages.markdown import render_markdown
from lfmq.validation.pages.page import render_page
from lfmq.validation.parity.result import (
    NOT_COMPARED,
    GroupParity,
    NotMeasured,
    Parity,
    TemplateParity,
)

GGUF, ONNX = "builds/a-int4.gguf", "builds/a-int4-onnx"
DIGITS = "'2024' has '2' (21) where the checkpoint has '202' (733) <b>|[red]"
PARITY = Parity(
    tokenizer=(
        GroupParity(GGUF, "llama.cpp", "scripts", True),
        GroupParity(GGUF, "llama.cpp", "digits", False, DIGITS),
        GroupParity(GGUF, "llama.cpp", "code", False, "another"),
        GroupParity(ONNX, "onnxruntime-genai", "scripts", True),
    ),
    template=(TemplateParity(ONNX, "onnxruntime-genai", False, "a chat: 'x' where ..."),),
    not_measured=(NotMeasured("builds/a-int4-mlx", "mlx-lm", "mlx-lm is not installed"),),
)


@pytest.fixture(scope="module")
def found(make_report: MakeReport) -> Report:
    return replace(make_report(formats=("gguf", "mlx")), failures=(), parity=PARITY)


def test_json(found: Report) -> None:
    parity = found.to_json()["parity"]
    assert parity["tokenizer"][1] == {
        "path": GGUF,
        "runtime": "llama.cpp",
        "group": "digits",
        "equal": False,
        "first_difference": DIGITS,
    }
    assert parity["template"][0]["equal"] is False
    assert parity["not_measured"][0]["why"] == "mlx-lm is not installed"


def test_a_row_for_each_runtime() -> None:
    table = parity_table(PARITY)
    assert table is not None
    assert [row[:4] for row in table.rows] == [
        ("a-int4.gguf", "llama.cpp", "differs in digits, code", "not rendered"),
        ("a-int4-onnx", "onnxruntime-genai", "equal in 1 groups", "differ"),
        ("a-int4-mlx", "mlx-lm", "not compared", ""),
    ]
    assert table.rows[0][4] == DIGITS
    assert parity_table(NOT_COMPARED) is None


def test_the_gate_misses_without_a_limit(found: Report) -> None:
    tokens, chats = judge(found, Thresholds())
    assert (tokens.path, tokens.engine, tokens.figure) == (GGUF, "llama.cpp", "parity.tokenizer")
    assert tokens.why == f"digits: {DIGITS}; also in code"
    assert str(tokens).startswith(f"{GGUF} (llama.cpp): tokenizer is not the checkpoint's: digits")
    assert (chats.engine, chats.figure) == ("onnxruntime-genai", "parity.template")
    assert judge(replace(found, parity=NOT_COMPARED), Thresholds()) == ()


def test_pages(found: Report) -> None:
    report = replace(found, failures=judge(found, Thresholds()))
    markdown, page = render_markdown(report), render_page(report)
    assert (
        "| a-int4.gguf | llama.cpp | differs in digits, code | not rendered | '2024' " in markdown
    )
    assert "tokenizer differs from the checkpoint's" in markdown
    assert "\\<b\\>\\|\\[red\\]" in markdown
    assert '<section id="tokenizers"' in page
    assert '<td class="missed">differs in digits, code</td>' in page
    assert "&lt;b&gt;" in page
    plain = replace(found, parity=NOT_COMPARED)
    assert "runtime" not in render_markdown(plain)
    assert 'id="tokenizers"' not in render_page(plain)
