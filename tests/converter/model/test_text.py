import json
from dataclasses import replace

import numpy as np
import pytest
import transformers

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import ChatTemplate, load_windows
from lfmq.quant.errors import ValidationError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "thinking": "easy"},
]


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


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [{"name": "get_weather", "parameters": {"city": "é"}}]])
def test_chats_render_as_transformers_does(sample, sample_folder, tools, prompt):
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample_folder)
    expected = tokenizer.apply_chat_template(
        CHAT, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    found = ChatTemplate(sample.assets)(CHAT, tools, add_generation_prompt=prompt)
    assert found == expected


def test_generation_blocks_render_as_transformers_does(sample, sample_folder):
    """LFM2.5's template marks what the model is trained on."""
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
        "{%- generation -%} {{ m.content }} {%- endgeneration -%}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample_folder)
    expected = tokenizer.apply_chat_template(CHAT, chat_template=source, tokenize=False)
    files = {**sample.assets.files, "chat_template.jinja": source.encode()}
    assert ChatTemplate(replace(sample.assets, files=files))(CHAT) == expected


@pytest.mark.parametrize(
    ("source", "thinks"),
    [
        (b"{{ '<think>' + messages[0].thinking + '</think>' }}", True),
        (b"{{ messages[0].content.split('</think>')[-1] }}", False),
        (b"{{ messages[0].content }}", False),
    ],
)
def test_a_template_tells_whether_the_model_thinks(sample, source, thinks):
    files = {**sample.assets.files, "chat_template.jinja": source}
    assert ChatTemplate(replace(sample.assets, files=files)).thinks is thinks
    assert ChatTemplate(sample.assets).thinks


def test_a_template_cannot_reach_python(sample):
    source = b"{{ messages.__class__.__mro__[1].__subclasses__() }}"
    files = {**sample.assets.files, "chat_template.jinja": source}
    with pytest.raises(ValidationError, match="chat template failed"):
        ChatTemplate(replace(sample.assets, files=files))(CHAT)


def test_dates_in_templates_are_pinned(sample):
    files = {**sample.assets.files, "chat_template.jinja": b"{{ strftime_now('%Y-%m-%d') }}"}
    assert ChatTemplate(replace(sample.assets, files=files))(CHAT) == "2025-01-01"


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
