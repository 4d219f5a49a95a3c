"""What a generation check found, as typed values; docs/generation.md describes the JSON keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Shares of tasks with a text answer that were answered correctly; None without any."""

    accuracy: float | None
    reference_accuracy: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ToolFigures:
    """Shares of tasks with a tool call; None without any."""

    valid: float | None
    right_function: float | None
    right_arguments: float | None
    reference_right_arguments: float | None
    n: int


@dataclass(frozen=True, slots=True)
class RepeatFigures:
    """Tokens of the longest repetition in an answer."""

    max: int
    mean: float


@dataclass(frozen=True, slots=True)
class HealthFigures:
    """Whether answers end, and how much they repeat themselves."""

    capped: float | None
    longest_repeat: RepeatFigures
    looped: float | None


@dataclass(frozen=True, slots=True)
class GenerationFigures:
    """One mode (greedy or sampled) of a generation check; the attributes are the JSON keys."""

    tasks: int
    runs: int
    answers: AnswerFigures
    tools: ToolFigures
    capped: float | None
    longest_repeat: RepeatFigures
    looped: float | None
    length_ratio: float
    same_text: float
    reference: HealthFigures
    new_tokens: int
    sampling: Mapping[str, Any] | None
    tasks_sha256: str

    def to_json(self) -> dict[str, Any]:
        """The object ``greedy`` or ``sampled``."""
        return asdict(self)
