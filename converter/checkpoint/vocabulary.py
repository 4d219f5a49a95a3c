"""Which token ids a checkpoint's ``tokenizer.json`` can produce."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lfmq.quant.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        size: one more than the highest id.
        last: the token with that id.
    """

    size: int
    last: str


def parse_vocabulary(content: bytes, source: Path) -> Vocabulary:
    """Count the tokens of a ``tokenizer.json``; ``source`` is named in errors.

    Raises:
        CheckpointError: not JSON, or not built as the tokenizers library builds it.
    """
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON ({error}); fetch it again") from error
    try:
        _refuse_prefix(document)
        Tokenizer.from_str(content.decode())
        ids = _token_ids(document)
    except Exception as error:  # the only class the tokenizers library raises
        raise CheckpointError(
            f"{source}: not a tokenizer of the tokenizers library ({error}); fetch it again"
        ) from error
    last = max(ids, key=lambda token: ids[token], default="")
    return Vocabulary(ids.get(last, -1) + 1, last)


def _refuse_prefix(document: dict[str, Any]) -> None:
    """Keep from tokenizers 0.23 what it dies of: it cuts the prefix's length off any merge."""
    model = document["model"]
    if model.get("type", "BPE") == "BPE" and model.get("continuing_subword_prefix"):
        raise ValueError("continuing_subword_prefix is set, byte-level BPE has none")


def _token_ids(document: dict[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score in the order of ids
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids = dict(vocabulary.items())
    ids |= {added["content"]: added["id"] for added in document.get("added_tokens", ())}
    return ids
