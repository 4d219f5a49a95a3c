import dataclasses
import json
import shutil

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.metadata import differing_facts


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def builds(sample, tmp_path_factory):
    recipe = load_recipe("int4")
    plan = resolve_plan(sample.config, recipe)
    output = tmp_path_factory.mktemp("builds")
    return {b.format: b.path for b in convert(sample, recipe, plan, FORMATS, output).builds}


def facts_of(path, format, checkpoint):
    config = FORMATS[format].open_reader(path).config
    return {f.name: f for f in differing_facts(path, format, config, checkpoint)}


@pytest.mark.parametrize("format", FORMATS)
def test_a_build_says_what_its_checkpoint_says(builds, sample, format):
    assert facts_of(builds[format], format, sample) == {}


def other(sample, **facts):
    return dataclasses.replace(sample, config=dataclasses.replace(sample.config, **facts))


@pytest.mark.parametrize("format", FORMATS)
def test_other_facts_are_named(builds, sample, format):
    wanted = other(sample, bos_token_id=7, rope_theta=1e4, num_key_value_heads=4)
    found = facts_of(builds[format], format, wanted)
    names = {"bos_token_id", "rope_theta", "num_key_value_heads"}
    assert {n for n in found if "genai" not in n} == names
    assert ("genai_config.json: bos_token_id" in found) == (format == "onnx")
    assert (found["bos_token_id"].found, found["bos_token_id"].expected) == (1, 7)


def with_tokenizer(sample, folder, change):
    """The sample with a changed ``tokenizer.json``, in memory and in a folder of its own."""
    document = json.loads(sample.assets.files["tokenizer.json"])
    change(document)
    content = json.dumps(document).encode()
    for name, given in sample.assets.files.items():
        (folder / name).write_bytes(content if name == "tokenizer.json" else given)
    files = sample.assets.files | {"tokenizer.json": content}
    assets = dataclasses.replace(sample.assets, files=files, folder=folder)
    return dataclasses.replace(sample, assets=assets)


def swap_tokens(document):
    vocabulary = document["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[500:502]
    vocabulary |= {a: j, b: i}


def reverse_merges(document):
    document["model"]["merges"].reverse()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "part"),
    [(swap_tokens, "tokens"), (reverse_merges, "merges")],
    ids=["tokens", "merges"],
)
def test_a_tokenizer_of_another_model_is_named(builds, sample, tmp_path, format, change, part):
    found = facts_of(builds[format], format, with_tokenizer(sample, tmp_path, change))
    name = f"tokenizer.ggml.{part}" if format == "gguf" else "tokenizer.json"
    assert list(found) == [name]
    if format != "gguf":
        assert "another in model" in str(found[name].found)


def test_spaces_in_a_tokenizer_say_nothing(builds, sample, tmp_path):
    rewritten = with_tokenizer(sample, tmp_path, lambda document: None)
    assert rewritten.assets.files["tokenizer.json"] != sample.assets.files["tokenizer.json"]
    assert facts_of(builds["mlx"], "mlx", rewritten) == {}


def test_a_build_without_a_tokenizer(builds, sample, tmp_path):
    copy = shutil.copytree(builds["mlx"], tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    (fact,) = facts_of(copy, "mlx", sample).values()
    assert "unreadable" in fact.found


def test_a_start_of_text_in_genais_config(builds, sample, tmp_path):
    copy = shutil.copytree(builds["onnx"], tmp_path / "copy")
    document = json.loads((copy / "genai_config.json").read_text())
    document["model"]["bos_token_id"] = 3
    (copy / "genai_config.json").write_text(json.dumps(document))
    (fact,) = facts_of(copy, "onnx", sample).values()
    assert (fact.found, fact.expected) == (3, 1)


def test_end_tokens_of_a_build(builds, sample, tmp_path):
    """A GGUF may add what llama.cpp ends at by its text, an MLX folder the tokenizer's own."""
    for format, file in (("onnx", "genai_config.json"), ("mlx", "generation_config.json")):
        copy = shutil.copytree(builds[format], tmp_path / format)
        document = json.loads((copy / file).read_text())
        (document["model"] if format == "onnx" else document)["eos_token_id"] = [4, 7]
        (copy / file).write_text(json.dumps(document))
        (fact,) = facts_of(copy, format, sample).values()
        assert (fact.name, fact.found, fact.expected) == ("end tokens", [4, 7], [4])
    files = sample.assets.files | {"generation_config.json": b'{"eos_token_id": [4, 9]}'}
    wanted = dataclasses.replace(sample, assets=dataclasses.replace(sample.assets, files=files))
    (fact,) = facts_of(builds["gguf"], "gguf", wanted).values()
    assert (fact.name, fact.found, fact.expected) == ("end tokens", [4], [4, 9])
