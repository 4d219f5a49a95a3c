"""Reads JSON files of a checkpoint or a build: the document, or one line about what is wrong.

A byte order mark, which editors on Windows write, is read over; transformers stops at one.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from lfmq.quant.errors import CheckpointError

# How a file begins that Git LFS left in place of the real one (its specification, v1).
LFS_MARK = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that is only Git LFS's note of where the real one is.

    Args:
        path: named in the error.
        start: its first bytes.

    Raises:
        CheckpointError: it is one.
    """
    if start.startswith(LFS_MARK):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' in the folder, "
            "or download the checkpoint with 'hf download ORG/NAME'"
        )


def as_utf8(content: bytes) -> bytes:
    """A JSON text in UTF-8 without a byte order mark, as every runtime reads it.

    Raises:
        ValueError: not a text in one of JSON's encodings.
    """
    encoding = json.detect_encoding(content)
    return content if encoding == "utf-8" else content.decode(encoding).encode()


def parse_object(content: bytes, path: Path, *, finite: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        content: of the file.
        path: named in errors.
        finite: refuse ``NaN`` and ``Infinity``, which Python reads and other parsers do not.

    Raises:
        CheckpointError: not JSON, not an object, or text that cannot be written again.
    """
    refuse_pointer(path, content)
    try:
        document = json.loads(
            as_utf8(content), parse_constant=_refuse_constant if finite else None
        )
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate cannot be written
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch it again")
    return document


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}")
