"""The rules of a tokenizer in a GGUF, with llama.cpp as the judge of those it gets."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from lfmq.formats.build import Assets
from lfmq.formats.gguf import container
from lfmq.formats.gguf.pretokenizer import byte_letters, text_rules
from lfmq.formats.huggingface.pretokenizers import GPT2
from lfmq.formats.huggingface.pretokenizers import ONE_DIGIT as ONE
from lfmq.formats.huggingface.pretokenizers import THREE_DIGITS as THREE
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.errors import UnsupportedError
from lfmq.validation.parity.run import measure_parity

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
Change = Callable[[dict[str, Any]], None]


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def splitting(*steps: dict[str, Any], use_regex: bool = False) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        last = BYTE_LEVEL | {"use_regex": use_regex}
        tokenizer["pre_tokenizer"] = sequence(*steps, last) if steps else last

    return change


def of_model(**values: Any) -> Change:
    return lambda tokenizer: tokenizer["model"].update(values)


def keys(**values: Any) -> Change:
    return lambda tokenizer: tokenizer.update(values)


def flag(name: str) -> Change:
    return lambda tokenizer: tokenizer["added_tokens"][3].update({name: True})


def without_letter(tokenizer: dict[str, Any]) -> None:
    letter = byte_letters()[0xE3]
    model = tokenizer["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if letter not in t}
    model["merges"] = [m for m in model["merges"] if letter not in "".join(m)]


def last_merge_forgotten(tokenizer: dict[str, Any]) -> None:
    """The token of a merge stays, and nothing makes it."""
    del tokenizer["model"]["merges"][-1]


@pytest.fixture
def changed(tiny_assets: Assets) -> Callable[..., Assets]:
    """The sample's tokenizer with a change, and with other keys of tokenizer_config.json."""

    def make(*changes: Change, **config: Any) -> Assets:
        tokenizer = json.loads(tiny_assets.files["tokenizer.json"])
        for change in changes:
            change(tokenizer)
        beside = json.loads(tiny_assets.files["tokenizer_config.json"]) | config
        files = {"tokenizer.json": tokenizer, "tokenizer_config.json": beside}
        return replace(
            tiny_assets,
            files=tiny_assets.files | {n: json.dumps(d).encode() for n, d in files.items()},
        )

    return make


SPELLED = THREE.replace(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
)
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {
    "lfm2": ([], "lfm2"),
    "merges followed": ([of_model(ignore_merges=False)], "lfm2"),
    "merges that matter": ([of_model(ignore_merges=False), last_merge_forgotten], "smaug-bpe"),
    "other spelling": ([splitting(split(SPELLED))], "lfm2"),
    "matches kept": ([splitting(split(THREE, "Removed", True))], "lfm2"),
    "nested": ([splitting(sequence(split(THREE)))], "lfm2"),
    "single digits": ([splitting(split(ONE))], "qwen2"),
    "byte level alone": ([splitting(use_regex=True)], "gpt-2"),
    "byte level's own": ([splitting(split(GPT2))], "gpt-2"),
    "digits first": ([splitting(DIGITS, use_regex=True)], "smollm"),
    "digits by pattern": ([splitting(split(r"\p{N}"), split(GPT2))], "smollm"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_name_in_the_file(case: str, changed: Callable[..., Assets]) -> None:
    changes, name = SPLITS[case]
    assert text_rules(changed(*changes), 1).pre.name == name


JUDGED = ("merges followed", "merges that matter", "single digits", "byte level alone")


@pytest.mark.parametrize("case", [*JUDGED, "digits first", "matches kept"])
def test_llama_cpp_splits_as_the_checkpoint(
    case: str,
    changed: Callable[..., Assets],
    tiny_config: ModelConfig,
    make_plan: Callable[..., Plan],
    tmp_path: Path,
) -> None:
    """The file has no weights: llama.cpp reads its tokenizer alone."""
    pytest.importorskip("xllamacpp")
    changes, name = SPLITS[case]
    assets = changed(*changes)
    plan = make_plan(replace(tiny_config, vocab_size=8200))
    path = write_header(tmp_path / "a.gguf", assets, plan)
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    assert field is not None
    assert field.contents() == name
    found = measure_parity(assets, {path: "gguf"}, native=False)
    assert [g.first_difference for g in found.tokenizer if not g.equal] == []
    assert len(found.tokenizer) == 14


def write_header(path: Path, assets: Assets, plan: Plan) -> Path:
    """A build of zeros."""
    container.check(plan, assets)
    (file,) = container.layout(plan, assets).files
    path.write_bytes(file.constants[0][1])
    os.truncate(path, file.size)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (splitting(split(r"\w+|\W+")), r"splits text by '\\w\+\|\\W\+', which equals no"),
        (splitting(split(THREE, "MergedWithNext")), "pre-tokenizer Split, .*MergedWithNext"),
        (splitting(split(THREE, invert=True)), "pre-tokenizer Split, .*invert True"),
        (splitting(split(r"\p{N}", "Removed", True), split(GPT2)), "removes all but digits"),
        (
            splitting({"type": "Punctuation", "behavior": "Isolated"}),
            "pre-tokenizer Punctuation, behavior Isolated,",
        ),
        (keys(pre_tokenizer=None), "does not end with ByteLevel"),
        (keys(pre_tokenizer=sequence(BYTE_LEVEL, DIGITS)), "does not end with ByteLevel"),
        (keys(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
        (keys(normalizer={"type": "NFC"}), r"normalizes text \(NFC\)"),
        (
            keys(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "NFKC"}, {"type": "Strip"}],
                }
            ),
            r"normalizes text \(NFKC, Strip\)",
        ),
        (keys(post_processor={"type": "RobertaProcessing"}), "post-processor RobertaProcessing"),
        (of_model(dropout=0.1), "dropout 0.1"),
        (of_model(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (without_letter, r"no token for 1 bytes \(0xe3 first\)"),
        (flag("lstrip"), r"'<\|im_start\|>' has lstrip"),
        (flag("single_word"), "single_word"),
    ],
)
def test_refused(change: Change, reason: str, changed: Callable[..., Assets]) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        text_rules(changed(change), 1)
    message = str(caught.value)
    assert "tokenizer.json: " in message
    assert message.endswith("leave gguf out of --to")
    assert len(message) <= 400


def test_merges_that_no_pre_tokenizer_ignores(changed: Callable[..., Assets]) -> None:
    assets = changed(splitting(split(ONE)), last_merge_forgotten)
    with pytest.raises(UnsupportedError, match="ignores the merges of words"):
        text_rules(assets, 1)


def test_long_patterns_are_cut(changed: Callable[..., Assets]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        text_rules(changed(splitting(split("|".join(map(str, range(1000)))))), 1)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("name", ["LFM2-phi-3-merge", "Phi3", "modern-bert-lfm"])
def test_names_with_rules_of_their_own(name: str, tiny_assets: Assets) -> None:
    with pytest.raises(UnsupportedError, match="models called"):
        text_rules(replace(tiny_assets, name=name), 1)


BOS = {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(*pieces: dict[str, Any]) -> dict[str, Any]:
    ids = {"<|startoftext|>": 1, "<|im_end|>": 4}
    tokens = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in ids.items()}
    pair = [TEXT, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": pair,
        "special_tokens": tokens,
    }


AFTER_BYTE_LEVEL = {"type": "Sequence", "processors": [BYTE_LEVEL, template(BOS, TEXT)]}


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (None, {}, (False, False)),
        (template(TEXT), {}, (False, False)),
        (template(BOS, TEXT), {}, (True, False)),
        (template(BOS, TEXT, EOS), {}, (True, True)),
        (AFTER_BYTE_LEVEL, {}, (True, False)),
        (template(TEXT), {"add_bos_token": True}, (False, False)),
        (template(BOS, TEXT), {"add_bos_token": False}, (True, False)),
        (template(BOS, TEXT), {"add_eos_token": True}, (True, False)),
    ],
)
def test_tokens_around_a_text(
    processor: dict[str, Any] | None,
    config: dict[str, Any],
    expected: tuple[bool, bool],
    changed: Callable[..., Assets],
    tmp_path: Path,
) -> None:
    """As transformers puts them there."""
    transformers = pytest.importorskip("transformers")
    assets = changed(keys(post_processor=processor), **config)
    rules = text_rules(assets, 1)
    assert (rules.add_bos, rules.add_eos) == expected
    for name, content in assets.files.items():
        (tmp_path / name).write_bytes(content)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("x")
    assert (ids[0] == 1, ids[-1] == 4) == expected


@pytest.mark.parametrize("pieces", [(BOS, BOS, TEXT), (EOS, TEXT), (TEXT, BOS)])
def test_other_tokens_around_a_text(
    pieces: tuple[dict[str, Any], ...], changed: Callable[..., Assets]
) -> None:
    with pytest.raises(UnsupportedError, match=r"after a text, llama\.cpp only"):
        text_rules(changed(keys(post_processor=template(*pieces))), 1)
