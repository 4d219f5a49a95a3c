"""Added tokens as llama.cpp finds them, against the tokenizers library."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from lfmq.formats.gguf.added_tokens import _leftmost, conflict


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "normalized": False, **flags}


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        (["<|a|>", "<|b|>", "<think>", "</think>"], None),
        (["<|a|>", "<|a|><|b|>", "|b|"], None),  # one in another, which begins first
        (["  ", "   ", "    "], None),  # runs of blanks
        (["ab", "bcd"], "overlap in 'abcd'"),
        (["ab", "bc"], "overlap in 'abc'"),
        (["abc", "cd"], None),  # the longer begins first
    ],
)
def test_overlaps(contents: list[str], found: str | None) -> None:
    reason = conflict([token(c) for c in contents])
    assert (reason is None) == (found is None)
    assert found is None or found in str(reason)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags(flag: str) -> None:
    tokens = [token("<a>"), *(token(f"<{i}>", **{flag: True}) for i in range(3))]
    assert conflict(tokens) == f"added token '<0>' and 2 more has {flag}, which llama.cpp ignores"


@pytest.mark.parametrize(
    ("content", "special", "fine"),
    [
        ("</s>", False, False),
        ("</s>", True, True),
        ("<|fim_prefix|>", False, False),
        ("<|channel|>", True, False),
        ("<|channel|>", False, True),
        ("<|other|>", False, True),
    ],
)
def test_tokens_that_llama_cpp_knows_by_their_text(
    content: str, special: bool, fine: bool
) -> None:
    assert (conflict([token(content, special=special)]) is None) == fine


def test_the_library_looks_for_what_is_not_normalized_first() -> None:
    inner = token("im")
    assert conflict([inner, token("<im_x>")]) is None
    reason = conflict([inner, token("<im_x>", normalized=True)])
    assert reason is not None
    assert "'<im_x>'" in reason


@given(
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.text("abc ", max_size=12),
)
def test_leftmost_is_the_librarys(contents: list[str], text: str) -> None:
    letters = {c: i for i, c in enumerate("abc ")}
    tokenizer = Tokenizer(BPE(letters, []))
    tokenizer.add_tokens([AddedToken(c, normalized=False) for c in contents])
    pieces = [p for p in _leftmost(text, contents)]
    expected = "|".join(tokenizer.encode(text).tokens)
    split = [[p] if p in contents else list(p) for p in pieces]
    assert "|".join(c for part in split for c in part) == expected
