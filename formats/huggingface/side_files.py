"""JSON files beside the weights, read as what they should be: objects of plain values."""

import codecs
import json
from pathlib import Path
from typing import Any

from lfmq.formats.build import Assets
from lfmq.quant.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def json_object(assets: Assets, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; empty where there is none.

    Raises:
        CheckpointError: not JSON, not an object, or a lone surrogate in it.
    """
    return parse_object(assets.files.get(name, b"{}"), assets.folder / name)


def parse_object(content: bytes, source: Path) -> dict[str, Any]:
    """The object that ``content`` is; a byte order mark before it is none of its values.

    Raises:
        CheckpointError: not JSON, not an object, or a lone surrogate in it; ``source`` is named.
    """
    try:
        document = json.loads(without_mark(content))
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate cannot be written
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{source}: expected a JSON object; fetch it again")
    return document


def without_mark(content: bytes) -> bytes:
    """Without the byte order mark that editors on Windows put before UTF-8."""
    return content.removeprefix(codecs.BOM_UTF8)
