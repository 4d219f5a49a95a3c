"""The probe: texts by group, chats and ids, and what the checkpoint makes of them.

``probes.json`` has texts that split tokenizers: scripts, digits, blanks, code, emoji. The groups
of added tokens, chats and the vocabulary are made for each checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lfmq.converter.model.chat import Chat, ChatError, ChatTemplate
from lfmq.converter.model.tokenizer import load_tokenizer
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.chat_template import chat_templates
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun

ADDED_TOKENS, CHATS, ENDS, VOCABULARY = "added tokens", "chats", "start and end", "vocabulary"
# Ids of the vocabulary that are made text together.
_IDS_AT_ONCE = 64
_ODD = frozenset("\ufffd\0")
_FRAMED_TEXTS = ("", "one", " two\n", "three <a> 4")

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather at a place: “now” & later",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = "<|tool_call_start|>[get_weather(city='Zürich', days=3)]<|tool_call_end|>"
_PROBE_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hello!\n\nHow are you?"}]},
    {
        "messages": [
            {"role": "system", "content": "You answer in German.  "},
            {"role": "user", "content": " Was ist 12345 + 678? "},
            {"role": "assistant", "content": "13023."},
            {"role": "user", "content": "ありがとう 👍🏽 <b>&amp;</b>"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather in Zürich?"},
            {"role": "assistant", "content": _CALL},
            {"role": "tool", "content": '[{"day": 1, "text": "sunny 21°C"}]'},
        ],
        "tools": _TOOLS,
    },
    {
        "messages": [
            {"role": "user", "content": "Think: 7 * 6?"},
            {
                "role": "assistant",
                "thinking": "7 * 6 = 42",
                "content": "<think>\n7 * 6 = 42\n</think>\n\n42",
            },
            {"role": "user", "content": "And 8 * 7?"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Done?"},
            {"role": "assistant", "content": "Done."},
        ],
        "add_generation_prompt": False,
    },
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked of every runtime, and the checkpoint's answer.

    Attributes:
        texts: to be made tokens.
        sequences: to be made text: the ids of each text, then the vocabulary.
        groups: the texts of each group, as indices.
        chats: to be rendered.
        expected: the checkpoint's answer.
        tokenizer: the checkpoint's, to write ids out.
    """

    texts: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    groups: Mapping[str, tuple[int, ...]]
    chats: tuple[Mapping[str, Any], ...]
    expected: TokenizerRun
    tokenizer: Tokenizer

    def is_broken(self, index: int) -> bool:
        """Whether the tokenizers library itself does not write a text back.

        Its byte-level decoder takes letters of an added token, such as é, for bytes. What a
        runtime writes there is no worse.
        """
        if index >= len(self.texts):
            return False
        return "\ufffd" in self.expected.kept[index] and "\ufffd" not in self.texts[index]

    def request(self, path: Path) -> TokenizerRequest:
        """The probe for a build."""
        return TokenizerRequest(path, self.texts, self.sequences, self.chats)


def make_probe(assets: Assets) -> Probe:
    """The probe and what the checkpoint's own tokenizer and template answer.

    Raises:
        ValidationError: the checkpoint has no tokenizer, or one that cannot be read.
    """
    tokenizer = load_tokenizer(assets)
    chats, rendered = _rendered(assets)
    parts = _whole_tokens(tokenizer)
    by_group = _probe_texts() | {
        ADDED_TOKENS: _around_added_tokens(tokenizer),
        CHATS: rendered,
        ENDS: list(_FRAMED_TEXTS),
        VOCABULARY: _a_line_each(tokenizer, parts),
    }
    texts = [text for group in by_group.values() for text in group]
    groups, start = {}, 0
    for name, group in by_group.items():
        groups[name] = tuple(range(start, start + len(group)))
        start += len(group)
    ids = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    groups[VOCABULARY] += tuple(range(start, start + len(parts)))
    sequences = [*ids, *parts]
    expected = TokenizerRun(
        ids=ids,
        framed=[e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=True)],
        kept=[tokenizer.decode(s, skip_special_tokens=False) for s in sequences],
        skipped=[tokenizer.decode(s, skip_special_tokens=True) for s in sequences],
        rendered=list(rendered),
    )
    return Probe(
        tuple(texts),
        tuple(map(tuple, sequences)),
        groups,
        () if _prints_the_date(assets) else tuple(chats),
        expected,
        tokenizer,
    )


@cache
def _read_probes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(
        (Path(__file__).parent / "probes.json").read_text("utf-8")
    )
    return found


def _probe_texts() -> dict[str, list[str]]:
    return dict(_read_probes())


def _around_added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Every added token with and without blanks beside it, and all of them in a row."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [
        f"a{t}b {t} c\n{t}\n{t}{t}\t{t}.  {t}  d, {t[:-1]} {t[1:]} {t.upper()} x{t} {t}y"
        for t in added
    ]
    return [*texts, "".join(added), " ".join(added), "\n".join(reversed(added))]


def _a_line_each(tokenizer: Tokenizer, parts: list[list[int]]) -> list[str]:
    """Every token as a word of its own: one that is not made as the checkpoint makes it shows."""
    texts = iter(tokenizer.decode_batch([[i] for part in parts for i in part]))
    return ["\n".join(next(texts) for _ in part) for part in parts]


def _whole_tokens(tokenizer: Tokenizer) -> list[list[int]]:
    """The vocabulary, a few ids at a time, without parts of a character and the zero byte.

    What runtimes write for a part that is not completed, each decides for itself. The zero byte
    ends the strings of C, which some interfaces pass.
    """
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    whole = [i for i, text in zip(ids, texts, strict=True) if not _ODD.intersection(text)]
    return [whole[i : i + _IDS_AT_ONCE] for i in range(0, len(whole), _IDS_AT_ONCE)]


def _prints_the_date(assets: Assets) -> bool:
    """Whether a template's text depends on the day: runtimes print today, reports a fixed one."""
    return any("strftime_now" in source for source in chat_templates(assets).named.values())


def _rendered(assets: Assets) -> tuple[list[dict[str, Any]], list[str]]:
    """The chats that the checkpoint's template takes, and their texts."""
    template = ChatTemplate(assets)
    chats = [{"tools": None, "add_generation_prompt": True, **chat} for chat in _PROBE_CHATS]
    try:
        return chats, template.render(Chat(**chat) for chat in chats)
    except ChatError:  # no template, or one that does not take all of them
        taken = [(chat, text) for chat in chats if (text := _try(template, chat)) is not None]
        return [chat for chat, _ in taken], [text for _, text in taken]


def _try(template: ChatTemplate, chat: dict[str, Any]) -> str | None:
    try:
        return template.render([Chat(**chat)])[0]
    except ChatError:
        return None
