"""Progress where there is no terminal: whole lines on stderr, not too many."""

import pytest

from lfmq.commands.progress import format_bytes, show_progress
from lfmq.converter.jobs.execution import Amount, Step


def test_layers_have_a_line_each_and_smaller_units_a_line_for_each_tenth(capsys):
    with show_progress(quiet=False) as advance:
        for _ in range(3):
            advance(Step("balancing", "layer", 1, 3))
        for _ in range(40):
            advance(Step("generating", "answer", 1, 40))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"balancing: layer {n} of 3" for n in (1, 2, 3)]
    assert len(lines) == 3 + 10
    assert lines[-1] == "generating: answer 40 of 40"


def test_a_conversion_says_rates_when_a_layer_begins(capsys):
    total = Amount(2, 30, 3000, 1500)
    with show_progress(quiet=False) as advance:
        for layer in (0, 1, 2):
            done = Amount(layer, 10, 1000, 500)
            advance(Step("quantizing", "byte", 1000, 3000, (done, total)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", read ")[0] for line in lines] == [
        "quantizing: layer 1 of 2, 66 %",
        "quantizing: layer 2 of 2, 100 %",
    ]


def test_quiet_says_nothing(capsys):
    with show_progress(quiet=True) as advance:
        advance(Step("balancing", "layer", 1, 3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0.0 B"), (999, "999.0 B"), (1234, "1.2 kB"), (5.5e12, "5.5 TB")]
)
def test_bytes_are_short(amount, text):
    assert format_bytes(amount) == text
