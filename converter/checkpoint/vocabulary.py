"""Which token ids a checkpoint's ``tokenizer.json`` can produce, and what it saves beside."""

import json
from pathlib import Path

from lfmq.converter.model.tokenizer import Vocabulary as Vocabulary
from lfmq.converter.model.tokenizer import try_tokenizer
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.side_files import without_mark
from lfmq.quant.errors import CheckpointError


def parse_vocabulary(content: bytes, source: Path) -> Vocabulary:
    """Count the tokens of a ``tokenizer.json``; ``source`` is named in errors.

    Raises:
        CheckpointError: not JSON, or not built as the tokenizers library builds it.
    """
    try:
        return try_tokenizer(content)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}; fetch it again") from error


def saved_for_training(assets: Assets) -> str:
    """Which of padding and truncation an opened checkpoint's tokenizer saves, in words."""
    document = json.loads(without_mark(assets.files.get("tokenizer.json", b"{}")))
    return " and ".join(key for key in ("padding", "truncation") if document.get(key) is not None)
