"""Whether a build's tokenizer and chat template are the checkpoint's, and not older ones."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.gguf.chat_template import as_stored, stored_templates
from lfmq.formats.gguf.metadata import tokenizer_vocabulary
from lfmq.formats.gguf.scan import scan_gguf
from lfmq.formats.huggingface.chat_template import ADDITIONAL, JINJA, PROCESSOR, chat_templates
from lfmq.formats.versions import KNOWN_BAD
from lfmq.quant.errors import LfmqError

# The commit that updated the tokenizer files of LFM2.5-8B-A1B; its card has named it since.
_UPDATE = "feb5e04"
_OWN_CARD = re.compile(rb"^# LFM2\.5-8B-A1B\s*$", re.M)
_FILES = ("tokenizer.json", "tokenizer_config.json", JINJA, PROCESSOR)


def from_before_the_update(assets: Assets) -> str | None:
    """A line when a checkpoint's files are those that were replaced after the release.

    What the update changed is not published as text, so the files themselves do not tell. The
    card does: since then it names the commit. A download of exactly that commit is current
    whatever its card says; without a card nothing is known and nothing is said.
    """
    card = assets.files.get("README.md", b"")
    if not _OWN_CARD.search(card) or _UPDATE.encode() in card:
        return None
    if assets.folder.resolve().name.startswith(_UPDATE):  # the Hub's cache: snapshots/REVISION
        return None
    (row,) = (r for r in KNOWN_BAD if r.concern == "LFM2.5-8B-A1B")
    return (
        f"{assets.folder / 'README.md'}: does not name commit {_UPDATE}, so this download is "
        f"older; {row.what} {row.bad} {row.wrong}: {row.remedy} ({row.source})"
    )


def tokenizer_difference(path: Path, format: str, assets: Assets) -> str | None:
    """What of a build's tokenizer is not the checkpoint's; None where all is, or there is none.

    Compared are the tokens with their ids, which of them are special, and the chat template.
    """
    try:
        own = _from_gguf(path) if format == "gguf" else _from_folder(path, assets)
        compared = assets if own[0] else _without_tokens(assets)
        expected = _from_assets(compared, len(own[0] or ()))
    except (LfmqError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return "tokenizer"
    for name, found, wanted in zip(("tokens", "kinds of tokens"), own, expected, strict=False):
        if found is not None and wanted is not None and found != wanted:
            return name
    return None if own[2] == expected[2] else "chat template"


# Tokens, their kinds, and chat templates by the name they have in a GGUF.
_Facts = tuple[list[str] | None, list[int] | None, dict[str, str]]


def _from_assets(assets: Assets, size: int) -> _Facts:
    """Tokens, kinds and template of tokenizer files; ``size`` rows, as many as needed when 0."""
    names = kinds = None
    if "tokenizer.json" in assets.files:
        names, types = tokenizer_vocabulary(assets, size or _rows(assets))
        kinds = [int(t) for t in types]
    return names, kinds, as_stored(chat_templates(assets))


def _without_tokens(assets: Assets) -> Assets:
    return replace(assets, files={n: c for n, c in assets.files.items() if n != "tokenizer.json"})


def _rows(assets: Assets) -> int:
    document: dict[str, Any] = json.loads(assets.files["tokenizer.json"])
    ids = [*document["model"]["vocab"].values(), *(a["id"] for a in document["added_tokens"])]
    return int(max(ids)) + 1


def _from_folder(path: Path, assets: Assets) -> _Facts:
    names = [*_FILES, *(f"{ADDITIONAL}{p.name}" for p in path.glob(f"{ADDITIONAL}*.jinja"))]
    files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    if files.get("tokenizer.json") == assets.files.get("tokenizer.json"):
        files.pop("tokenizer.json", None)  # nothing to compare, whatever kind of tokenizer it is
    return _from_assets(replace(assets, files=files, folder=path), 0)


def _from_gguf(path: Path) -> _Facts:
    header = scan_gguf(path)
    tokens, kinds = (header.value(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    return tokens, kinds, stored_templates(header)
