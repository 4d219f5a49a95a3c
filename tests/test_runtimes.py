"""The sample's builds in the programs they are for: the greedy tokens are the reference's.

The reference is transformers in float32 with the weights dequantized from the build itself, so
that only the runtime's arithmetic differs. Each runtime is fed the prompt and the reference's own
greedy continuation: when it prefers the same token at every step, it generates the same text.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest

NEW_TOKENS = 24
END_OF_TURN = 4
QUESTIONS = (
    "What is the weather in Tokyo in celsius?",
    "Book a meeting with Kofi on Friday at 9:15.",
    "What is 17 + 14?",
)
# Median over generated positions of the largest logit difference; logits span about 30.
# llama.cpp rounds activations to int8 in every quantized product, ONNX Runtime 1.32 in QMoE's
# blocks of 8 bits; MLX computes in the float16 of the file's scales. A rounded router score may
# send a token to another expert, which moves that position's logits by 1 to 3: therefore the
# median, and greedy tokens that must agree at every position.
MEDIAN_TOLERANCE = {"gguf": 0.5, "mlx": 0.1, "onnx-int8": 0.5}
# float32 arithmetic in another order: no position may differ by more.
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A prompt, the reference's greedy continuation, and its logits over both [T, V]."""

    prompt: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]


MODELS = (
    "int4",
    pytest.param("int8", marks=pytest.mark.slow),
    pytest.param("int4-all", marks=pytest.mark.slow),
    "dense int4",
)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recipe(model: str) -> str:
    return model.removeprefix("dense ")


@pytest.fixture(scope="module")
def folder(model: str, sample_folder: Path) -> Path:
    return sample_folder.with_name("lfm2-tiny") if model.startswith("dense") else sample_folder


@pytest.fixture(scope="module")
def builds(recipe: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    checkpoint, loaded = open_checkpoint(folder), load_recipe(recipe)
    plan = resolve_plan(checkpoint.config, loaded)
    done = convert(checkpoint, loaded, plan, FORMATS, tmp_path_factory.mktemp(recipe)).builds
    return {b.format: b.path for b in done}


@pytest.fixture(scope="module")
def cases(
    builds: dict[str, Path], folder: Path, transformers_model: Callable[..., Any]
) -> list[Case]:
    config = json.loads((folder / "config.json").read_text())
    model = transformers_model(config, FORMATS["gguf"].open_reader(builds["gguf"]).read)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [_case(model, tokenizer, question) for question in QUESTIONS]


def _case(model: Any, tokenizer: Tokenizer, question: str) -> Case:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
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
        logits = model(tokens).logits[0].numpy()
    return Case(prompt, tokens[0].tolist(), logits)


def difference(case: Case, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest logit difference of each generated position; greedy tokens must be equal."""
    generated = slice(len(case.prompt) - 1, len(case.tokens) - 1)
    greedy = logits[generated].argmax(-1)
    np.testing.assert_array_equal(greedy, case.tokens[len(case.prompt) :])
    return np.abs(logits[generated] - case.logits[generated]).max(-1)


def test_readers_agree(builds: dict[str, Path], folder: Path) -> None:
    readers = {name: FORMATS[name].open_reader(path) for name, path in builds.items()}
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.stored:
        expected = readers["gguf"].read(name)
        np.testing.assert_array_equal(readers["onnx"].read(name), expected, err_msg=name)
        packed = readers["compressed-tensors"].read(name)
        np.testing.assert_array_equal(packed, expected, err_msg=name)
        found = readers["mlx"].read(name)
        if name.endswith(("norm.weight", "conv.conv.weight")):
            # MLX keeps them as float16: bfloat16 values below 2^-17 round to a multiple of 2^-24
            np.testing.assert_allclose(found, expected, rtol=0, atol=2**-25, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_llama_cpp(builds: dict[str, Path], cases: list[Case]) -> None:
    pytest.importorskip("xllamacpp")
    for case in cases:
        ids = np.array([case.tokens])
        (run,) = run_native(EngineRequest(builds["gguf"], ids, slice(0, ids.size)), "gguf")
        assert run.logits is not None
        assert np.median(difference(case, run.logits)) < MEDIAN_TOLERANCE["gguf"]


def test_transformers(builds: dict[str, Path], cases: list[Case]) -> None:
    """What vLLM and SGLang load, through the library that unpacks it; experts run in float16."""
    pytest.importorskip("compressed_tensors")
    for case in cases:
        ids = np.array([case.tokens])
        request = EngineRequest(builds["compressed-tensors"], ids, slice(0, ids.size))
        (run,) = run_native(request, "compressed-tensors")
        assert run.logits is not None
        assert np.median(difference(case, run.logits)) < MEDIAN_TOLERANCE["mlx"]


def test_mlx_lm(builds: dict[str, Path], cases: list[Case]) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(builds["mlx"])
    for case in cases[:1]:  # float16 is slow on a CPU
        logits = np.array(model(mx.array([case.tokens]))[0].astype(mx.float32))
        assert np.median(difference(case, logits)) < MEDIAN_TOLERANCE["mlx"]
    model.set_dtype(mx.float32)
    for case in cases:
        logits = np.array(model(mx.array([case.tokens]))[0])
        assert difference(case, logits).max() < FLOAT32_TOLERANCE


def test_onnxruntime(builds: dict[str, Path], cases: list[Case], recipe: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(builds["onnx"] / "model.onnx"))
    empty = {}
    for i in session.get_inputs():
        if i.name.startswith("past"):
            shape = [
                d if isinstance(d, int) else (1 if n == 0 else 0) for n, d in enumerate(i.shape)
            ]
            empty[i.name] = np.zeros(shape, np.float32)
    for case in cases:
        ids = np.array([case.tokens], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty}
        found = difference(case, session.run(["logits"], feed)[0][0])
        if recipe == "int8":
            assert np.median(found) < MEDIAN_TOLERANCE["onnx-int8"]
        else:
            assert found.max() < FLOAT32_TOLERANCE


def test_onnxruntime_genai(builds: dict[str, Path], cases: list[Case]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(builds["onnx"]))
    for case in cases:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(case.prompt) + NEW_TOKENS)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([case.prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        expected = case.tokens
        if expected[-1] == END_OF_TURN:  # genai stops at it and leaves it out
            expected = expected[:-1]
        assert generator.get_sequence(0).tolist()[: len(expected)] == expected
