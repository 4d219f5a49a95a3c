"""A child with limits: answers in order, and how it died in words."""

from contextlib import closing

import pytest

from lfmq.converter.jobs.limited_child import ChildDied, Limits, ask
from lfmq.quant.errors import ValidationError

CHILD = "lfmq.tests.runners.limited"
FEW = Limits(seconds=1, memory=2**29, answer=10_000)


def answers(*questions, limits=FEW):
    return list(ask(CHILD, questions, limits))


def test_answers_come_in_order():
    assert answers(["echo", 1], ["echo", "é\ud83d"], ["print", 2], ["echo", None]) == [
        1,
        "é\ud83d",
        2,
        None,
    ]
    assert answers() == []


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (["loop"], "took more than 1 s"),
        (["sleep"], "took more than 1 s"),
        (["abort"], "ended its process with SIGABRT"),
        (["exit", 7], "ended its process with status 7"),
        (["answer", 20_000], "gave more than 10,000 bytes"),
        (["memory"], "ended its process with status 1"),
        (["write"], "ended its process with (SIGXFSZ|status 1)"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_child_that_dies(question, reason):
    with closing(ask(CHILD, [["echo", 1], question, ["echo", 2]], FEW)) as found:
        assert next(found) == 1
        with pytest.raises(ChildDied, match=f"^{reason}$"):
            next(found)


def test_a_child_that_does_not_start():
    with pytest.raises(ValidationError, match="ended its process with status 1 before its first"):
        list(ask("lfmq.no.such.module", [1], FEW))
