"""What answers are worth, and how a build's differ from the reference's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lfmq.validation.measure.generation import (
    AnswerFigures,
    GenerationFigures,
    HealthFigures,
    RepeatFigures,
    ToolFigures,
)
from lfmq.validation.tasks.repeats import Repeats
from lfmq.validation.tasks.sampling import Sampling
from lfmq.validation.tasks.tasks import Verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote for a task, judged.

    Attributes:
        kind: of the task.
        tokens: int64, the one that ends the answer included.
        text: the same as text, without it.
        verdict: against the task's answer.
        capped: the most tokens allowed were written without an end, and where the model thinks
            without the end of its thought.
        repeats: the repetition in it.
    """

    kind: Literal["answer", "tool"]
    tokens: NDArray[np.int64]
    text: str
    verdict: Verdict
    capped: bool
    repeats: Repeats


@dataclass(frozen=True, slots=True)
class Figures:
    """A build's answers against the reference's, task by task.

    Attributes:
        reference: the reference's answers, those to one task side by side.
        build: the build's in the same order.
        runs: answers to each task.
        tasks_sha256: of the file of tasks.
        new_tokens: most tokens of an answer.
        sampling: None when the most likely token was taken.
    """

    reference: Sequence[Answer]
    build: Sequence[Answer]
    runs: int
    tasks_sha256: str
    new_tokens: int
    sampling: Sampling | None

    def summary(self) -> GenerationFigures:
        """The figures of the mode; docs/generation.md describes them."""
        own, theirs = self.build, self.reference
        pairs = list(zip(theirs, own, strict=True))
        tools, others = ([a for a in own if a.kind == k] for k in ("tool", "answer"))
        wanted_tools, wanted = ([a for a in theirs if a.kind == k] for k in ("tool", "answer"))
        health = _health(own)
        return GenerationFigures(
            tasks=len(own) // self.runs,
            runs=self.runs,
            answers=AnswerFigures(
                accuracy=_share(others, lambda a: a.verdict.correct),
                reference_accuracy=_share(wanted, lambda a: a.verdict.correct),
                n=len(others),
            ),
            tools=ToolFigures(
                valid=_share(tools, lambda a: a.verdict.valid),
                right_function=_share(tools, lambda a: a.verdict.right_function),
                right_arguments=_share(tools, lambda a: a.verdict.correct),
                reference_right_arguments=_share(wanted_tools, lambda a: a.verdict.correct),
                n=len(tools),
            ),
            capped=health.capped,
            longest_repeat=health.longest_repeat,
            looped=health.looped,
            length_ratio=float(np.mean([len(b.tokens) / len(a.tokens) for a, b in pairs])),
            same_text=float(np.mean([np.array_equal(a.tokens, b.tokens) for a, b in pairs])),
            reference=_health(theirs),
            new_tokens=self.new_tokens,
            sampling=None if self.sampling is None else asdict(self.sampling),
            tasks_sha256=self.tasks_sha256,
        )


def _health(answers: Sequence[Answer]) -> HealthFigures:
    longest = [a.repeats.longest for a in answers]
    return HealthFigures(
        capped=_share(answers, lambda a: a.capped),
        longest_repeat=RepeatFigures(max(longest), float(np.mean(longest))),
        looped=_share(answers, lambda a: a.repeats.looped),
    )


def _share(answers: Sequence[Answer], holds: Callable[[Answer], bool]) -> float | None:
    """Of the answers for which it holds; None of none."""
    return float(np.mean([holds(a) for a in answers])) if answers else None
