"""A ``tokenizer.json`` tried out in a child: its native code may panic, abort or never end."""

import json
from typing import Any

from tokenizers import Tokenizer

from lfmq.converter.jobs.limited_child import serve

_REASON_LENGTH = 160
# Runs of one character and mixtures, on which a pattern that backtracks takes for ever.
_TEXTS = (
    "The quick brown fox, 12345.67 times; don't! Straße Ελλάδα Россия 中文 日本語 한국어 العربية",
    "a" * 64 + "!" + "b" * 64,
    " " * 64 + "x" + "\n" * 32 + "\t" * 32 + "\r\n" * 16,
    "1" * 64 + "." + "-_" * 32,
    "e\u0301" * 32 + "👩‍👩‍👧" * 8 + "\u0000\u00a0\u200b\ufeff\ufffd",
    "",
)


def answer(content: str) -> dict[str, Any]:
    """The ``size`` of the vocabulary and the ``last`` token, or the ``error``."""
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError) as error:
        return {"error": f"not valid JSON ({_reason(error)})"}
    except MemoryError:
        return {"error": "needs too much memory"}
    try:
        _refuse_prefix(document)
        tokenizer = Tokenizer.from_str(content)
        ids = _token_ids(document)
        _use(tokenizer)
    except BaseException as error:  # a panic of Rust is no Exception
        return {"error": f"not a tokenizer of the tokenizers library ({_reason(error)})"}
    last = max(ids, key=lambda token: ids[token], default="")
    return {"size": ids.get(last, -1) + 1, "last": last}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__


def _refuse_prefix(document: dict[str, Any]) -> None:
    """Keep from tokenizers 0.23 what it dies of: it cuts the prefix's length off any merge."""
    model = document["model"]
    if model.get("type", "BPE") == "BPE" and model.get("continuing_subword_prefix"):
        raise ValueError("continuing_subword_prefix is set, byte-level BPE has none")


def _use(tokenizer: Tokenizer) -> None:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for special in (False, True):
        for text in _TEXTS:
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=special).ids)


def _token_ids(document: dict[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score in the order of ids
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids = dict(vocabulary.items())
    ids |= {added["content"]: added["id"] for added in document.get("added_tokens", ())}
    return ids


if __name__ == "__main__":
    serve(answer)
