"""Which of llama.cpp's tokenizers is a checkpoint's own, or why none is.

llama.cpp does not read ``tokenizer.json``. It splits text by one of the patterns it was compiled
with, which ``tokenizer.ggml.pre`` names, and matches added tokens in its own way. A tokenizer that
it would not follow to the letter is refused: a build with other tokens is another model, and
nothing says so when it runs.

Source: llama.cpp, ``src/llama-vocab.cpp``: patterns (``llm_tokenizer_bpe``), what goes with them
(``llama_vocab::impl::load``) and added tokens (``tokenizer_st_partition``).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.gguf.added_tokens import conflict
from lfmq.formats.huggingface.pretokenizers import (
    DIGIT,
    GPT2,
    ONE_DIGIT,
    THREE_DIGITS,
    OtherSplitError,
    normalizers,
    short,
    split_patterns,
)
from lfmq.formats.huggingface.side_files import without_mark
from lfmq.formats.huggingface.special_tokens import special_tokens
from lfmq.quant.errors import UnsupportedError

# llama.cpp gives the added tokens of models with these words in general.name other rules.
_NAMES_WITH_RULES = ("phi-3", "phi3", "modern-bert")
# Every byte that UTF-8 has.
_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A way to split text that llama.cpp has.

    Attributes:
        name: of ``tokenizer.ggml.pre``.
        patterns: applied one after the other.
        ignore_merges: a word that is a token is taken whole, whatever its merges give.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool


# Those whose patterns in llama.cpp equal what tokenizer.json says; some of its others come close.
PRE_TOKENIZERS = (
    PreTokenizer("lfm2", (THREE_DIGITS,), True),
    PreTokenizer("smaug-bpe", (THREE_DIGITS,), False),
    PreTokenizer("qwen2", (ONE_DIGIT,), False),
    PreTokenizer("gpt-2", (GPT2,), False),
    PreTokenizer("smollm", (DIGIT, GPT2), False),
)
USUAL = PRE_TOKENIZERS[0]


@dataclass(frozen=True, slots=True)
class TextRules:
    """What of a tokenizer goes into a GGUF beside tokens and merges.

    Attributes:
        pre: how text is split.
        add_bos: a text begins with the bos token.
        add_eos: a text ends with the eos token.
    """

    pre: PreTokenizer
    add_bos: bool
    add_eos: bool


def text_rules(assets: Assets, bos: int | None) -> TextRules:
    """The rules of a checkpoint's tokenizer, all of which llama.cpp follows.

    Args:
        assets: with a ``tokenizer.json`` of byte-pair encoding.
        bos: id of the token that the build begins texts with; None when it has none.

    Raises:
        UnsupportedError: what llama.cpp would do otherwise, and what to do.
    """
    content = assets.files["tokenizer.json"]
    tokenizer: dict[str, Any] = json.loads(without_mark(content))
    reason = (
        _of_name(assets.name)
        or _of_normalizers(normalizers(tokenizer))
        or _of_model(tokenizer["model"])
        or conflict(tokenizer.get("added_tokens") or ())
    )
    if reason:
        raise _refused(assets, reason)
    try:
        patterns = tuple(split_patterns(tokenizer.get("pre_tokenizer")))
        pre = _choose(patterns, bool(tokenizer["model"].get("ignore_merges")), content)
        first, last = _tokens_around(tokenizer, assets, bos)
    except OtherSplitError as found:
        raise _refused(assets, f"{found}, which llama.cpp does not have") from None
    except _NotInLlamaCpp as found:
        raise _refused(assets, str(found)) from None
    return TextRules(pre, first, last)


class _NotInLlamaCpp(Exception):
    """What the tokenizer does that llama.cpp does not."""


def _refused(assets: Assets, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{assets.folder / 'tokenizer.json'}: {reason}; a GGUF would give other tokens than the "
        "checkpoint, leave gguf out of --to"
    )


def _of_name(name: str) -> str | None:
    for word in _NAMES_WITH_RULES:
        if word in name.lower():
            return f"llama.cpp strips blanks beside added tokens of models called {word!r}"
    return None


def _of_normalizers(kinds: list[str]) -> str | None:
    return f"normalizes text ({', '.join(kinds)}), which llama.cpp does not" if kinds else None


def _of_model(model: dict[str, Any]) -> str | None:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"the model has {key} {model[key]!r}, which llama.cpp has not"
    letters = byte_letters()
    missing = [b for b in _UTF8_BYTES if letters[b] not in model["vocab"]]
    if missing:
        return f"has no token for {len(missing)} bytes (0x{missing[0]:02x} first), llama.cpp needs"
    return None


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (GPT-2's ``bytes_to_unicode``)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


# ---- how text is split


def _choose(patterns: tuple[str, ...], ignore_merges: bool, content: bytes) -> PreTokenizer:
    """The first that splits so; which words are taken whole matters only where merges fail."""
    same = [pre for pre in PRE_TOKENIZERS if pre.patterns == patterns]
    if not same:
        names = ", ".join(pre.name for pre in PRE_TOKENIZERS)
        unknown = next((p for p in patterns if p not in _KNOWN), patterns[0])
        raise _NotInLlamaCpp(
            f"splits text by {short(unknown)}, which equals no pre-tokenizer of llama.cpp "
            f"that lfmq knows ({names})"
        )
    odd = None if same[0].ignore_merges == ignore_merges else _unmerged(content)
    for pre in same:
        if pre.ignore_merges == ignore_merges or odd is None:
            return pre
    verb = "ignores" if ignore_merges else "follows"
    raise _NotInLlamaCpp(
        f"{verb} the merges of words that are tokens ({short(odd or '')} is one that its merges "
        f"do not give), llama.cpp's {same[0].name} does not"
    )


_KNOWN = {pattern for pre in PRE_TOKENIZERS for pattern in pre.patterns}


@lru_cache(maxsize=4)  # a plan is checked, then laid out
def _unmerged(content: bytes) -> str | None:
    """A token that the merges do not make of its letters; None where all are made."""
    tokenizer = json.loads(without_mark(content))
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    letters = set(byte_letters())
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault((left, right), rank)
    for word in tokenizer["model"]["vocab"]:
        if word not in added and letters.issuperset(word) and _merged(word, ranks) != [word]:
            return str(word)
    return None


def _merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the first merge of the list, the leftmost, until none."""
    parts, none = list(word), len(ranks)
    while len(parts) > 1:
        pairs = [ranks.get(pair, none) for pair in pairwise(parts)]
        best = min(pairs)
        if best == none:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


# ---- what is put around a text


def _tokens_around(
    tokenizer: dict[str, Any], assets: Assets, bos: int | None
) -> tuple[bool, bool]:
    """Whether a text gets the bos token before it and the eos token after it.

    The template of ``tokenizer.json`` alone says so: transformers reads no ``add_bos_token``
    beside it (``tokenization_utils_base.py``).
    """
    before, after = _template(tokenizer.get("post_processor"))
    eos = special_tokens(assets).get("eos_token")
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    if [ids.get(name) for name in before] not in ([], [bos]) or after not in ([], [eos]):
        raise _NotInLlamaCpp(
            f"puts {_listed(before)} before and {_listed(after)} after a text, llama.cpp only "
            f"the bos token (id {bos}) and the eos token ({eos})"
        )
    return bool(before), bool(after)


def _template(node: dict[str, Any] | None) -> tuple[list[Any], list[Any]]:
    """Names of the tokens that post-processors put before and after a text."""
    before: list[Any] = []
    after: list[Any] = []
    for processor in _processors(node):
        found = before
        for piece in processor.get("single") or ():
            if "Sequence" in piece:
                found = after
            else:
                found.append(piece.get("SpecialToken", {}).get("id"))
    return before, after


def _processors(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if node is None or node.get("type") == "ByteLevel":
        return
    if node.get("type") == "Sequence":
        for inner in node.get("processors") or ():
            yield from _processors(inner)
    elif node.get("type") == "TemplateProcessing":
        yield node
    else:
        raise _NotInLlamaCpp(f"has the post-processor {node.get('type')}, llama.cpp has not")


def _listed(tokens: Iterable[Any]) -> str:
    return " ".join(map(str, tokens)) or "nothing"
