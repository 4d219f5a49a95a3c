"""JSON files beside the weights, read as what they should be: objects of plain values."""

import codecs
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.json_file import parse_object

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def json_object(assets: Assets, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; empty where there is none.

    Raises:
        CheckpointError: not JSON, not an object, or a lone surrogate in it.
    """
    return parse_object(assets.files.get(name, b"{}"), assets.folder / name)


def without_mark(content: bytes) -> bytes:
    """Without the byte order mark that editors on Windows put before UTF-8."""
    return content.removeprefix(codecs.BOM_UTF8)
