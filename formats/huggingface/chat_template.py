"""The chat templates of a checkpoint, found where transformers finds them, and where they go.

The order is that of ``PreTrainedTokenizerBase._from_pretrained`` (transformers 5.23,
``tokenization_utils_base.py``): ``chat_template.jinja`` with ``additional_chat_templates/``, else
``chat_template`` of ``tokenizer_config.json``: a text, a list of named ones, or an object of them.
Old processors keep theirs in ``chat_template.json``, which comes last.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfmq.formats.build import Assets, as_json
from lfmq.formats.huggingface.side_files import TOKENIZER_CONFIG, json_object, without_mark
from lfmq.quant.errors import CheckpointError

JINJA, ADDITIONAL = "chat_template.jinja", "additional_chat_templates/"
PROCESSOR = "chat_template.json"
DEFAULT, TOOL_USE = "default", "tool_use"
_KEY = "chat_template"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """Chat templates by name, and the file that has them.

    Attributes:
        named: Jinja sources; the one used without further choice is ``default``.
        source: the file or folder they are from, relative to the checkpoint; empty without any.
    """

    named: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def default(self) -> str | None:
        """The template that chats are rendered with."""
        return self.named.get(DEFAULT)

    def choose(self, *, tools: bool) -> str | None:
        """The name of the template for a chat with or without tools, as transformers chooses."""
        name = TOOL_USE if tools and TOOL_USE in self.named else DEFAULT
        return name if name in self.named else None


def chat_templates(assets: Assets) -> ChatTemplates:
    """Every chat template of a checkpoint.

    Raises:
        CheckpointError: a file is not UTF-8 text or not JSON, or holds something else.
    """
    if named := _of_files(assets):
        return ChatTemplates(named, JINJA if DEFAULT in named else ADDITIONAL)
    for name in (TOKENIZER_CONFIG, PROCESSOR):
        given = json_object(assets, name).get(_KEY)
        if given is not None:
            return ChatTemplates(_of_value(given, assets.folder / name), name)
    return ChatTemplates()


def other_templates(assets: Assets) -> tuple[str, ...]:
    """Files whose templates are not those of :func:`chat_templates`: older ones, which lose.

    Raises:
        CheckpointError: as :func:`chat_templates`.
    """
    used = chat_templates(assets)
    found = []
    for name in (TOKENIZER_CONFIG, PROCESSOR):
        given = json_object(assets, name).get(_KEY)
        if name == used.source or given is None:
            continue
        if _of_value(given, assets.folder / name) != used.named:
            found.append(name)
    return tuple(found)


def build_files(assets: Assets) -> dict[str, bytes]:
    """The files of a checkpoint as a build's folder carries them, by name.

    Runtimes look for templates in different places, so each place has the ones transformers uses:
    the Jinja files all of them, ``tokenizer_config.json`` the default one as a text, which is all
    that transformers.js 4 reads and all that onnxruntime-genai 0.18 takes there. A file that says
    so already keeps its bytes, and so does every other file, but for a byte order mark, which
    JSON readers refuse.

    Raises:
        CheckpointError: as :func:`chat_templates`, or a template's name cannot be a file's.
    """
    files = {n: without_mark(c) if n.endswith(".json") else c for n, c in assets.files.items()}
    named = chat_templates(assets).named
    if not named:
        return files
    for name, source in named.items():
        if name != DEFAULT and not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{assets.folder / TOKENIZER_CONFIG}: a chat template is named {name[:60]!r}, "
                "expected letters, digits, dots, dashes and underscores; rename it"
            )
        path = JINJA if name == DEFAULT else f"{ADDITIONAL}{name}.jinja"
        if path not in files or _text(files[path], assets.folder / path) != source:
            files[path] = source.encode()
    if PROCESSOR in other_templates(assets):
        del files[PROCESSOR]
    config = json_object(assets, TOKENIZER_CONFIG)
    if config.get(_KEY) != named.get(DEFAULT):
        own = {} if DEFAULT not in named else {_KEY: named[DEFAULT]}
        kept = {key: value for key, value in config.items() if key != _KEY}
        files[TOKENIZER_CONFIG] = as_json(kept | own)
    return files


def _of_files(assets: Assets) -> dict[str, str]:
    named = {}
    if JINJA in assets.files:
        named[DEFAULT] = _text(assets.files[JINJA], assets.folder / JINJA)
    for path in sorted(n for n in assets.files if n.startswith(ADDITIONAL)):
        name = path.removeprefix(ADDITIONAL).removesuffix(".jinja")
        named[name] = _text(assets.files[path], assets.folder / path)
    return named


def _text(content: bytes, source: Path) -> str:
    """As Python reads a text file: line ends are single ones."""
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{source}: not UTF-8 text (byte {error.start}); fetch it again"
        ) from error


def _of_value(given: Any, source: Path) -> dict[str, str]:
    """A text, a list of objects with name and template, or an object of templates by name."""
    named: Any = {DEFAULT: given} if isinstance(given, str) else given
    if isinstance(given, list):
        entries = [e if isinstance(e, dict) else {} for e in given]
        named = {e["name"]: e.get("template") for e in entries if isinstance(e.get("name"), str)}
        if len(named) < len(given):
            named = None
    if not isinstance(named, dict) or not all(isinstance(t, str) for t in named.values()):
        raise CheckpointError(
            f"{source}: chat_template is {repr(given)[:60]}, expected a text, a list of objects "
            "with a name and a template of their own, or an object of templates by name"
        )
    return named
