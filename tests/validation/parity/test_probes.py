"""The probe: what must be in it, and the checkpoint's answer."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lfmq.formats.build import Assets
from lfmq.validation.parity import probes
from lfmq.validation.parity.probes import ADDED_TOKENS, CHATS, VOCABULARY, make_probe

SCRIPTS = (
    "LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "CJK", "HIRAGANA",
    "KATAKANA", "HANGUL", "BENGALI", "TAMIL", "TELUGU", "GEORGIAN", "ARMENIAN", "KHMER",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(
        (Path(probes.__file__).parent / "probes.json").read_text("utf-8")
    )
    return found


def test_scripts(texts: dict[str, list[str]]) -> None:
    names = {unicodedata.name(c, "?").split()[0] for text in texts["scripts"] for c in text}
    assert set(SCRIPTS) <= names


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ("digits", ["2024", "31415926535897932384626433832795", "٣", "½", "Ⅷ"]),
        ("white space", ["\t\t", "\r\n\r\n", "\n\n\n\n", "   \n", "\u00a0", "\u3000", "\u200b"]),
        ("emoji", ["\u200d", "🏽", "🇩🇪", "\ufe0f", "\U000e0067"]),
        ("combining marks", ["e\u0301", "é", "\u1100\u1161", "각", "カ\u3099", "ガ"]),
        ("contractions", ["I'm", "I\u2019m", "'LL", "DON'T", "'data'"]),
        ("rare code points", ["\x1b", "\ufeff", "\ufffd", "\ue000", "\U0001d518"]),
    ],
)
def test_groups_have_what_splits_tokenizers(
    group: str, wanted: list[str], texts: dict[str, list[str]]
) -> None:
    joined = "\0".join(texts[group])
    assert [w for w in wanted if w not in joined] == []


def test_some_text_changes_in_every_normal_form(texts: dict[str, list[str]]) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert any(unicodedata.normalize(form, t) != t for t in texts["combining marks"])


def test_the_checkpoints_answer(tiny_assets: Assets) -> None:
    probe = make_probe(tiny_assets)
    tokenizer = Tokenizer.from_str(tiny_assets.files["tokenizer.json"].decode())
    assert probe.expected.ids == [
        tokenizer.encode(text, add_special_tokens=False).ids for text in probe.texts
    ]
    assert sorted(i for part in probe.groups.values() for i in part) == list(
        range(len(probe.sequences))
    )
    for index in probe.groups[CHATS]:
        assert probe.texts[index].startswith("<|startoftext|><|im_start|>")
    assert "get_weather" in "".join(probe.texts[i] for i in probe.groups[CHATS])
    assert len(probe.chats) == len(probe.groups[CHATS]) == 5
    around = "\n".join(probe.texts[i] for i in probe.groups[ADDED_TOKENS])
    added = tokenizer.get_added_tokens_decoder().values()
    assert all(f"a{t.content}b {t.content} c\n" in around for t in added)
    words, parts = (
        [n for n in probe.groups[VOCABULARY] if (n < len(probe.texts)) == is_text]
        for is_text in (True, False)
    )
    vocabulary = [i for part in parts for i in probe.sequences[part]]
    assert sum(len(probe.texts[n].split("\n")) for n in words) >= len(vocabulary)
    assert len(set(vocabulary)) == len(vocabulary) > 7000


def test_padding_and_truncation_are_not_obeyed(
    tiny_assets: Assets,
) -> None:
    document = json.loads(tiny_assets.files["tokenizer.json"])
    document["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    document["padding"] = {
        "strategy": {"Fixed": 7}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    assets = with_tokenizer(tiny_assets, document)
    assert make_probe(assets).expected == make_probe(tiny_assets).expected


def test_chats_that_a_template_refuses_are_left_out(tiny_assets: Assets) -> None:
    template = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}{{ messages | length }}"
    files = tiny_assets.files | {"chat_template.jinja": template.encode()}
    assert len(make_probe(replace(tiny_assets, files=files)).chats) == 4
    files["chat_template.jinja"] = b"{{ strftime_now('%Y') }}"
    dated = make_probe(replace(tiny_assets, files=files))
    assert (len(dated.chats), len(dated.groups[CHATS])) == (0, 5)
    del files["chat_template.jinja"]
    assert make_probe(replace(tiny_assets, files=files)).chats == ()


def with_tokenizer(assets: Assets, document: dict[str, Any]) -> Assets:
    files = assets.files | {"tokenizer.json": json.dumps(document).encode()}
    return replace(assets, files=files)
