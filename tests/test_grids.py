"""The sample on each grid of one format, in the programs they are for.

As in tests/test_runtimes.py the reference is transformers in float32 with the build's own weights,
and each runtime is fed the reference's greedy continuation.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import parse_recipe
from lfmq.converter.quantize.rtn import quantize_entry
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.convert import convert
from lfmq.converter.run.planned import plan_builds
from lfmq.formats.registry import FORMATS, detect_format
from lfmq.quant.types import Quantized, dequantize
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest

# The name begins with the format that holds the recipe.
RECIPES = {
    "mlx": '[[rule]]\nbits = 4\ngroup = 64\ngrid = "affine_bias"\n',
    "mlx-5-6": '[[rule]]\nbits = 6\ngroup = 64\ngrid = "affine_bias"\n'
    '[[rule]]\nroles = ["experts"]\nbits = 5\ngroup = 32\ngrid = "affine_bias"\n',
    "onnx": '[[rule]]\nbits = 4\ngrid = "affine_zero_point"\n'
    '[[rule]]\nroles = ["embedding"]\nbits = 8\ngrid = "affine_zero_point"\n',
}
K_QUANTS = """
[[rule]]
bits = 4
grid = "kquant"

[[rule]]
roles = ["attention", "expert_down"]
bits = 5
grid = "kquant"

[[rule]]
roles = ["embedding", "conv"]
bits = 6
grid = "kquant"
"""
NEW_TOKENS = 24
END_OF_TURN = 4
QUESTION = "What is 17 + 14?"
# float32 arithmetic in another order; logits span about 30. Measured 6e-5.
FLOAT32_TOLERANCE = 1e-3
# llama.cpp rounds activations to int8, as in tests/test_runtimes.py.
INT8_MEDIAN = 0.5
# MLX computes in the float16 of the file's scales: the median over positions of the largest
# difference, as in tests/test_runtimes.py. Measured 0.04.
FLOAT16_MEDIAN = 0.1


@pytest.fixture(scope="module")
def builds(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    checkpoint = open_checkpoint(sample_folder)
    text = sample_folder.parent / "calibration.jsonl"
    windows = load_windows([text], checkpoint.assets, checkpoint.config, tokens=2048, sequence=256)
    paths = {}
    for name, rules in RECIPES.items():
        format = name.partition("-")[0]
        recipe = parse_recipe(rules, "grid", "a test")
        plan = resolve_plan(checkpoint.config, recipe)
        planned = plan_builds(checkpoint, plan, FORMATS)
        assert [b.format for b in planned if b.refused is None] == [format]
        output = tmp_path_factory.mktemp(name)
        chosen, calibration = {format: FORMATS[format]}, Calibration(windows)
        made = convert(checkpoint, recipe, plan, chosen, output, calibration=calibration)
        assert made.calibrated is not None
        assert all(c.error < c.error_nearest for c in made.calibrated.experts if c.tokens)
        paths[name] = made.builds[0].path
    return paths


@pytest.fixture(scope="module")
def k_quants(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample rounded to nearest with a recipe of all K-quants."""
    checkpoint, recipe = open_checkpoint(sample_folder), parse_recipe(K_QUANTS, "k", "a test")
    plan = resolve_plan(checkpoint.config, recipe)
    planned = plan_builds(checkpoint, plan, FORMATS)
    assert [b.format for b in planned if b.refused is None] == ["gguf"]
    output = tmp_path_factory.mktemp("k")
    (done,) = convert(checkpoint, recipe, plan, {"gguf": FORMATS["gguf"]}, output).builds
    return done.path


@pytest.fixture
def reference(
    sample_folder: Path, transformers_model: Callable[..., Any]
) -> Callable[[Path], tuple[list[int], int, NDArray[np.float32]]]:
    """Greedy tokens over a prompt, the prompt's length, and the logits."""

    def make(path: Path) -> tuple[list[int], int, NDArray[np.float32]]:
        config = json.loads((sample_folder / "config.json").read_text())
        model = transformers_model(config, FORMATS[detect_format(path)].open_reader(path).read)
        tokenizer = Tokenizer.from_file(str(sample_folder / "tokenizer.json"))
        text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        prompt = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=END_OF_TURN,
                pad_token_id=0,
            )
            return tokens[0].tolist(), len(prompt), model(tokens).logits[0].numpy()

    return make


def test_k_quants_read_back(k_quants: Path, sample_folder: Path) -> None:
    checkpoint, reader = open_checkpoint(sample_folder), FORMATS["gguf"].open_reader(k_quants)
    plan = resolve_plan(checkpoint.config, parse_recipe(K_QUANTS, "k", "a test"))
    found = set()
    for entry in plan.entries:
        weight = quantize_entry(checkpoint, entry)
        values = dequantize(weight) if isinstance(weight, Quantized) else weight
        np.testing.assert_array_equal(reader.read(entry.name), values, err_msg=entry.name)
        found.add(str(entry.storage))
    assert {"q4_k", "q5_k", "q6_k"} < found
    field = GGUFReader(k_quants).get_field("general.file_type")
    assert field is not None
    assert field.contents() == 15  # MOSTLY_Q4_K_M


def test_k_quants_in_llama_cpp(k_quants: Path, reference: Callable[..., Any]) -> None:
    pytest.importorskip("xllamacpp")
    tokens, start, expected = reference(k_quants)
    request = EngineRequest(k_quants, np.array([tokens]), slice(0, len(tokens)))
    (run,) = run_native(request, "gguf")
    assert run.logits is not None
    assert run.logits[start - 1 : -1].argmax(-1).tolist() == tokens[start:]
    assert np.median(np.abs(run.logits - expected).max(-1)) < INT8_MEDIAN


@pytest.mark.parametrize("name", ["mlx", "mlx-5-6"])
def test_mlx_lm(name: str, builds: dict[str, Path], reference: Callable[..., Any]) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    tokens, start, expected = reference(builds[name])
    model, config = utils.load_model(builds[name])
    assert config["quantization"]["group_size"] == 64
    found = np.array(model(mx.array([tokens]))[0].astype(mx.float32))
    assert found[start - 1 : -1].argmax(-1).tolist() == tokens[start:]
    assert np.median(np.abs(found - expected).max(-1)) < FLOAT16_MEDIAN
    model.set_dtype(mx.float32)
    found = np.array(model(mx.array([tokens]))[0])
    assert np.abs(found - expected).max() < FLOAT32_TOLERANCE


def test_onnxruntime(builds: dict[str, Path], reference: Callable[..., Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tokens, start, expected = reference(builds["onnx"])
    session = onnxruntime.InferenceSession(str(builds["onnx"] / "model.onnx"))
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    feed: dict[str, NDArray[Any]] = {
        i.name: np.zeros([sizes.get(d, d) for d in i.shape], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    ids = np.array([tokens], np.int64)
    feed |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = session.run(["logits"], feed)[0][0]
    assert found[start - 1 : -1].argmax(-1).tolist() == tokens[start:]
    assert np.abs(found - expected).max() < FLOAT32_TOLERANCE


def test_onnxruntime_genai(builds: dict[str, Path], reference: Callable[..., Any]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    tokens, start, _ = reference(builds["onnx"])
    params = genai.GeneratorParams(model := genai.Model(str(builds["onnx"])))
    params.set_search_options(do_sample=False, max_length=start + NEW_TOKENS)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([tokens[:start]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = tokens[:-1] if tokens[-1] == END_OF_TURN else tokens  # genai leaves it out
    assert generator.get_sequence(0).tolist()[: len(expected)] == expected
