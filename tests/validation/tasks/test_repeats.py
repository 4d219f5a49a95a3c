import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmq.validation.tasks.repeats import LONGEST_PERIOD, LOOP_TOKENS, Repeats, find_repeats


def repeats(*tokens: int) -> Repeats:
    return find_repeats(np.array(tokens, np.int64))


def distinct(n: int) -> list[int]:
    return list(range(100, 100 + n))


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [
        ([], 0),
        ([1], 0),
        ([1, 1], 2),
        (distinct(80), 0),
        ([5, *distinct(9), 1, 1, 1, 6], 3),
        ([1, 2, 1], 0),
        ([1, 2, 1, 2], 4),
        ([1, 2, 1, 2, 1], 5),  # the begun third copy counts
        ([7, 1, 2, 3, 1, 2, 3, 1, 8], 7),
        ([*distinct(64), *distinct(64)], 128),
        ([*distinct(65), *distinct(65)], 0),  # a longer period is not looked for
    ],
)
def test_longest_run(tokens, longest):
    assert repeats(*tokens).longest == longest


def test_a_loop_is_three_copies_and_fifty_tokens():
    assert not repeats(*[1] * 49).looped
    assert repeats(*[1] * 50).looped
    assert not repeats(*distinct(30), *distinct(30)).looped  # 60 tokens, two copies
    assert repeats(*distinct(20) * 3).looped
    assert not repeats(*distinct(16) * 3).looped  # 48 tokens
    assert not repeats(*(distinct(20) * 3)[:-1]).looped
    assert repeats(*distinct(40), *[9, 8] * 25, *distinct(40)).looped


def slow(tokens: list[int]) -> Repeats:
    """The definition, word by word."""
    longest, looped = 0, False
    for n in range(1, LONGEST_PERIOD + 1):
        for start in range(len(tokens)):
            end = start + n
            while end < len(tokens) and tokens[end] == tokens[end - n]:
                end += 1
            length = end - start
            if start + n <= len(tokens) and length >= 2 * n:
                longest = max(longest, length)
                looped |= length >= max(LOOP_TOKENS, 3 * n)
    return Repeats(longest, looped)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 6), st.integers(0, 3))
def test_any_sequence_follows_the_definition(tokens, copies, tail):
    whole = tokens * copies + tokens[:tail]
    assert repeats(*whole) == slow(whole)
