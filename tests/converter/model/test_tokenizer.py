"""Tokenizers that are foreign: what the file saves for training, and what it dies of."""

import json
from dataclasses import replace

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import load_windows
from lfmq.converter.model.tokenizer import encode_texts, load_tokenizer, try_tokenizer
from lfmq.quant.errors import ValidationError

PADDING = {
    "strategy": {"Fixed": 2048},
    "direction": "Right",
    "pad_to_multiple_of": 64,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|pad|>",
}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture
def document(sample):
    return json.loads(sample.assets.files["tokenizer.json"])


def with_tokenizer(sample, document):
    content = json.dumps(document).encode()
    return replace(sample.assets, files=sample.assets.files | {"tokenizer.json": content})


@pytest.mark.parametrize(
    "saved", [{"padding": PADDING}, {"truncation": TRUNCATION}], ids=["padding", "truncation"]
)
def test_what_is_saved_for_training_does_not_touch_the_text(
    sample, sample_folder, document, saved
):
    path = sample_folder.parent / "calibration.jsonl"
    changed = with_tokenizer(sample, document | saved)
    one, two = (
        load_windows([path], a, sample.config, tokens=2048, sequence=128).ids.tolist()
        for a in (sample.assets, changed)
    )
    assert one == two
    assert encode_texts(["a b"], changed, sample.config) == encode_texts(
        ["a b"], sample.assets, sample.config
    )


def test_a_mark_before_the_file(sample):
    content = b"\xef\xbb\xbf" + sample.assets.files["tokenizer.json"]
    marked = replace(sample.assets, files={"tokenizer.json": content})
    assert (
        load_tokenizer(marked).encode("a b").ids == load_tokenizer(sample.assets).encode("a b").ids
    )


def test_a_pattern_that_never_ends(document):
    pattern = {"Regex": "(a|aa)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"]["pretokenizers"].insert(0, split)
    with pytest.raises(ValueError, match=r"^not a tokenizer .* \(.*\)$"):
        try_tokenizer(json.dumps(document).encode())


def test_a_panic_or_an_abort_is_a_reason(document):
    """What tokenizers 0.23 dies of: a prefix longer than a merge's right half."""
    document["model"]["continuing_subword_prefix"] = "#" * 40
    with pytest.raises(ValueError, match="continuing_subword_prefix"):
        try_tokenizer(json.dumps(document).encode())


def test_a_file_is_tried_once(sample, monkeypatch):
    monkeypatch.setattr("lfmq.converter.model.tokenizer.ask", None)
    assert try_tokenizer(sample.assets.files["tokenizer.json"]).size == 8192


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_none_is_named(sample, content):
    assets = replace(sample.assets, files={"tokenizer.json": content})
    with pytest.raises(ValidationError, match=r"tokenizer\.json: not ") as caught:
        load_tokenizer(assets)
    assert len(str(caught.value)) < 400
