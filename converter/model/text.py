"""Text to windows of tokens: plain text or JSONL, chats through the checkpoint's own template."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfmq.formats.build import Assets
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError

# Templates print today's date; evidence must not depend on the day it was gathered.
_PINNED_DATE = "2025-01-01"


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
    paths: Iterable[Path], assets: Assets, config: ModelConfig, *, tokens: int, sequence: int
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

    Raises:
        ValidationError: a file that cannot be read, a bad line, too little text.
    """
    paths = tuple(paths)
    if sequence > config.max_position_embeddings:
        raise ValidationError(
            f"--sequence {sequence} is longer than the model's context of "
            f"{config.max_position_embeddings} tokens"
        )
    documents = [d for path in paths for d in _read_documents(path, assets)]
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
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in paths))
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


def encode_texts(texts: Sequence[str], assets: Assets, config: ModelConfig) -> list[list[int]]:
    """Token ids of rendered texts, each after the bos token.

    Raises:
        ValidationError: there is no tokenizer, or it belongs to another model.
    """
    found = []
    for encoding in load_tokenizer(assets).encode_batch(list(texts), add_special_tokens=False):
        ids = list(encoding.ids)
        if config.bos_token_id is not None and ids[:1] != [config.bos_token_id]:
            ids.insert(0, config.bos_token_id)
        if max(ids, default=0) >= config.vocab_size:
            raise ValidationError(
                f"{assets.folder / 'tokenizer.json'}: gives id {max(ids)}, the config's "
                f"vocab_size is {config.vocab_size}; the tokenizer belongs to another model"
            )
        found.append(ids)
    return found


def load_tokenizer(assets: Assets) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        ValidationError: there is none, or it cannot be parsed.
    """
    path = assets.folder / "tokenizer.json"
    if "tokenizer.json" not in assets.files:
        raise ValidationError(f"{path}: not found; text cannot be tokenized without it")
    try:
        return Tokenizer.from_str(assets.files["tokenizer.json"].decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise ValidationError(f"{path}: not a tokenizer ({error})") from error


def _read_documents(path: Path, assets: Assets) -> list[Document]:
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not content.strip():
        raise ValidationError(f"{path}: is empty")
    if path.suffix != ".jsonl":
        return [Document(path.stem, content)]
    render = ChatTemplate(assets)
    lines = enumerate(content.split("\n"), 1)
    return [_parse_line(path, n, line, render) for n, line in lines if line.strip()]


def _parse_line(path: Path, number: int, line: str, render: "ChatTemplate") -> Document:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("domain", ""), str):
        raise ValidationError(f"{where}: expected an object with a text or messages")
    domain = record.get("domain", path.stem)
    if isinstance(record.get("text"), str):
        return Document(domain, record["text"])
    if isinstance(record.get("messages"), list):
        return Document(domain, render(record["messages"], record.get("tools"), where=where))
    raise ValidationError(f"{where}: has neither a 'text' string nor a 'messages' list")


class ChatTemplate:
    """The checkpoint's chat template in a sandbox, with the names templates rely on."""

    def __init__(self, assets: Assets) -> None:
        config = _tokenizer_config(assets)
        source = assets.files.get("chat_template.jinja")
        self._source = source.decode() if source else config.get("chat_template")
        self._where = assets.folder
        self._tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token")
        }

    @property
    def thinks(self) -> bool:
        """Whether the model writes thoughts before it answers.

        Templates of models that do open them with ``<think>``; others mention ``</think>`` at
        most, to cut foreign thoughts away.
        """
        return isinstance(self._source, str) and "<think>" in self._source

    def __call__(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        where: str = "messages",
        add_generation_prompt: bool = False,
    ) -> str:
        """A chat as text.

        Raises:
            ValidationError: there is no template, or it refuses the messages.
        """
        if not isinstance(self._source, str):
            raise ValidationError(
                f"{where}: has messages, but {self._where} has no chat template to render them"
            )
        try:
            return _compile_template(self._source).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (TemplateError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValidationError(f"{where}: the chat template failed ({error!r})") from error


@lru_cache(maxsize=8)  # compiling takes a hundred times as long as rendering a chat
def _compile_template(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: _PINNED_DATE
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """``{% generation %}``, which marks what a model is trained on; here only what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tokenizer_config(assets: Assets) -> dict[str, Any]:
    config = json.loads(assets.files.get("tokenizer_config.json", b"{}"))
    return config if isinstance(config, dict) else {}


def _to_json(value: Any, indent: int | None = None) -> str:
    """As transformers does: jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
