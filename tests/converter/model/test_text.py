import json
from dataclasses import replace

import numpy as np
import pytest
import transformers

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import load_windows
from lfmq.quant.errors import ValidationError


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def evaluation(sample_folder):
    return sample_folder.parent / "evaluation.jsonl"


def load(sample, *paths, tokens=4096, sequence=128):
    return load_windows(paths, sample.assets, sample.config, tokens=tokens, sequence=sequence)


def test_windows_start_with_bos_and_take_domains_in_turn(sample, evaluation):
    windows = load(sample, evaluation)
    assert windows.ids.shape == (32, 128)
    assert (windows.ids[:, 0] == sample.config.bos_token_id).all()
    assert len(set(windows.domains)) == 11
    assert windows.domains[:11] == tuple(dict.fromkeys(windows.domains))
    assert windows.tokens == 4096


def test_loading_twice_gives_the_same(sample, evaluation):
    one, two = load(sample, evaluation), load(sample, evaluation)
    assert np.array_equal(one.ids, two.ids)
    assert one.text_sha256 == two.text_sha256


def test_tokens_equal_transformers(sample, sample_folder, tmp_path):
    text = "Der Paketmanager löst Abhängigkeiten. def f(x): return x + 1\n" * 20
    path = tmp_path / "note.txt"
    path.write_text(text)
    windows = load(sample, path, tokens=64, sequence=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample_folder)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    # a window is bos and 63 tokens of a stream that itself begins with the document's bos
    assert windows.ids[0].tolist() == [1, 1, *expected[:62]]
    assert windows.domains == ("note",)


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("short.txt", "two words", "fewer than one window of 128"),
        ("latin.txt", "Käse".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", '{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("list.jsonl", "[1, 2]", "line 1: expected an object"),
        ("none.jsonl", '{"domain": "x"}', "neither a 'text' string nor a 'messages' list"),
        ("chat.jsonl", json.dumps({"messages": [1]}), "the chat template failed"),
        ("half.jsonl", r'{"text": "\ud83d"}', r"line 1: holds '\\ud83d', half of a surrogate"),
        ("key.jsonl", r'{"messages": [{"\ud83d": 1}]}', "half of a surrogate pair"),
        ("tools.jsonl", '{"messages": [], "tools": 1}', "line 1: tools is no list"),
    ],
)
def test_bad_text_is_one_clear_line(sample, tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValidationError, match=message) as caught:
        load(sample, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(sample, tmp_path):
    with pytest.raises(ValidationError, match=r"gone\.txt: cannot be read"):
        load(sample, tmp_path / "gone.txt")


def test_a_tokenizer_of_another_model_is_refused(sample, evaluation):
    small = replace(sample.config, vocab_size=500)
    with pytest.raises(ValidationError, match="belongs to another model"):
        load_windows([evaluation], sample.assets, small, tokens=64, sequence=64)


def test_a_window_longer_than_the_context_is_refused(sample, evaluation):
    with pytest.raises(ValidationError, match="longer than the model's context of 2048"):
        load(sample, evaluation, sequence=4096)


def test_chats_without_a_template_are_refused(sample, evaluation):
    files = {k: v for k, v in sample.assets.files.items() if k != "chat_template.jinja"}
    bare = replace(sample.assets, files=files)
    with pytest.raises(ValidationError, match="no chat template"):
        load_windows([evaluation], bare, sample.config, tokens=128, sequence=128)


def test_without_chats_the_text_has_another_hash(sample, evaluation):
    whole = load(sample, evaluation)
    files = {k: v for k, v in sample.assets.files.items() if k != "chat_template.jinja"}
    bare = replace(sample.assets, files=files)
    plain = load_windows([evaluation], bare, sample.config, tokens=4096, sequence=128, chats=False)
    assert set(plain.domains) < set(whole.domains)
    assert plain.text_sha256 != whole.text_sha256
