"""Whether llama.cpp finds the added tokens of a text where the tokenizers library does.

The library looks for all of them at once: at the leftmost place the longest, those that are not
normalized first. llama.cpp looks for one after the other, the longest first, wherever it is
(``llama-vocab.cpp``, ``tokenizer_st_partition``). Both find the same unless tokens overlap.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lfmq.formats.gguf.special_vocabulary import LLAMA_CPP_ENDS

# Taken for control tokens by their text, with those that end generation
# (llama-vocab.cpp, "auto-detect special tokens by text"), and never taken for one.
_INFILL = frozenset(
    (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>",
        "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>",
        "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>", "<|code_suffix|>",
        "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>",
        "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
        "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    )
)  # fmt: skip
_ALWAYS_WRITTEN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
_FLAGS = ("lstrip", "rstrip", "single_word")


def conflict(added: Iterable[dict[str, Any]]) -> str | None:
    """Why llama.cpp would find other added tokens, in words; None where it finds the same."""
    added = list(added)
    for flag in _FLAGS:
        flagged = [token["content"] for token in added if token.get(flag)]
        if flagged:
            more = f" and {len(flagged) - 1} more" if flagged[1:] else ""
            return f"added token {flagged[0]!r}{more} has {flag}, which llama.cpp ignores"
    for token in added:
        if bool(token.get("special")) != _special_by_text(token):
            kind = "special" if token.get("special") else "not special"
            return f"added token {token['content']!r} is {kind}, llama.cpp decides by its text"
    plain = [token["content"] for token in added if not token.get("normalized")]
    normalized = [token["content"] for token in added if token.get("normalized")]
    for text in _crossing([*plain, *normalized]):
        if _leftmost(text, plain, normalized) != _longest_first(text, [*plain, *normalized]):
            return f"added tokens overlap in {text!r}, where llama.cpp takes others"
    return None


def _special_by_text(token: dict[str, Any]) -> bool:
    """What llama.cpp makes of a token: it knows some by their text, whatever the file says."""
    text = token["content"]
    if text in _ALWAYS_WRITTEN:
        return False
    return bool(token.get("special")) or text in LLAMA_CPP_ENDS or text in _INFILL


def _crossing(tokens: Sequence[str]) -> Iterator[str]:
    """Texts in which one token begins inside another, or lies in it."""
    starts: dict[str, list[str]] = {}
    for token in tokens:
        for length in range(1, len(token)):
            starts.setdefault(token[:length], []).append(token)
    known = set(tokens)
    for token in tokens:
        for begin in range(1, len(token)):
            for other in starts.get(token[begin:], ()):
                yield token[:begin] + other
            if any(token[begin:end] in known for end in range(begin + 1, len(token) + 1)):
                yield token


def _leftmost(text: str, *groups: Sequence[str]) -> list[str]:
    """As the tokenizers library: one group after the other in what the last one left."""
    pieces = [text]
    found: set[int] = set()
    for group in groups:
        parts: list[str] = []
        taken: set[int] = set()
        for index, piece in enumerate(pieces):
            if index in found:
                taken.add(len(parts))
                parts.append(piece)
                continue
            for part, is_token in _split_leftmost(piece, group):
                if is_token:
                    taken.add(len(parts))
                parts.append(part)
        pieces, found = parts, taken
    return pieces


def _split_leftmost(text: str, tokens: Sequence[str]) -> Iterator[tuple[str, bool]]:
    start = at = 0
    while at < len(text):
        longest = max((t for t in tokens if t and text.startswith(t, at)), key=len, default="")
        if not longest:
            at += 1
            continue
        if start < at:
            yield text[start:at], False
        yield longest, True
        start = at = at + len(longest)
    if start < len(text):
        yield text[start:], False


def _longest_first(text: str, tokens: Sequence[str]) -> list[str]:
    """As llama.cpp; of equally long ones the one that is found last, whose order is not fixed."""
    order = sorted(tokens, key=lambda t: (-len(t.encode()), -text.find(t)))
    pieces = [(text, False)]
    for token in order:
        pieces = [part for piece in pieces for part in _split_all(piece, token)]
    return [piece for piece, _ in pieces]


def _split_all(piece: tuple[str, bool], token: str) -> Iterator[tuple[str, bool]]:
    text, is_token = piece
    if is_token or not token:
        yield piece
        return
    before, *rest = text.split(token)
    if before:
        yield before, False
    for part in rest:
        yield token, True
        if part:
            yield part, False
