"""Which token ids a checkpoint's ``tokenizer.json`` can produce."""

from pathlib import Path

from lfmq.converter.model.tokenizer import Vocabulary as Vocabulary
from lfmq.converter.model.tokenizer import try_tokenizer
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
