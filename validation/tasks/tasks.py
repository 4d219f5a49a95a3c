"""Tasks that a model is asked: one JSON object a line, read strictly.

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", "kind": "answer"}

``tools``, a list of what the model may call, is optional. ``kind`` says how the answer is
compared: ``answer`` as text, ``tool`` as the calls it makes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.model.chat import Chat, ChatTemplate
from lfmq.converter.model.text import parse_line
from lfmq.converter.model.tokenizer import encode_texts
from lfmq.formats.build import Assets
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError
from lfmq.validation.tasks.tool_calls import Call, parse_calls, same_calls, same_functions

_NEEDED, _OPTIONAL = {"messages", "answer", "kind"}, {"tools"}
_THOUGHT_END = "</think>"


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and what it should be answered with.

    Attributes:
        prompt: int64, token ids up to where the assistant's turn begins.
        answer: the expected text.
        calls: the calls the answer makes; None for a task of kind ``answer``.
    """

    prompt: NDArray[np.int64]
    answer: str
    calls: tuple[Call, ...] | None

    @property
    def kind(self) -> Literal["answer", "tool"]:
        """How the answer is compared."""
        return "answer" if self.calls is None else "tool"


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks for one checkpoint.

    Attributes:
        tasks: at least one.
        thinks: the model writes a thought that ends with ``</think>`` before it answers.
        sha256: of the file they came from.
    """

    tasks: tuple[Task, ...]
    thinks: bool
    sha256: str


def load_tasks(
    path: Path, assets: Assets, config: ModelConfig, *, count: int | None = None
) -> Tasks:
    """Read tasks and render them with the checkpoint's chat template.

    Args:
        path: a JSONL file.
        assets: the tokenizer and chat template.
        config: vocabulary size and bos token.
        count: take only the first ones; every line is checked nevertheless.

    Raises:
        ValidationError: a file that cannot be read, a bad line, no task.
    """
    try:
        content = path.read_bytes()
        lines = enumerate(content.decode("utf-8").split("\n"), 1)
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path}: not UTF-8 text (byte {error.start})") from error
    template = ChatTemplate(assets)
    read = [_read_task(f"{path}, line {n}", line) for n, line in lines if line.strip()]
    if not read:
        raise ValidationError(f"{path}: holds no task; expected a JSON object on each line")
    texts = template.render(chat for chat, _, _ in read)
    read = read[:count]
    prompts = encode_texts(texts[:count], assets, config)
    tasks = tuple(
        Task(np.array(ids, np.int64), answer, calls)
        for ids, (_, answer, calls) in zip(prompts, read, strict=True)
    )
    return Tasks(tasks, template.thinks, hashlib.sha256(content).hexdigest())


def _read_task(where: str, line: str) -> tuple[Chat, str, tuple[Call, ...] | None]:
    """A line as prompt, answer and calls."""
    record = parse_line(where, line)
    if not isinstance(record, dict):
        raise ValidationError(f"{where}: expected an object, found {_short(record)}")
    missing, unknown = _NEEDED - record.keys(), record.keys() - _NEEDED - _OPTIONAL
    if missing or unknown:
        found = f"lacks {sorted(missing)}" if missing else f"has the unknown {sorted(unknown)}"
        expected = f"{sorted(_NEEDED)} and perhaps {sorted(_OPTIONAL)}"
        raise ValidationError(f"{where}: {found}; a task has the keys {expected}")
    _check_values(where, record)
    chat = Chat(record["messages"], record.get("tools"), None, True, where)
    if record["kind"] == "answer":
        return chat, record["answer"], None
    try:
        return chat, record["answer"], parse_calls(record["answer"])
    except ValidationError as error:
        raise ValidationError(f"{where}: the answer of kind 'tool': {error}") from error


def _check_values(where: str, record: dict[str, Any]) -> None:
    messages, tools = record["messages"], record.get("tools", [])
    roles = [m.get("role") if isinstance(m, dict) else None for m in _listed(messages)]
    answer, kind = record["answer"], record["kind"]
    checks = (
        (
            bool(roles) and all(isinstance(r, str) for r in roles),
            "messages: expected a list of objects with a role",
            messages,
        ),
        (roles[-1:] != ["assistant"], "messages: the last is the assistant's own", messages),
        (
            isinstance(tools, list) and all(isinstance(t, dict) for t in tools),
            "tools: expected a list of objects",
            tools,
        ),
        (
            isinstance(answer, str) and bool(answer.strip()),
            "answer: expected a text that is not empty",
            answer,
        ),
        (kind in ("answer", "tool"), "kind: expected 'answer' or 'tool'", kind),
    )
    for good, problem, found in checks:
        if not good:
            raise ValidationError(f"{where}: {problem}, found {_short(found)}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a text is worth as an answer to a task.

    Attributes:
        correct: the expected answer; of kind ``tool``, the right functions and arguments.
        valid: of kind ``tool``, a block of calls that parses.
        right_function: of kind ``tool``, the right functions.
    """

    correct: bool
    valid: bool = False
    right_function: bool = False


def judge(task: Task, text: str) -> Verdict:
    """Compare what a model wrote, special tokens included, with the task's answer.

    Only what follows the last ``</think>`` counts. Texts are equal when their words are: runs of
    white space count as one blank, those at the ends for nothing.
    """
    said = text.rpartition(_THOUGHT_END)[2]
    if task.calls is None:
        return Verdict(said.split() == task.answer.split())
    try:
        calls = parse_calls(said)
    except ValidationError:
        return Verdict(correct=False)
    return Verdict(same_calls(calls, task.calls), True, same_functions(calls, task.calls))


def has_thought(text: str) -> bool:
    """Whether a thought was finished."""
    return _THOUGHT_END in text
