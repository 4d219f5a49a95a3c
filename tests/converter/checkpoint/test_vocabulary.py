"""Which ids a tokenizer can produce, and tokenizers that are none."""

import json
from pathlib import Path

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.vocabulary import Vocabulary, parse_vocabulary
from lfmq.quant.errors import CheckpointError

SOURCE = Path("tokenizer.json")


@pytest.fixture
def tokenizer(sample_folder):
    return json.loads((sample_folder / "tokenizer.json").read_text())


def parse(document):
    return parse_vocabulary(json.dumps(document).encode(), SOURCE)


def test_the_sample(sample_folder):
    assert open_checkpoint(sample_folder).vocabulary == Vocabulary(8192, "inel")


def test_added_tokens_count(tokenizer):
    row = tokenizer["added_tokens"][0] | {"id": 8192, "content": "<|extra|>"}
    tokenizer["added_tokens"].append(row)
    assert parse(tokenizer) == Vocabulary(8193, "<|extra|>")


def test_a_unigram_tokenizer_counts_by_position(tokenizer):
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]}
    small = {"version": "1.0", "added_tokens": [], "model": model}
    assert parse(small) == Vocabulary(3, "b")


def test_a_folder_without_tokenizer(make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(folder).vocabulary is None


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (("added_tokens",), None),
        (("added_tokens", 0, "id"), "0"),
        (("added_tokens", 0, "special"), None),
        (("post_processor",), True),
        (("post_processor", "single"), None),
        (("pre_tokenizer",), "none"),
        (("model",), {}),
        (("model", "type"), "XYZ"),
        (("model", "vocab"), []),
        (("model", "vocab", "<|pad|>"), None),
        (("model", "vocab", "<|pad|>"), -1),
        (("model", "vocab", "<|pad|>"), 1.5),
        (("model", "merges"), [1]),
        (("model", "merges", 0), ""),
        (("model", "merges", 0, 1), None),
        (("model", "continuing_subword_prefix"), "##"),
        (("version",), "\ud800"),
    ],
    ids=str,
)
def test_what_is_no_tokenizer_is_refused_when_opened(tokenizer, change, value):
    at = tokenizer
    for key in change[:-1]:
        at = at[key]
    at[change[-1]] = value
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: not "):
        parse(tokenizer)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{\x00", b"[" * 100_000])
def test_what_is_no_json_is_refused(content):
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: not "):
        parse_vocabulary(content, SOURCE)
