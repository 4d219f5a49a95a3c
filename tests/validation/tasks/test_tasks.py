import hashlib
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.errors import ValidationError
from lfmq.validation.tasks.tasks import Task, Verdict, has_thought, judge, load_tasks
from lfmq.validation.tasks.tool_calls import Call, parse_calls

CALL = "<|tool_call_start|>[f(a='x', n=5)]<|tool_call_end|>"
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "answer": "Hello", "kind": "answer"}


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


def load(sample, path, **options):
    return load_tasks(path, sample.assets, sample.config, **options)


def write(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_the_samples_tasks(sample, sample_folder):
    path = sample_folder.parent / "tasks.jsonl"
    tasks = load(sample, path)
    assert len(tasks.tasks) == 200
    assert tasks.thinks
    assert tasks.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    first, call = tasks.tasks[0], tasks.tasks[6]
    tokenizer = Tokenizer.from_file(str(sample_folder / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is 17 + 14?<|im_end|>\n<|im_start|>assistant\n"
    expected = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    np.testing.assert_array_equal(first.prompt, expected)
    assert (first.kind, first.answer) == ("answer", "31")
    assert call.kind == "tool"
    assert call.calls == (Call("get_weather", {"city": "Tokyo", "unit": "celsius"}),)
    assert len(load(sample, path, count=7).tasks) == 7
    assert len(load(sample, path, count=900).tasks) == 200


def test_tools_reach_the_prompt(sample, tmp_path):
    tools = [{"name": "get_weather", "parameters": {}}]
    record = {**GOOD, "tools": tools, "kind": "tool", "answer": CALL}
    (task,) = load(sample, write(tmp_path / "t.jsonl", record, "\n")).tasks
    tokenizer = Tokenizer.from_str(sample.assets.files["tokenizer.json"].decode())
    text = tokenizer.decode(task.prompt.tolist(), skip_special_tokens=False)
    assert 'List of tools: [{"name": "get_weather"' in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"messages": ', "not JSON"),
        ("[1]", r"expected an object, found \[1\]"),
        ({**GOOD, "tool": []}, r"has the unknown \['tool'\]"),
        ({"messages": []}, r"lacks \['answer', 'kind'\]"),
        ({**GOOD, "messages": []}, r"list of objects with a role, found \[\]"),
        ({**GOOD, "messages": "Hi"}, 'list of objects with a role, found "Hi"'),
        ({**GOOD, "messages": [{"content": "Hi"}]}, "list of objects with a role"),
        (
            {**GOOD, "messages": [{"role": "assistant", "content": "Hi"}]},
            "the last is the assistant's own",
        ),
        ({**GOOD, "messages": [{"role": "user"}]}, "the chat template failed"),
        ({**GOOD, "tools": {"name": "f"}}, "tools: expected a list of objects"),
        ({**GOOD, "tools": None}, "tools: expected a list of objects, found null"),
        ({**GOOD, "answer": 31}, "expected a text that is not empty, found 31"),
        ({**GOOD, "answer": " "}, "expected a text that is not empty"),
        ({**GOOD, "kind": "call"}, "expected 'answer' or 'tool', found \"call\""),
        ({**GOOD, "kind": "tool"}, "the answer of kind 'tool': .*tool_call_start.* is missing"),
        ({**GOOD, "kind": "tool", "answer": CALL.replace("5", "m")}, "found 'm'"),
        ({**GOOD, "answer": "x" * 90, "kind": "x" * 90}, r"x\.\.\."),
    ],
)
def test_bad_lines_are_named(sample, tmp_path, second, message):
    path = write(tmp_path / "t.jsonl", GOOD, second)
    with pytest.raises(ValidationError, match=message) as caught:
        load(sample, path, count=1)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(sample, tmp_path):
    empty, latin = write(tmp_path / "empty.jsonl", "\n"), tmp_path / "latin.jsonl"
    latin.write_bytes("Käse".encode("latin-1"))
    for path, message in (
        (empty, "holds no task"),
        (latin, "not UTF-8"),
        (tmp_path / "gone.jsonl", "cannot be read"),
    ):
        with pytest.raises(ValidationError, match=message) as caught:
            load(sample, path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("Pia has 3 keys.", True),
        ("<think>2? 3!</think>\n Pia  has\n3 keys. ", True),
        ("<think>a</think>b</think>Pia has 3 keys.", True),
        ("Pia has 4 keys.", False),
        ("Pia has 3keys.", False),
        ("<think>Pia has 3 keys.", False),
        ("<think>Pia has 3 keys.</think>", False),
        ("", False),
    ],
)
def test_answers_are_compared_word_by_word(text, correct):
    task = Task(np.array([1]), "Pia has 3 keys.", None)
    assert judge(task, text) == Verdict(correct)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (f"<think>I call.</think>\n{CALL}", Verdict(True, True, True)),
        (CALL.replace("a='x', n=5", 'n=5.0,a="x"') + "Wait.", Verdict(True, True, True)),
        (CALL.replace("5", "6"), Verdict(False, True, True)),
        (CALL.replace("f(", "g("), Verdict(False, True, False)),
        (CALL.replace(")]", "), f()]"), Verdict(False, True, False)),
        (CALL.replace("'x'", "'x"), Verdict(False, False, False)),
        ("[f(a='x', n=5)]", Verdict(False, False, False)),
        (f"<think>{CALL}</think>", Verdict(False, False, False)),
    ],
)
def test_calls_are_compared_by_value(text, verdict):
    assert judge(Task(np.array([1]), CALL, parse_calls(CALL)), text) == verdict


def test_thoughts():
    assert has_thought("<think>a</think>b")
    assert not has_thought("<think>a")
