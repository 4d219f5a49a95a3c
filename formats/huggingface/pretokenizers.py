"""How a ``tokenizer.json`` splits text into words: the patterns of its pre-tokenizer, in order.

Source: the tokenizers library, ``pre_tokenizers``; patterns as its files write them.
"""

from collections.abc import Iterator
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# LFM2's, which is Llama 3's; the same with digits one by one; GPT-2's, which ByteLevel has itself.
THREE_DIGITS = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
ONE_DIGIT = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"

# Other spellings of the same.
_SPELLINGS = (
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("(?:'s|'t|'re|'ve|'m|'ll|'d)", "'s|'t|'re|'ve|'m|'ll|'d"),
    (r"\p{N}{1}", DIGIT),
)
# Matches are the words, and nothing lies between them: every pattern here takes every character,
# but for the single digit.
_WORDS_ARE_MATCHES = (("Isolated", False), ("Removed", True))


class OtherSplitError(Exception):
    """A pre-tokenizer that is not a sequence of patterns before bytes; the text says which."""


def split_patterns(node: dict[str, Any] | None) -> Iterator[str]:
    """The patterns of a pre-tokenizer whose last step is byte-level, in their usual spelling.

    Args:
        node: ``pre_tokenizer`` of the file.

    Raises:
        OtherSplitError: a step is no pattern.
    """
    steps = list(steps_of(node))
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise OtherSplitError("has a pre-tokenizer that does not end with ByteLevel")
    for step in steps[:-1]:
        yield _pattern(step)
    if steps[-1].get("add_prefix_space", True):
        raise OtherSplitError("puts a blank before a text (add_prefix_space of ByteLevel)")
    if steps[-1].get("use_regex", True):
        yield GPT2


def steps_of(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer, sequences in it laid out."""
    if node is None:
        return
    if node.get("type") != "Sequence":
        yield node
        return
    for inner in node.get("pretokenizers") or ():
        yield from steps_of(inner)


def _pattern(step: dict[str, Any]) -> str:
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Digits" and step.get("individual_digits"):
        return DIGIT
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    how = step.get("behavior"), bool(step.get("invert"))
    if kind != "Split" or not isinstance(regex, str) or how not in _WORDS_ARE_MATCHES:
        settings = [f"{k} {v}" for k, v in step.items() if k not in ("type", "pattern")]
        named = ", ".join([str(kind), *settings])
        raise OtherSplitError(f"has the pre-tokenizer {named[:80]}")
    for other, usual in _SPELLINGS:
        regex = regex.replace(other, usual)
    if how[0] == "Removed" and regex == DIGIT:
        raise OtherSplitError("removes all but digits")
    return regex


def short(pattern: str) -> str:
    """A pattern quoted, in one line, no longer than a message has room for."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in pattern)
    return f"'{line if len(line) <= 60 else line[:57] + '...'}'"


def normalizers(tokenizer: dict[str, Any]) -> list[str]:
    """The kinds of its normalizers."""
    node = tokenizer.get("normalizer")
    if not isinstance(node, dict):
        return []
    listed = node.get("normalizers") if node.get("type") == "Sequence" else [node]
    return [str(each.get("type")) for each in listed or ()]
