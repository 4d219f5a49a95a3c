"""Merges, special tokens and templates of a GGUF; gguf-py's ``SpecialVocab`` is the oracle."""

import json
from dataclasses import replace

import pytest
from gguf import SpecialVocab

from lfmq.formats.gguf.chat_template import as_stored
from lfmq.formats.gguf.special_vocabulary import end_keys, merges
from lfmq.formats.huggingface.chat_template import ChatTemplates
from lfmq.formats.huggingface.end_tokens import end_token_conflicts, end_tokens
from lfmq.quant.errors import UnsupportedError


def with_json(assets, name, **values):
    document = json.loads(assets.files[name]) | values
    return replace(assets, files=assets.files | {name: json.dumps(document).encode()})


@pytest.mark.parametrize("blank", [False, True])
def test_merges_are_those_of_gguf_py(tiny_assets, tmp_path, blank):
    document = json.loads(tiny_assets.files["tokenizer.json"])
    if blank:
        document["model"]["merges"][0] = ["a b", "c"]
    content = json.dumps(document).encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    expected = SpecialVocab(tmp_path, load_merges=True).merges
    assert merges(replace(tiny_assets, files={"tokenizer.json": content})) == expected
    old = document["model"] | {"merges": ["a b"]}
    content = json.dumps(document | {"model": old}).encode()
    assert merges(replace(tiny_assets, files={"tokenizer.json": content})) == ["a b"]


def test_merges_that_are_none(tiny_assets):
    content = json.dumps({"model": {"merges": [["a", 1]]}}).encode()
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json: merges are neither"):
        merges(replace(tiny_assets, files={"tokenizer.json": content}))


@pytest.mark.parametrize(
    ("ends", "keys"),
    [
        (4, {"eos": 4, "eot": 4}),
        ([9, 4], {"eos": 4, "eot": 9}),  # the tokenizer's own first
        ([7, 9], {"eos": 7, "eot": 9}),
        ([2, 4, 8, 9, 4], {"eos": 4, "eot": 8, "eom": 9}),  # llama.cpp knows 2 by its text
    ],
)
def test_end_keys(tiny_assets, tiny_config, ends, keys):
    assets = with_json(tiny_assets, "generation_config.json", eos_token_id=ends)
    assert end_keys(assets, tiny_config) == keys


def test_more_end_tokens_than_keys_are_refused(tiny_assets, tiny_config):
    assets = with_json(tiny_assets, "generation_config.json", eos_token_id=[4, 7, 8, 9])
    with pytest.raises(UnsupportedError, match=r"4 end tokens, of which a GGUF holds 3.* not 9;"):
        end_keys(assets, tiny_config)


def test_files_that_disagree(tiny_assets, tiny_config):
    assert end_token_conflicts(tiny_assets, tiny_config) == ()
    listed = with_json(tiny_assets, "generation_config.json", eos_token_id=[7, 8])
    assert end_tokens(listed, tiny_config).ids == (7, 8)
    config, tokenizer = end_token_conflicts(listed, tiny_config)
    assert config.startswith("eos_token_id is 4 in config.json and [7, 8] in generation_config")
    assert tokenizer.startswith("eos_token_id is 4 in tokenizer_config.json and [7, 8] in")
    silent = with_json(tiny_assets, "generation_config.json", eos_token_id=None)
    (line,) = end_token_conflicts(silent, tiny_config)
    assert "transformers would not stop, the builds stop at 4 of config.json" in line
    none = replace(tiny_assets, files={}, config_json={})
    none_config = replace(tiny_config, eos_token_id=None)
    assert end_token_conflicts(none, none_config)[0].startswith("no file names an end token")


def test_names_of_templates():
    given = ChatTemplates({"z": "Z", "default": "D", "tool-use": "T", "blank": " ", "": "E"})
    assert as_stored(given) == {"default": "D", "tool_use": "T", "z": "Z"}
