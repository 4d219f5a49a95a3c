"""Text to windows of tokens: plain text or JSONL, chats through the checkpoint's own template."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.model.chat import Chat, ChatTemplate
from lfmq.converter.model.tokenizer import encode_texts
from lfmq.formats.build import Assets
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError

# A domain, and the text or the chat that is reported under it.
_Entry = tuple[str, str | Chat]


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text, rendered, and the domain it is reported under."""

    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids cut into windows of equal length.

    Attributes:
        ids: int64 [W, S].
        domains: the domain of each window.
        text_sha256: of the files the text came from.
    """

    ids: NDArray[np.int64]
    domains: tuple[str, ...]
    text_sha256: str

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return int(self.ids.size)


def load_windows(
    paths: Iterable[Path],
    assets: Assets,
    config: ModelConfig,
    *,
    tokens: int,
    sequence: int,
    chats: bool = True,
) -> Windows:
    """Read text files and cut them into windows.

    A domain's documents follow each other, each after the bos token, and every window starts with
    it. Windows are taken from the domains in turn until ``tokens`` are reached, so that a part of
    a long text has all its domains.

    Args:
        paths: plain text (the domain is the file's stem) or ``.jsonl`` with a ``text`` or
            ``messages`` and an optional ``domain`` on each line.
        assets: the tokenizer and chat template.
        config: vocabulary size and bos token.
        tokens: how many tokens to take, rounded down to whole windows, at least one.
        sequence: tokens in a window.
        chats: whether lines with messages are taken; without them the text has another hash.

    Raises:
        ChatError: there are chats, but no chat template that renders them.
        ValidationError: a file that cannot be read, a bad line, too little text.
    """
    paths = tuple(paths)
    if sequence > config.max_position_embeddings:
        raise ValidationError(
            f"--sequence {sequence} is longer than the model's context of "
            f"{config.max_position_embeddings} tokens"
        )
    entries = [entry for path in paths for entry in read_entries(path)]
    documents = _render([e for e in entries if chats or isinstance(e[1], str)], assets)
    streams = _tokenize(documents, assets, config)
    start = () if config.bos_token_id is None else (config.bos_token_id,)
    by_domain = {d: _cut(s, start, sequence) for d, s in streams.items()}
    taken = list(_take_turns(by_domain, max(1, tokens // sequence)))
    if not taken:
        found = sum(len(s) for s in streams.values())
        raise ValidationError(
            f"{', '.join(map(str, paths))}: {found} tokens, fewer than one window of {sequence} "
            "in any domain; give more text or a smaller --sequence"
        )
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    digest = hashlib.sha256(b"".join(parts if chats else [*parts, b"without chats"]))
    ids = np.stack([window for _, window in taken])
    return Windows(ids, tuple(domain for domain, _ in taken), digest.hexdigest())


def _take_turns(
    by_domain: dict[str, list[NDArray[np.int64]]], count: int
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    longest = max(map(len, by_domain.values()), default=0)
    turns = ((d, w[i]) for i in range(longest) for d, w in by_domain.items() if i < len(w))
    yield from (pair for pair, _ in zip(turns, range(count), strict=False))


def _cut(
    stream: NDArray[np.int64], start: tuple[int, ...], sequence: int
) -> list[NDArray[np.int64]]:
    """Windows of ``start`` and the stream's next tokens; a shorter rest is dropped."""
    step = sequence - len(start)
    head = np.array(start, np.int64)
    ends = range(step, len(stream) + 1, step)
    return [np.concatenate((head, stream[end - step : end])) for end in ends]


def _tokenize(
    documents: list[Document], assets: Assets, config: ModelConfig
) -> dict[str, NDArray[np.int64]]:
    streams: dict[str, list[int]] = {}
    encoded = encode_texts([d.text for d in documents], assets, config)
    for document, ids in zip(documents, encoded, strict=True):
        streams.setdefault(document.domain, []).extend(ids)
    return {domain: np.array(ids, np.int64) for domain, ids in streams.items()}


def _render(entries: list[_Entry], assets: Assets) -> list[Document]:
    """Every entry as text; all chats go through the template together."""
    chats = [given for _, given in entries if isinstance(given, Chat)]
    texts = iter(ChatTemplate(assets).render(chats) if chats else ())
    return [
        Document(domain, given if isinstance(given, str) else next(texts))
        for domain, given in entries
    ]


def read_entries(path: Path) -> list[_Entry]:
    """The texts and chats of a file, each with its domain.

    Raises:
        ValidationError: a file that cannot be read, or a bad line.
    """
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not content.strip():
        raise ValidationError(f"{path}: is empty")
    if path.suffix != ".jsonl":
        return [(path.stem, content)]
    lines = enumerate(content.split("\n"), 1)
    return [_parse_entry(path, n, line) for n, line in lines if line.strip()]


def _parse_entry(path: Path, number: int, line: str) -> _Entry:
    where = f"{path}, line {number}"
    record = parse_line(where, line)
    if not isinstance(record, dict) or not isinstance(record.get("domain", ""), str):
        raise ValidationError(f"{where}: expected an object with a text or messages")
    domain = record.get("domain", path.stem)
    if isinstance(record.get("text"), str):
        return domain, record["text"]
    if not isinstance(record.get("messages"), list):
        raise ValidationError(f"{where}: has neither a 'text' string nor a 'messages' list")
    for key in ("tools", "documents"):
        if not isinstance(record.get(key), list | None):
            raise ValidationError(f"{where}: {key} is no list; expected objects, or leave it out")
    return domain, Chat(
        record["messages"], record.get("tools"), record.get("documents"), where=where
    )


def parse_line(where: str, line: str) -> Any:
    """A line of JSON; ``where`` is named in errors.

    Raises:
        ValidationError: it is none, or holds half of a surrogate pair, which is no text.
    """
    try:
        record = json.loads(line)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValidationError(
            f"{where}: holds {half}, half of a surrogate pair, which is no text; remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{where}: not JSON ({error})") from error
    return record
