"""The checkpoint's tokenizer: tried out in a child process first, then text to token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lfmq.converter.jobs.limited_child import ChildDied, Limits, ask
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.side_files import without_mark
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError

TOKENIZER = "tokenizer.json"
_CHILD = "lfmq.converter.model.tokenizer_child"
_LIMITS = Limits(seconds=5, memory=3 * 2**29)
_LARGEST = 2**28  # bytes of a file; tokenizers of 256,000 tokens have 33 MB


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        size: one more than the highest id.
        last: the token with that id.
    """

    size: int
    last: str


# What was found of each content, by sha256: a file is tried once, however often it is opened.
_tried: dict[str, Vocabulary | str] = {}


def try_tokenizer(content: bytes) -> Vocabulary:
    """Load a ``tokenizer.json`` and tokenize with it, in a process of its own.

    Raises:
        ValueError: why it is none, in words that follow the file's name.
    """
    key = hashlib.sha256(content).hexdigest()
    if key not in _tried:
        _tried[key] = _try(content)
    found = _tried[key]
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _try(content: bytes) -> Vocabulary | str:
    if len(content) > _LARGEST:
        return f"has {len(content):,} bytes, more than any tokenizer"
    try:
        text = without_mark(content).decode()
    except UnicodeDecodeError as error:
        return f"not valid JSON ({error})"
    try:
        (found,) = ask(_CHILD, [text], _LIMITS)
    except ChildDied as error:
        return f"not a tokenizer of the tokenizers library (loading it {error})"
    if "error" in found:
        return str(found["error"])
    return Vocabulary(found["size"], found["last"])


def load_tokenizer(assets: Assets) -> Tokenizer:
    """The checkpoint's tokenizer, which neither pads nor truncates, whatever its file says.

    Raises:
        ValidationError: there is none, or it cannot be used.
    """
    path = assets.folder / TOKENIZER
    if TOKENIZER not in assets.files:
        raise ValidationError(f"{path}: not found; text cannot be tokenized without it")
    content = assets.files[TOKENIZER]
    try:
        try_tokenizer(content)
        tokenizer = Tokenizer.from_str(without_mark(content).decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise ValidationError(f"{path}: {error}; fetch it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_texts(texts: Sequence[str], assets: Assets, config: ModelConfig) -> list[list[int]]:
    """Token ids of rendered texts, each after the bos token.

    Raises:
        ValidationError: there is no tokenizer, it fails, or it belongs to another model.
    """
    path, found = assets.folder / TOKENIZER, []
    for ids in _encode(load_tokenizer(assets), list(texts), path):
        if config.bos_token_id is not None and ids[:1] != [config.bos_token_id]:
            ids.insert(0, config.bos_token_id)
        if max(ids, default=0) >= config.vocab_size:
            raise ValidationError(
                f"{path}: gives id {max(ids)}, the config's vocab_size is {config.vocab_size}; "
                "the tokenizer belongs to another model"
            )
        found.append(ids)
    return found


def _encode(tokenizer: Tokenizer, texts: list[str], path: Path) -> list[list[int]]:
    try:
        return [list(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    except BaseException as error:
        # a panic of Rust derives from BaseException alone
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200]
            raise ValidationError(f"{path}: cannot tokenize the text ({reason})") from error
        raise
