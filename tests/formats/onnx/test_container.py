"""ONNX builds: exact weights, ONNX Runtime's logits against transformers, genai, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

from lfmq.formats.build import Assets
from lfmq.formats.onnx import container as onnx_format
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError, ValidationError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

# float32 rounding of two runtimes over four layers; measured up to 5e-6 on logits of up to 3.4
EXACT = 2e-5
# ONNX Runtime 1.32 computes 8-bit block QMoE with int8 activations unless told otherwise: 1 to 2 %
# of each expert layer's largest output; measured 1.4e-2 on logits of up to 3.3
INT8_ACTIVATIONS = 5e-2
# the switch ONNX Runtime 1.32 reads when a session is made; "fp32" keeps activations as floats
QMOE_GEMM = "ORT_QMOE_CPU_QNBIT_GEMM"

SCHEMES = [Scheme(bits, group) for bits in (4, 8) for group in (32, 64)]
TOKENS = np.random.default_rng(5).integers(5, 320, (1, 24))
# whole prompt; uneven chunks, some shorter than the convolution; token by token
CHUNKS = [[24], [7, 2, 14, 1], [1] * 24]
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Weights = dict[str, NDArray[np.float32]]
MakePlan = Callable[..., Plan]
MakeWeight = Callable[[TensorPlan], Weight]
Build = Callable[..., tuple[Path, Weights]]


@pytest.fixture
def build(
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: MakeWeight,
    tmp_path: Path,
) -> Build:
    """Write a build of random weights; return it and what its weights stand for."""

    def write(
        config: ModelConfig = tiny_config,
        assets: Assets = tiny_assets,
        name: str = "build",
        **storages: object,
    ) -> tuple[Path, Weights]:
        plan = make_plan(config, **storages)
        onnx_format.check(plan, assets)
        weights: Weights = {}
        with BuildWriter(tmp_path / name, onnx_format.layout(plan, assets)) as writer:
            for unit in plan.write_groups():
                values = {entry.name: random_weight(entry) for entry in unit}
                writer.write(values)
                for tensor, w in values.items():
                    weights[tensor] = dequantize(w) if isinstance(w, Quantized) else w
            writer.commit()
        return tmp_path / name, weights

    return write


def with_config(config: ModelConfig, assets: Assets, **changes: Any) -> tuple[ModelConfig, Assets]:
    """The tiny model with some settings changed, in geometry and config alike."""
    return replace(config, **changes), replace(assets, config_json=assets.config_json | changes)


def reference(assets: Assets, weights: Weights) -> Lfm2MoeForCausalLM:
    """Transformers' model with the same weights."""
    model = Lfm2MoeForCausalLM(Lfm2MoeConfig(**assets.config_json)).eval()
    state = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in range(
        assets.config_json["num_dense_layers"], assets.config_json["num_hidden_layers"]
    ):
        experts = f"model.layers.{layer}.feed_forward.experts"
        fused = [
            [weights[f"{experts}.{e}.{w}.weight"] for w in ("w1", "w3", "w2")]
            for e in range(assets.config_json["num_experts"])
        ]
        state[f"{experts}.gate_up_proj"] = np.stack([np.concatenate(f[:2]) for f in fused])
        state[f"{experts}.down_proj"] = np.stack([f[2] for f in fused])
    state["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    return model


def expected_logits(assets: Assets, weights: Weights, ids: Ids) -> Logits:
    with torch.no_grad():
        return reference(assets, weights)(torch.from_numpy(ids)).logits.numpy()


class Runtime:
    """ONNX Runtime with the build's states carried from call to call."""

    def __init__(self, path: Path) -> None:
        model = str(path / "model.onnx")
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._states: dict[str, NDArray[np.float32]] = {}
        self._seen = 0

    def reset(self, batch: int) -> None:
        self._seen = 0
        for value in self._session.get_inputs():
            if value.name.startswith("past"):
                sizes = {"batch_size": batch, "past_sequence_length": 0}
                shape = [sizes.get(d, d) for d in value.shape]
                self._states[value.name] = np.zeros(shape, np.float32)

    def step(self, ids: Ids) -> Logits:
        self._seen += ids.shape[1]
        mask = np.ones((ids.shape[0], self._seen), np.int64)
        names = [value.name for value in self._session.get_outputs()]
        feed = {"input_ids": ids, "attention_mask": mask, **self._states}
        outputs = dict(zip(names, self._session.run(names, feed), strict=True))
        for name in self._states:
            present = name.replace("past_key_values", "present").replace("past_", "present_")
            self._states[name] = outputs[present]
        return outputs["logits"]

    def run(self, ids: Ids, chunks: list[int]) -> Logits:
        self.reset(ids.shape[0])
        ends = np.cumsum(chunks)
        return np.concatenate([self.step(p) for p in np.split(ids, ends[:-1], axis=1)], axis=1)


def assert_logits(path: Path, assets: Assets, weights: Weights, tolerance: float) -> None:
    expected = expected_logits(assets, weights, TOKENS)
    for chunks in CHUNKS:
        error = np.abs(Runtime(path).run(TOKENS, chunks) - expected).max()
        assert error <= tolerance, (chunks, error)


@pytest.fixture
def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")


def assert_weights(path: Path, weights: Weights) -> None:
    reader = onnx_format.open_reader(path)
    for name, expected in weights.items():
        values = reader.read(name)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected, name)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 128), Scheme(8, 128)], ids=str)
def test_weights_are_exact_and_logits_equal_transformers(
    scheme: Scheme,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    build: Build,
    float_activations: None,
) -> None:
    config, assets = tiny_config, tiny_assets
    if scheme.group == 128:
        sizes = {"intermediate_size": 256, "moe_intermediate_size": 128}
        config, assets = with_config(config, assets, **sizes)
    path, weights = build(config, assets, experts=scheme, shared=scheme)
    onnx.checker.check_model(path / "model.onnx")
    assert_weights(path, weights)
    assert_logits(path, assets, weights, EXACT)


def foreign_dequantize(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """The formula of ONNX Runtime's documentation, one bit field at a time."""
    rows = codes.reshape(*scale.shape[:-1], -1).astype(np.int64)
    per_byte = 8 // bits
    values = np.empty((*rows.shape[:-1], rows.shape[-1] * per_byte), np.int64)
    for i in range(per_byte):
        values[..., i::per_byte] = (rows >> (bits * i)) & (2**bits - 1)
    block = values.shape[-1] // scale.shape[-1]
    return ((values - 2 ** (bits - 1)) * np.repeat(scale, block, axis=-1)).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_mean_what_the_operators_document(
    scheme: Scheme, tiny_config: ModelConfig, build: Build
) -> None:
    path, weights = build(experts=scheme, shared=scheme)
    model = onnx.load(path / "model.onnx")
    raw = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}

    def values(name: str) -> NDArray[np.float32]:
        return foreign_dequantize(raw[f"{name}.codes"], raw[f"{name}.scale"], scheme.bits)

    for name in ("model.layers.0.conv.in_proj.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(values(name), weights[name])
    experts = "model.layers.2.feed_forward.experts"
    stack = f"{experts}.int{scheme.bits}_g{scheme.group}"
    gate_up, down = values(f"{stack}.gate_up"), values(f"{stack}.down")
    for e in range(tiny_config.num_experts):
        np.testing.assert_array_equal(gate_up[e, 0::2], weights[f"{experts}.{e}.w1.weight"])
        np.testing.assert_array_equal(gate_up[e, 1::2], weights[f"{experts}.{e}.w3.weight"])
        np.testing.assert_array_equal(down[e], weights[f"{experts}.{e}.w2.weight"])
    tied = raw["lm_head.weight.codes"].reshape(tiny_config.vocab_size, -1)
    np.testing.assert_array_equal(tied, raw["model.embed_tokens.weight.codes"])
    assert raw["model.layers.0.conv.conv.weight"].shape == (128, 1, 3)


def test_placement(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    """Nothing overlaps, big tensors start on a page, the tied head is stored once."""
    proto, data = onnx_format.layout(make_plan(tiny_config), tiny_assets).files[:2]
    runs = [(p.offset, p.nbytes) for p in data.segments]
    runs += [(offset, len(content)) for offset, content in data.constants]
    end = 0
    for offset, nbytes in sorted(runs):
        assert offset >= end
        end = offset + nbytes
    assert end == data.size
    model = onnx.load_model_from_string(proto.constants[0][1])
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    for name, place in places.items():
        if int(place.get("length", 0)) >= 4096:
            assert int(place["offset"]) % 4096 == 0, name
    assert places["lm_head.weight.codes"] == places["model.embed_tokens.weight.codes"]


@pytest.mark.parametrize(("bits", "tolerance"), [(4, EXACT), (8, INT8_ACTIVATIONS)])
def test_experts_without_the_switch(
    bits: int, tolerance: float, tiny_assets: Assets, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(QMOE_GEMM, raising=False)
    path, weights = build(experts=Scheme(bits))
    assert_logits(path, tiny_assets, weights, tolerance)


def test_batches_without_padding(tiny_assets: Assets, build: Build) -> None:
    path, weights = build()
    ids = np.random.default_rng(6).integers(5, 320, (3, 12))
    expected = expected_logits(tiny_assets, weights, ids)
    # GroupQueryAttention takes a chunk after a past in batches of one only
    logits = Runtime(path).run(ids, [8, 1, 1, 1, 1])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=EXACT)


def expert_overrides(storages: dict[int, Scheme | str], layer: int) -> dict[str, Scheme | str]:
    return {
        f"model.layers.{layer}.feed_forward.experts.{e}.{w}.weight": storage
        for e, storage in storages.items()
        for w in ("w1", "w2", "w3")
    }


@pytest.mark.parametrize(
    "storages",
    [{1: Scheme(8)}, {0: Scheme(8), 3: Scheme(8), 4: Scheme(4, 64)}, {5: "float32", 2: Scheme(8)}],
    ids=["one", "three groups", "float"],
)
def test_widths_of_single_experts(
    storages: dict[int, Scheme | str], tiny_assets: Assets, build: Build, float_activations: None
) -> None:
    path, weights = build(overrides=expert_overrides(storages, 2))
    assert_weights(path, weights)
    assert_logits(path, tiny_assets, weights, EXACT)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_floats(storage: str, tiny_assets: Assets, build: Build) -> None:
    path, weights = build(experts=storage, shared=storage)
    if storage == "float16":
        weights = {n: w.astype(np.float16).astype(np.float32) for n, w in weights.items()}
    assert_weights(path, weights)
    assert_logits(path, tiny_assets, weights, EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.0},
        {"use_expert_bias": False},
        {"norm_topk_prob": False, "routed_scaling_factor": 0.5, "num_experts_per_tok": 6},
        {"num_experts_per_tok": 1},
        {"conv_L_cache": 4},
    ],
    ids=str,
)
def test_settings_of_the_model(
    changes: dict[str, object], tiny_config: ModelConfig, tiny_assets: Assets, build: Build
) -> None:
    config, assets = with_config(tiny_config, tiny_assets, **changes)
    path, weights = build(config, assets)
    assert onnx_format.open_reader(path).config == config
    assert_logits(path, assets, weights, EXACT)


def test_files(tiny_config: ModelConfig, tiny_assets: Assets, build: Build) -> None:
    path, _ = build()
    names = ["README.md", "model.onnx", "model.onnx_data", "genai_config.json", "config.json"]
    assert {p.name for p in path.iterdir()} == {*names, *tiny_assets.files}
    assert onnx_format.open_reader(path).config == tiny_config


def test_genai_generates_the_same_tokens(tiny_assets: Assets, build: Build) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    path, weights = build(shared=Scheme(4))
    ids = TOKENS[:, :9]
    model = genai.Model(str(path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0).tolist()
    expected = reference(tiny_assets, weights).generate(
        torch.from_numpy(ids), max_length=24, do_sample=False, eos_token_id=4, pad_token_id=0
    )
    assert tokens == expected[0].tolist()


def test_same_plan_same_bytes(build: Build) -> None:
    overrides = expert_overrides({3: Scheme(8), 1: Scheme(8)}, 3)
    first, _ = build(name="first", overrides=overrides)
    again, _ = build(name="again", overrides=overrides)
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("name", "storage", "message"),
    [
        ("model.layers.2.feed_forward.experts.3.w2.weight", Scheme(8), "one width an expert"),
        ("model.layers.0.conv.in_proj.weight", Scheme(6), "4 or 8 bits"),
        ("model.layers.0.conv.in_proj.weight", Scheme(4, 16), "groups of 16"),
        ("model.layers.0.feed_forward.w2.weight", Scheme(4, 128), "rows of 192"),
        ("model.layers.0.conv.in_proj.weight", "bfloat16", "float32 or float16"),
        ("model.layers.2.feed_forward.gate.weight", Scheme(8), "keeps it as floats"),
        ("model.embed_tokens.weight", Scheme(4, 32, "other"), "grids symmetric"),
    ],
)
def test_refused(
    name: str,
    storage: Scheme | str,
    message: str,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    plan = make_plan(tiny_config, overrides={name: storage})
    with pytest.raises(UnsupportedError, match=f"{name}.*{message}"):
        onnx_format.check(plan, tiny_assets)


def test_refused_settings(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    config, assets = with_config(tiny_config, tiny_assets, head_dim=24)
    with pytest.raises(UnsupportedError, match="head_dim is 24"):
        onnx_format.check(make_plan(config), assets)
    biased = replace(tiny_assets, config_json=tiny_assets.config_json | {"conv_bias": True})
    with pytest.raises(UnsupportedError, match="conv_bias"):
        onnx_format.check(make_plan(tiny_config), biased)


@pytest.mark.parametrize("name", ["model.onnx_data", "model.onnx", "config.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated(name: str, keep: float, build: Build) -> None:
    path, _ = build()
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValidationError, match=name) as caught:
        onnx_format.open_reader(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_tensor(build: Build) -> None:
    path, _ = build()
    reader = onnx_format.open_reader(path)
    for name in (
        "model.layers.9.conv.in_proj.weight",
        "model.layers.2.feed_forward.experts.9.w1.weight",
    ):
        with pytest.raises(ValidationError, match="missing"):
            reader.read(name)
    (path / "model.onnx_data").unlink()
    with pytest.raises(ValidationError, match="onnx_data"):
        onnx_format.open_reader(path)


def test_configs(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    files = {f.path: f for f in onnx_format.layout(make_plan(tiny_config), tiny_assets).files}
    config = json.loads(files["config.json"].constants[0][1])
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    assert {k: config[k] for k in tiny_assets.config_json} == tiny_assets.config_json
    genai = json.loads(files["genai_config.json"].constants[0][1])["model"]
    assert genai["decoder"]["layer_types"] == list(tiny_config.layer_types)
    assert genai["eos_token_id"] == 4
