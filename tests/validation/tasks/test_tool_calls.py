import json
import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmq.quant.errors import ValidationError
from lfmq.validation.tasks.tool_calls import (
    END,
    START,
    Call,
    parse_calls,
    same_calls,
    same_functions,
)

NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda s: not keyword.iskeyword(s)
)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(
    st.builds(
        Call,
        st.lists(NAME, min_size=1, max_size=3).map(".".join),
        st.dictionaries(NAME, VALUE, max_size=4),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


def block(inner: str) -> str:
    return f"{START}{inner}{END}"


def render(calls: tuple[Call, ...], write=repr) -> str:
    """As the model is taught to write them."""
    parts = (
        f"{c.function}({', '.join(f'{k}={write(v)}' for k, v in c.arguments.items())})"
        for c in calls
    )
    return block(f"[{', '.join(parts)}]")


@given(CALLS, st.text(max_size=9), st.text(max_size=9))
def test_calls_round_trip(calls, before, after):
    text = render(calls)
    if text.count(END) == 1:  # a string argument may hold the marker itself
        found = parse_calls(before + text + after)
        assert found == calls
        assert same_calls(found, calls)
        assert same_functions(found, calls)


@given(CALLS)
def test_values_written_as_json_are_the_same(calls):
    text = render(calls, lambda v: json.dumps(v, ensure_ascii=True))
    # \/ aside, JSON's strings are Python's; a pair of escaped surrogates is one character there
    if "\\ud" not in text and text.count(END) == 1:
        assert same_calls(parse_calls(text), calls)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    try:
        calls = parse_calls(block(text))
    except ValidationError:
        return
    assert calls


def test_what_lfm_writes():
    text = "I look it up.\n" + block(
        """[a.b(s='x "y"', n=-5, f=0.5, ok=True, no=None, l=[1, [2]], """
        """m={"k": {"t": true, "n": null, "f": false}}), g()]"""
    )
    nested = {"k": {"t": True, "n": None, "f": False}}
    arguments = {"s": 'x "y"', "n": -5, "f": 0.5, "ok": True, "no": None, "l": [1, [2]]}
    assert parse_calls(text + " Done.") == (Call("a.b", {**arguments, "m": nested}), Call("g", {}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f(a=1)", "tool_call_start.* is missing"),
        (START + "[f(a=1)]", "tool_call_end.* is missing"),
        (END + START, "tool_call_end.* is missing"),
        (block(""), "not a Python expression"),
        (block("[]"), "expected a list of calls"),
        (block("f(a=1)"), "expected a list of calls"),
        (block("(f(a=1),)"), "expected a list of calls"),
        (block("[f]"), "expected a call, found 'f'"),
        (block("[f(1)]"), "expected a keyword argument, found '1'"),
        (block("[f(*a)]"), "expected a keyword argument"),
        (block("[f(**a)]"), "expected a keyword argument given once"),
        (block("[f(a=1, a=2)]"), "keyword argument"),
        (block("[f(a=b)]"), "expected a literal, found 'b'"),
        (block("[f(a=1+1)]"), "expected a literal"),
        (block("[f(a=+1)]"), "expected a literal"),
        (block("[f(a=--1)]"), "expected a literal"),
        (block("[f(a=-True)]"), "expected a literal"),
        (block("[f(a=(1, 2))]"), "expected a literal"),
        (block("[f(a={1, 2})]"), "expected a literal"),
        (block("[f(a=b'x')]"), "expected a literal"),
        (block("[f(a=1j)]"), "expected a literal"),
        (block("[f(a=1e999)]"), "expected a literal"),
        (block("[f(a=-1e999)]"), "expected a literal"),
        (block("[f(a=...)]"), "expected a literal"),
        (block("[f(a=f'{x}')]"), "expected a literal"),
        (block("[f(a=g())]"), "expected a literal"),
        (block("[f(a=[x for x in y])]"), "expected a literal"),
        (block("[f(a={1: 2})]"), "keys are different strings"),
        (block("[f(a={'k': 1, 'k': 2})]"), "keys are different strings"),
        (block("[f(a={**b})]"), "keys are different strings"),
        (block("[f()(a=1)]"), "expected a function's name"),
        (block("[f[0](a=1)]"), "expected a function's name"),
        (block("[__import__('os').system(c='id')]"), "expected a function's name"),
        (block("[f(a='it's')]"), "not a Python expression"),
        (block("[f(a=07)]"), "not a Python expression"),
        (block("[f(a=1)\x00]"), "not a Python expression"),
        (block("[f(a=" + "[" * 5000 + "]" * 5000 + ")]"), "not a Python|nested too deeply"),
        (block("[f(a='" + "x" * 100_000 + "')]"), "characters"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(ValidationError, match=message) as caught:
        parse_calls(text)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_unknown_escapes_do_not_warn():
    assert parse_calls(block(r"[f(a='\d')]"))[0].arguments == {"a": r"\d"}


def test_calls_are_compared_by_value_in_any_order():
    one, two = Call("f", {"a": 1, "b": "x"}), Call("g", {"l": [1.0, {"k": True}]})
    assert same_calls((one, two), (two, Call("f", {"b": "x", "a": 1.0})))
    assert not same_calls((one, one), (one, two))
    assert not same_calls((one,), (one, two))
    assert not same_calls((one, two), (one,))
    assert same_functions((one, two), (two, one))
    assert not same_functions((one, one), (one,))
    for other in ({"a": True}, {"a": "1"}, {"a": None}, {"a": 1, "b": 2}, {}, {"a": [1]}):
        assert not same_calls((Call("f", {"a": 1}),), (Call("f", other),))
