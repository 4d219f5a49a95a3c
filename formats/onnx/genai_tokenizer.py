"""What of a ``tokenizer.json`` onnxruntime-genai does not follow.

It reads the file with code of its own (onnxruntime-extensions, ``bpe_tokenizer_model.hpp`` and
``bpe_utils.hpp``): patterns are compared with those it has functions for, normalizers and some
settings are passed over without a word. What follows was measured with genai 0.18
(docs/tokenizers.md). The file itself is the checkpoint's, so other readers of an ONNX folder,
transformers.js among them, make the checkpoint's tokens.
"""

import json
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.pretokenizers import (
    DIGIT,
    GPT2,
    ONE_DIGIT,
    THREE_DIGITS,
    OtherSplitError,
    normalizers,
    short,
    split_patterns,
    steps_of,
)
from lfmq.formats.huggingface.side_files import without_mark

_MATCHED = (THREE_DIGITS, ONE_DIGIT, GPT2, DIGIT)
_FLAGS = ("lstrip", "single_word")


def unlike_genai(assets: Assets) -> str | None:
    """Why genai would make other tokens than the checkpoint; None where it makes the same."""
    if "tokenizer.json" not in assets.files:
        return None
    tokenizer: dict[str, Any] = json.loads(without_mark(assets.files["tokenizer.json"]))
    kinds = normalizers(tokenizer)
    if kinds:
        return f"does not normalize text ({', '.join(kinds)})"
    for token in tokenizer.get("added_tokens") or ():
        for flag in _FLAGS:
            if token.get(flag):
                return f"does not follow {flag} of the added token {token['content']!r}"
    node = tokenizer.get("pre_tokenizer")
    if any(step.get("type") == "Digits" for step in steps_of(node)):
        return "does not follow the pre-tokenizer Digits"
    try:
        unknown = [p for p in split_patterns(node) if p not in _MATCHED]
    except OtherSplitError as error:
        return f"does not follow a tokenizer that {error}"
    return f"is not known to split text by {short(unknown[0])}" if unknown else None
