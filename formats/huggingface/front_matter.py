"""What a checkpoint says of itself: the front matter of its card, its Hub id, how it samples.

The front matter is YAML between two lines ``---`` at the top of ``README.md``; its keys are the
Hub's (https://huggingface.co/docs/hub/model-cards). Every scalar is taken as the text that stands
there, so that the language ``no`` stays one. A card is a stranger's text: only short texts and
lists of them are taken, and one that cannot be read is a line for the user, not an error.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.side_files import GENERATION_CONFIG, json_object, without_mark

CARD = "README.md"
_LONGEST, _TEXT, _ENTRIES = 2**16, 300, 100
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NOTHING = ("", "~", "null")
# Of generation_config.json: what counts as set, by name; a top_k of 0 is off.
_SAMPLING = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """What a card states; empty where it does not.

    Attributes:
        problem: why the front matter cannot be read.
    """

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    base_model: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str = ""
    url: str = ""
    problem: str = ""


def front_matter(assets: Assets) -> FrontMatter:
    """The front matter of the checkpoint's card; never an error."""
    content = without_mark(assets.files.get(CARD, b""))
    card = content.decode("utf-8", "replace").replace("\r\n", "\n")
    if not card.startswith("---\n"):
        return FrontMatter()
    front, end, _ = card[3:].partition("\n---")
    if not end or len(front) > _LONGEST:
        return FrontMatter(problem="its front matter has no end, or is too long")
    try:
        document = _parse(front)
    except Exception as error:  # of a parser that is given anything
        return FrontMatter(problem=f"its front matter is not YAML ({_reason(error)})")
    if not isinstance(document, dict):
        if not front.strip():
            return FrontMatter()
        return FrontMatter(problem="its front matter is no list of keys and values")
    return FrontMatter(
        license=_one(document, "license"),
        license_name=_one(document, "license_name"),
        license_link=_one(document, "license_link"),
        base_model=_many(document, "base_model"),
        language=_many(document, "language"),
        tags=_many(document, "tags"),
        pipeline_tag=_one(document, "pipeline_tag"),
        url=_one(document, "url"),
    )


def hub_id(assets: Assets) -> str:
    """The checkpoint's own ``org/name`` on the Hub, where it is known; else empty.

    A snapshot in the Hub's cache lies in ``models--ORG--NAME/snapshots/REVISION``.
    """
    parts = assets.folder.resolve().parts[-3:]
    if len(parts) == 3 and parts[1] == "snapshots" and parts[0].startswith("models--"):
        name: Any = parts[0].removeprefix("models--").replace("--", "/", 1)
    else:
        name = assets.config_json.get("_name_or_path")
    # else a path on somebody's machine
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else ""


def base_models(assets: Assets) -> tuple[str, ...]:
    """What a build quantizes: the checkpoint on the Hub, else what its card is based on."""
    own = hub_id(assets)
    return (own,) if own else front_matter(assets).base_model


def sampling_settings(assets: Assets) -> dict[str, float]:
    """Settings of ``generation_config.json`` that a runtime can use, by its names."""
    return {k: v for k, v in _given_settings(assets).items() if _is_usable(k, v)}


def card_warnings(assets: Assets) -> tuple[str, ...]:
    """Lines on what could not be read of the card and of the sampling settings."""
    lines = []
    if problem := front_matter(assets).problem:
        lines.append(f"{CARD}: {problem}; license, base model and tags are left out")
    for key, value in _given_settings(assets).items():
        if not _is_usable(key, value):
            low, high = _SAMPLING[key]
            lines.append(
                f"{GENERATION_CONFIG}: {key} is {repr(value)[:40]}, expected a number from "
                f"{low:g} to {high:g}; it is left out of the builds' own settings"
            )
    return tuple(lines)


def _given_settings(assets: Assets) -> dict[str, Any]:
    document = json_object(assets, GENERATION_CONFIG)
    return {key: document[key] for key in _SAMPLING if document.get(key) is not None}


def _is_usable(key: str, value: Any) -> bool:
    kinds = int if key == "top_k" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    low, high = _SAMPLING[key]
    return low <= value <= high and math.isfinite(value)


def _parse(text: str) -> Any:
    import yaml  # here: commands that read no card start without it

    # tabs are no YAML, but some cards have them; gguf-py reads them as two blanks too
    return yaml.load(text.replace("\t", "  "), Loader=yaml.BaseLoader)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _one(document: dict[Any, Any], key: str) -> str:
    return _short(document.get(key))


def _many(document: dict[Any, Any], key: str) -> tuple[str, ...]:
    value = document.get(key)
    listed = value[:_ENTRIES] if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in map(_short, listed) if text))


def _short(value: Any) -> str:
    """A text on one line, without characters that are not printed; else nothing."""
    if not isinstance(value, str) or len(value) > _TEXT:
        return ""
    text = " ".join(value.split())
    return text if text.isprintable() and text not in _NOTHING else ""
