"""Every runtime stops at the tokens at which generation in transformers stops."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.inspect import inspect_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.gguf.special_vocabulary import LLAMA_CPP_ENDS
from lfmq.formats.huggingface.end_tokens import end_tokens
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.metadata import differing_facts

NEW = 8192
DONE = {"id": NEW, "content": "<|done|>", "special": True}
# What the sample's vocabulary has of them.
BY_TEXT = {2: "<|endoftext|>", 4: "<|im_end|>"}


def as_is(folder: Path) -> None:
    """The sample's files."""


def new_end_token(folder: Path) -> None:
    """A token was added and made the end; ``config.json`` still has the old one."""
    edit(folder / "generation_config.json", eos_token_id=NEW)
    edit(folder / "tokenizer_config.json", eos_token="<|done|>")


def two_ends(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[NEW, 4])


def four_ends(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[2, 4, NEW, 7])


def config_alone(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[7, 4])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(params=[as_is, new_end_token, two_ends, four_ends, config_alone])
def checkpoint(request, make_checkpoint):
    """A tiny checkpoint with one token more than the sample."""

    def one_more(tensors):
        rows = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate([rows, rows[:1]])

    folder = make_checkpoint(change=one_more, config={"vocab_size": NEW + 1})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | DONE)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    request.param(folder)
    return open_checkpoint(folder)


def in_transformers(folder: Path) -> set[int]:
    """As its ``from_pretrained`` finds the generation config of a model."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        config = json.loads((folder / "config.json").read_text())
        found = GenerationConfig.from_model_config(config).eos_token_id
    return set(found if isinstance(found, list) else [found])


def in_llama_cpp(path: Path) -> dict:
    command = [sys.executable, "-m", "lfmq.tests.runners.llama_cpp_vocabulary", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_runtimes_stop_where_transformers_stops(checkpoint, tmp_path):
    for runtime in ("xllamacpp", "mlx_lm", "onnxruntime_genai"):
        pytest.importorskip(runtime)
    import onnxruntime_genai
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.utils import load_config

    recipe = load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    made = convert(checkpoint, recipe, plan, FORMATS, tmp_path / "out").builds
    builds = {b.format: b.path for b in made}
    expected = in_transformers(checkpoint.folder)
    assert set(end_tokens(checkpoint.assets, checkpoint.config).ids) == expected
    assert in_transformers(builds["compressed-tensors"]) == expected

    found = in_llama_cpp(builds["gguf"])
    assert expected <= set(found["ends"]) <= expected | set(BY_TEXT)
    assert {found["eos"], found["eot"]} <= expected
    assert set(BY_TEXT.values()) <= LLAMA_CPP_ENDS

    eos = load_config(builds["mlx"])["eos_token_id"]
    assert set(load_tokenizer(builds["mlx"], eos_token_ids=eos).eos_token_ids) - {4} == (
        expected - {4}
    )
    model = onnxruntime_genai.Model(str(builds["onnx"]))
    assert set(onnxruntime_genai.Tokenizer(model).eos_token_ids) == expected
    for format, path in builds.items():
        config = FORMATS[format].open_reader(path).config
        assert not differing_facts(path, format, config, checkpoint)


@pytest.mark.parametrize("checkpoint", [new_end_token], indirect=True)
def test_a_conflict_is_a_line(checkpoint):
    (line,) = [x for x in inspect_checkpoint(checkpoint).warnings if "eos_token_id" in x]
    assert line == (
        "eos_token_id is 4 in config.json and 8192 in generation_config.json: generation and the "
        "builds stop at 8192"
    )
