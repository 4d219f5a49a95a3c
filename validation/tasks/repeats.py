"""Doom loops: how much of a text is the same words over and over.

A *run* with period n is a stretch of tokens in which every token equals the one n places before
it, and which holds the first n of them at least twice. Its length is the number of its tokens,
the first copy among them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Periods looked for, tokens: a phrase, a sentence, a line of reasoning.
LONGEST_PERIOD = 64
# A loop: a run of three copies or more that covers fifty tokens or more. Two copies happen in good
# text (a question repeated in its answer), and so do short runs (digits, an indented table).
LOOP_COPIES, LOOP_TOKENS = 3, 50


@dataclass(frozen=True, slots=True)
class Repeats:
    """The repetition in one text.

    Attributes:
        longest: tokens of the longest run with a period up to ``LONGEST_PERIOD``; 0 without one.
        looped: there is a run of ``LOOP_COPIES`` copies that covers ``LOOP_TOKENS`` tokens.
    """

    longest: int
    looped: bool


def find_repeats(tokens: NDArray[np.int64]) -> Repeats:
    """Measure the repetition in a sequence of tokens."""
    longest, looped = 0, False
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 2) + 1):
        same = tokens[period:] == tokens[:-period]
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
        lengths = edges[1::2] - edges[::2] + period
        runs = lengths[lengths >= 2 * period]
        if len(runs):
            longest = max(longest, int(runs.max()))
            looped |= bool(runs.max() >= max(LOOP_TOKENS, LOOP_COPIES * period))
    return Repeats(longest, looped)
