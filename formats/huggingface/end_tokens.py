"""The tokens that generation stops at, which every build states in its runtime's own way.

transformers 5.23 takes ``eos_token_id`` of ``generation_config.json``, an integer or a list
(``GenerationMixin._prepare_special_tokens``), and that of ``config.json`` only where there is no
``generation_config.json``. Where that file names none, generation would not stop at all: here the
config's and then the tokenizer's own are taken, and :func:`end_token_conflicts` says so.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.side_files import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    json_object,
    without_mark,
)
from lfmq.formats.huggingface.special_tokens import special_tokens
from lfmq.formats.plan import ModelConfig

_KEY = "eos_token_id"
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class EndTokens:
    """What generation stops at.

    Attributes:
        ids: token ids, the one that ends a turn first; empty where none is known.
        source: the file that says so.
    """

    ids: tuple[int, ...]
    source: str


def end_tokens(assets: Assets, config: ModelConfig) -> EndTokens:
    """The end tokens of a checkpoint.

    The first is the tokenizer's ``eos_token`` where that is among them, which templates print,
    else the first that the file lists.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    own = tokenizer_end(assets)
    for source, ids in _stated(assets, config):
        if ids:
            return EndTokens(tuple(sorted(ids, key=lambda i: i != own)), source)
    return EndTokens((), _CONFIG)


def stating_end_tokens(
    document: dict[str, Any], assets: Assets, config: ModelConfig
) -> dict[str, Any]:
    """A ``config.json`` with the end tokens of :func:`end_tokens`, unchanged where it has them."""
    ids = end_tokens(assets, config).ids
    if not ids or set(_ids(document.get(_KEY), config.vocab_size)) == set(ids):
        return document
    return document | {_KEY: as_value(ids)}


def as_value(ids: tuple[int, ...]) -> int | list[int]:
    """As JSON files have it: one id, or a list."""
    return ids[0] if len(ids) == 1 else list(ids)


def end_token_conflicts(assets: Assets, config: ModelConfig) -> tuple[str, ...]:
    """Lines on files that name other end tokens than the one that is followed, or none.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    found = end_tokens(assets, config)
    if not found.ids:
        return ("no file names an end token: generation stops at the length limit alone",)
    lines = []
    if found.source != GENERATION_CONFIG and GENERATION_CONFIG in assets.files:
        lines.append(
            f"{GENERATION_CONFIG} names no end token: transformers would not stop, the builds "
            f"stop at {_words(found.ids)} of {found.source}"
        )
    lines += [
        f"{_KEY} is {_words(ids)} in {source} and {_words(found.ids)} in {found.source}: "
        f"generation and the builds stop at {_words(found.ids)}"
        for source, ids in _stated(assets, config)
        if ids and source != found.source and not set(ids) <= set(found.ids)
    ]
    return tuple(lines)


def tokenizer_end(assets: Assets) -> int | None:
    """The id of the tokenizer's ``eos_token``."""
    return token_ids(assets).get(special_tokens(assets).get("eos_token", ""))


def token_ids(assets: Assets) -> dict[str, int]:
    """Ids of the tokens that ``tokenizer.json`` adds to its vocabulary, by text."""
    return dict(_added_tokens(assets.files.get("tokenizer.json", b"{}")))


@lru_cache(maxsize=4)  # megabytes of JSON, asked for by every format
def _added_tokens(content: bytes) -> tuple[tuple[str, int], ...]:
    try:
        added = json.loads(without_mark(content)).get("added_tokens") or ()
        return tuple((a["content"], a["id"]) for a in added if isinstance(a["content"], str))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()  # whoever needs the tokenizer refuses it


def _stated(assets: Assets, config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What each file says, in the order they are followed."""
    own = tokenizer_end(assets)
    size = config.vocab_size
    return (
        (GENERATION_CONFIG, _ids(json_object(assets, GENERATION_CONFIG).get(_KEY), size)),
        (_CONFIG, _ids(assets.config_json.get(_KEY, config.eos_token_id), size)),
        (TOKENIZER_CONFIG, _ids(own, size)),
    )


def _ids(value: Any, size: int) -> tuple[int, ...]:
    """Ids the model can produce, each once; what is none is passed over as never produced."""
    listed = value if isinstance(value, list) else [value]
    good = [i for i in listed if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size]
    return tuple(dict.fromkeys(good))


def _words(ids: tuple[int, ...]) -> str:
    return str(as_value(ids))
