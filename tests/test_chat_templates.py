"""A checkpoint's chat templates in every build, and commands where there is none."""

import json
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner, Result

from lfmq.cli import main
from lfmq.tests.test_end_tokens import in_llama_cpp

USER = [{"role": "user", "content": "2 + 2?"}]
LIST = [{"name": "default", "template": "D{{ messages }}"}, {"name": "tool_use", "template": "T"}]


def lfmq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_is(folder: Path) -> None:
    """The sample's: one ``.jinja`` file."""


def stale(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="OLD {{ messages }}")


def listed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=LIST)


def additional(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")


@pytest.mark.parametrize("change", [as_is, stale, listed, additional])
def test_every_build_carries_the_templates_of_transformers(make_checkpoint, tmp_path, change):
    og = pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("xllamacpp")
    folder = make_checkpoint()
    change(folder)
    result = lfmq("convert", folder, "--output", tmp_path / "out", "--uncalibrated", "--quiet")
    assert result.exit_code == 0, result.stderr
    own = transformers.AutoTokenizer.from_pretrained(folder)
    named = own.chat_template
    named = {"default": named} if isinstance(named, str) else named
    expected = own.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)

    stored = in_llama_cpp(tmp_path / "out" / "small-int4.gguf")["templates"]
    # llama.cpp gives the default where there is none of the name
    assert stored == [named["default"], named.get("tool_use")]
    for format in ("mlx", "onnx", "compressed-tensors"):
        build = tmp_path / "out" / f"small-int4-{format}"
        tokenizer = transformers.AutoTokenizer.from_pretrained(build)
        assert tokenizer.chat_template == own.chat_template
        config = json.loads((build / "tokenizer_config.json").read_text())["chat_template"]
        assert config == named["default"]
    build = tmp_path / "out" / "small-int4-onnx"
    tokenizer = og.Tokenizer(og.Model(str(build)))
    found = tokenizer.apply_chat_template(json.dumps(USER), add_generation_prompt=True)
    if change is not listed:  # which prints Python's form of a list
        assert found == expected


@pytest.fixture
def bare(make_checkpoint):
    """A tiny checkpoint without a template."""
    folder = make_checkpoint(config={"max_position_embeddings": 128})
    (folder / "chat_template.jinja").unlink()
    return folder


def refusing(folder: Path) -> None:
    source = "{{ raise_exception('only one user') }}"
    (folder / "chat_template.jinja").write_text(source)


@pytest.mark.parametrize("change", [as_is, refusing])
def test_the_built_in_text_without_its_chats(bare, tmp_path, change):
    change(bare)
    size = ("--tokens", "64", "--sequence", "32")
    wanted = "the built-in text is used without its chats: "
    done = lfmq("convert", bare, "--output", tmp_path / "out", "--to", "gguf", *size)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count(wanted) == 1
    if change is refusing:
        return
    plain = lfmq("convert", bare, "--output", tmp_path, "--to", "gguf", "--uncalibrated")
    assert plain.exit_code == 0
    assert wanted not in plain.stderr
    build = tmp_path / "small-int4.gguf"
    statistics = tmp_path / "statistics.safetensors"
    for words in (("calibrate", bare, "--output", statistics), ("validate", bare, build)):
        done = lfmq(*words, *size)
        assert done.exit_code == 0, done.stderr
        assert done.stderr.count(wanted) == 1
    text = tmp_path / "mine.jsonl"
    text.write_text(json.dumps({"messages": USER}))
    done = lfmq("convert", bare, "--output", tmp_path / "no", "--text", text, *size)
    assert done.exit_code == 1
    assert "mine.jsonl, line 1: " in done.stderr


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_byte_order_mark_is_not_carried(make_checkpoint, tmp_path, name):
    folder = make_checkpoint()
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    edit(folder / "config.json", sep_token_id=-1)
    done = lfmq("convert", folder, "--output", tmp_path / "out", "--uncalibrated", "--quiet")
    assert done.exit_code == 0, done.stderr
    for format in ("mlx", "onnx", "compressed-tensors"):
        json.loads((tmp_path / "out" / f"small-int4-{format}" / name).read_text("utf-8"))
