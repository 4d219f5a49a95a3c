"""Key-values that a user adds to a GGUF: ``--metadata KEY=VALUE``, typed by key or by value."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from lfmq.formats.build import MetadataValue
from lfmq.quant.errors import UsageError

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+", re.ASCII)
_LONGEST_KEY, _LONGEST_TEXT, _ENTRIES = 200, 2**16, 10_000
# What the weights, the tokenizer and the format decide; the name has an option of its own.
_OWNED = re.compile(
    r"(gguf|tokenizer|split|lfm2|lfm2moe|lfmq|imatrix|quantize|adapter)\..*"
    r"|general\.(architecture|type|name|file_type|quantization_version|alignment|size_label)"
    r"|general\.(base_model|dataset)\.count",
    re.I,
)
_INTEGERS = ("top_k", "penalty_last_n", "mirostat")
_TEXTS = ("sequence",)
_LISTS = ("general.tags", "general.languages")
_SAMPLING = "general.sampling."


def parse_pairs(pairs: Iterable[str]) -> dict[str, MetadataValue]:
    """``KEY=VALUE`` of a command line as values by key.

    A key of ``general`` has its own type. Else ``true`` and ``false``, integers, numbers and
    JSON lists and texts are what they look like, and everything else is a text.

    Raises:
        UsageError: no ``=``, a key twice, or what :func:`checked` refuses.
    """
    found: dict[str, MetadataValue] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--metadata {_short(pair)}: expected KEY=VALUE")
        if key in found:
            raise UsageError(f"--metadata {_short(key)}: is given twice")
        found[key] = text if _is_text(key) else _parse(key, text)
    return checked(found)


def checked(metadata: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """The values as they are written.

    Raises:
        UsageError: a key that the writer owns or that is none, a value of the wrong type.
    """
    return {key: _checked(key, value) for key, value in metadata.items()}


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, MetadataValue]) -> None:
    """Write the values, in place of what the checkpoint's card says under the same key."""
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, tuple):
            writer.add_array(key, list(value))
        else:
            writer.add_key_value(key, value, _type_of(key, value))


def _type_of(key: str, value: Any) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        fits = -(2**31) <= value < 2**31
        return GGUFValueType.INT32 if fits else GGUFValueType.INT64
    return GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING


def _is_text(key: str) -> bool:
    """Keys of ``general`` are texts, but for settings and lists."""
    if key.startswith(_SAMPLING):
        return key.removeprefix(_SAMPLING) in _TEXTS
    return key.startswith("general.") and key not in _LISTS


def _parse(key: str, text: str) -> Any:
    if key in _LISTS and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if text in ("NaN", "Infinity", "-Infinity"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if value is None or isinstance(value, dict) else value


def _checked(key: str, value: Any) -> MetadataValue:
    if not isinstance(key, str) or not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise UsageError(
            f"--metadata {_short(key)}: expected a key of words with dots between them, such as "
            "general.author"
        )
    if _OWNED.fullmatch(key):
        own = "--name sets it" if key == "general.name" else "the writer sets it"
        raise UsageError(f"--metadata {key}: {own}; give another key")
    wanted, good = _wanted(key, value)
    if isinstance(value, int) and not isinstance(value, bool) and wanted == "a number":
        value = float(value) if abs(value) < 2**127 else value
    if isinstance(value, list | tuple) and good:
        kinds = {type(entry) for entry in value}
        good = 0 < len(value) <= _ENTRIES and len(kinds) == 1 and all(map(_is_value, value))
        value = tuple(value)
    elif good:
        good = _is_value(value)
    if not good:
        raise UsageError(f"--metadata {key}: is {_short(value)}, expected {wanted}")
    return value  # type: ignore[no-any-return]


def _wanted(key: str, value: Any) -> tuple[str, bool]:
    """What a key takes, in words, and whether the value's type is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if _is_text(key):
        return "a text", isinstance(value, str)
    if key in _LISTS:
        texts = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return "texts", texts
    if key.startswith(_SAMPLING):
        if key.removeprefix(_SAMPLING) in _INTEGERS:
            return "an integer", number and isinstance(value, int)
        return "a number", number
    return "a text, a number, true or false, or a list of one of them", True


def _is_value(value: Any) -> bool:
    if isinstance(value, str):
        try:
            return len(value.encode()) <= _LONGEST_TEXT
        except UnicodeEncodeError:
            return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and abs(value) < 3.4e38


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
