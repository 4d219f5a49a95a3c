"""Chat templates are those transformers takes, from every form a checkpoint has them in."""

import json
from dataclasses import replace

import pytest
import transformers

from lfmq.formats.huggingface.chat_template import (
    build_files,
    chat_templates,
    other_templates,
)
from lfmq.formats.mlx import container as mlx
from lfmq.quant.errors import CheckpointError

LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


def config(assets, template):
    document = json.loads(assets.files["tokenizer_config.json"]) | {"chat_template": template}
    return {"tokenizer_config.json": json.dumps(document).encode()}


def with_files(assets, jinja=None, template=None, **more):
    """The sample's tokenizer with templates in the places named."""
    files = {n: c for n, c in assets.files.items() if n != "chat_template.jinja"}
    if jinja is not None:
        files["chat_template.jinja"] = jinja
    if template is not None:
        files |= config(assets, template)
    for name, content in more.items():
        files[f"additional_chat_templates/{name}.jinja"] = content
    return replace(assets, files=files)


def save(assets, folder):
    (folder / "additional_chat_templates").mkdir(parents=True, exist_ok=True)
    for name, content in assets.files.items():
        (folder / name).write_bytes(content)
    return folder


FORMS = {
    "jinja": {"jinja": b"J"},
    "jinja wins": {"jinja": b"J", "template": "OLD"},
    "line ends": {"jinja": b"\xef\xbb\xbfa\r\nb\rc\n"},
    "text": {"template": "C"},
    "list": {"template": LIST},
    "object": {"template": {"default": "D", "tool_use": "T"}},
    "additional": {"jinja": b"J", "rag": b"R", "tool_use": b"T"},
    "additional alone": {"template": "OLD", "rag": b"R"},
    "empty file": {"jinja": b"", "template": "OLD"},
    "none": {},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_templates_are_those_of_transformers(tiny_assets, tmp_path, form):
    assets = with_files(tiny_assets, **form)
    tokenizer = transformers.AutoTokenizer.from_pretrained(save(assets, tmp_path / "a"))
    expected = tokenizer.chat_template
    expected = {"default": expected} if isinstance(expected, str) else expected or {}
    assert chat_templates(assets).named == expected
    built = replace(assets, files=build_files(assets))
    again = transformers.AutoTokenizer.from_pretrained(save(built, tmp_path / "b")).chat_template
    again = {"default": again} if isinstance(again, str) else again or {}
    assert again == expected
    # what transformers.js reads, and what onnxruntime-genai takes: a text
    stated = json.loads(built.files["tokenizer_config.json"]).get("chat_template")
    if expected:
        assert stated == expected.get("default")
        default = built.files.get("chat_template.jinja")
        assert (default or b"").decode().replace("\r\n", "\n").replace("\r", "\n") == expected.get(
            "default", ""
        )
    else:
        assert built.files == assets.files


def test_an_old_processors_template_comes_last(tiny_assets):
    old = {"chat_template.json": b'{"chat_template": "P"}'}
    bare = with_files(tiny_assets)
    alone = replace(bare, files=bare.files | old)
    assert chat_templates(alone).named == {"default": "P"}
    assert build_files(alone)["chat_template.json"] == old["chat_template.json"]
    beside = with_files(tiny_assets, template="C")
    beside = replace(beside, files=beside.files | old)
    assert chat_templates(beside).named == {"default": "C"}
    assert other_templates(beside) == ("chat_template.json",)
    assert "chat_template.json" not in build_files(beside)


def test_files_with_nothing_to_mend_keep_their_bytes(tiny_assets):
    given = with_files(tiny_assets, jinja=b"J", template="J")
    assert build_files(given) == given.files
    mended = build_files(tiny_assets)
    assert {n for n in mended if mended[n] != tiny_assets.files[n]} == {"tokenizer_config.json"}
    document = json.loads(mended["tokenizer_config.json"])
    assert document.pop("chat_template").encode() == tiny_assets.files["chat_template.jinja"]
    assert document == json.loads(tiny_assets.files["tokenizer_config.json"])


def test_a_mark_before_json_is_not_carried(tiny_assets):
    marked = {n: b"\xef\xbb\xbf" + c for n, c in tiny_assets.files.items() if n.endswith(".json")}
    files = build_files(replace(tiny_assets, files=tiny_assets.files | marked))
    assert files == build_files(tiny_assets)


@pytest.mark.parametrize(
    "template",
    [5, ["D"], [{"name": "default"}], [{"template": "D"}], [{"name": 1, "template": "D"}]],
    ids=str,
)
def test_what_is_no_template_is_refused(tiny_assets, template):
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: chat_template is .*expect"
    ):
        chat_templates(with_files(tiny_assets, template=template))


def test_bytes_that_are_no_text_are_refused(tiny_assets):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8 text \(byte 1\)"):
        chat_templates(with_files(tiny_assets, jinja=b"a\xff"))


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".", "", "x" * 200])
def test_a_name_that_leaves_the_folder_is_refused(tiny_assets, name):
    assets = with_files(tiny_assets, template=[{"name": name, "template": "D"}])
    with pytest.raises(CheckpointError, match="a chat template is named"):
        build_files(assets)


def test_a_build_carries_additional_templates(tiny_assets, tiny_config, make_plan):
    assets = with_files(tiny_assets, template=LIST)
    files = {f.path: f for f in mlx.layout(make_plan(tiny_config), assets).files}
    assert files["additional_chat_templates/tool_use.jinja"].constants[0][1] == b"T"
    assert files["chat_template.jinja"].constants[0][1] == b"D"
