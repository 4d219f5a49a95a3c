"""Reading MLX builds back: damage is one clear line, before any memory is asked for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.run.open_build import open_build
from lfmq.formats.build import Assets
from lfmq.formats.mlx import container as mlx
from lfmq.formats.mlx.names import module_path
from lfmq.formats.mlx.reader import _shape
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.errors import ValidationError
from lfmq.tests.refusals import refusal_of

EMBEDDING = "model.embed_tokens"
GATE = "model.layers.2.feed_forward.gate"
Tensors = dict[str, Any]


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    write_random: Callable[..., Path],
) -> Path:
    plan = make_plan(tiny_config)
    return write_random(tmp_path / "a-mlx", plan, mlx.layout(plan, tiny_assets))


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_files_are_one_clear_line(build: Path, keep: int) -> None:
    path = build / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValidationError, match=r"model\.safetensors") as caught:
        mlx.open_reader(build)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(build: Path) -> None:
    reader = mlx.open_reader(build)
    for name in ("model.layers.9.conv.in_proj.weight", "lm_head.weight"):
        with pytest.raises(ValidationError, match=name.removesuffix(".weight")):
            reader.read(name)
    with pytest.raises(ValidationError, match=r"experts\.6.* not part of this model"):
        reader.read("model.layers.2.feed_forward.experts.6.w1.weight")


@pytest.mark.parametrize(
    "value",
    [
        *(False, None, 4, "x", [], {}, {"bits": 4}, {"bits": [8]}),
        {"bits": 3, "group_size": 32},
        {"bits": 7, "group_size": 32},
        {"bits": "8", "group_size": 32},
        {"bits": 8, "group_size": 0},
        {"bits": 8, "group_size": 48},
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_one_clear_line(value: Any, build: Path) -> None:
    config = json.loads((build / "config.json").read_text())
    config["quantization"][EMBEDDING] = value
    (build / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match=f"{EMBEDDING} is .* expected 4, 5, 6 or 8 bits"):
        mlx.open_reader(build).read(f"{EMBEDDING}.weight")


def test_a_quantization_that_is_no_object(build: Path) -> None:
    config = json.loads((build / "config.json").read_text())
    (build / "config.json").write_text(json.dumps(config | {"quantization": [4]}))
    with pytest.raises(ValidationError, match="quantization is not an object"):
        mlx.open_reader(build)


@pytest.mark.parametrize(
    ("name", "part", "fields"),
    [
        (f"{EMBEDDING}.weight", "weight", {"dtype": "I32"}),
        (f"{EMBEDDING}.weight", "weight", {"shape": [32, 320]}),
        (f"{EMBEDDING}.weight", "scales", {"dtype": "F8_E4M3"}),
        (f"{EMBEDDING}.weight", "biases", {"shape": [320, 4, 1]}),
        ("model.embedding_norm.weight", "weight", {"shape": [64, 2]}),
        ("model.layers.0.conv.conv.weight", "weight", {"shape": [3, 128, 1]}),
        ("model.layers.2.feed_forward.experts.1.w2.weight", "weight", {"shape": [3, 256, 8]}),
    ],
)
def test_a_header_that_contradicts_the_config(
    name: str, part: str, fields: dict[str, Any], build: Path
) -> None:
    key = f"{module_path(name, 'lfm2_moe')[0]}.{part}"
    path = build / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[key] |= fields
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    reader = mlx.open_reader(build)
    with pytest.raises(ValidationError, match=rf"model\.safetensors: {key} is .*, expected"):
        reader.read(name)


def test_the_reader_knows_every_shape(tiny_config: ModelConfig) -> None:
    for tensor in expected_tensors(tiny_config):
        assert _shape(tensor.name, tiny_config) == tensor.shape


def test_a_header_length_beyond_the_file(build: Path) -> None:
    path = build / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValidationError, match="header claims 1,152,921,504,606,846,976 bytes"):
        mlx.open_reader(build)


def test_bytes_after_the_last_tensor(build: Path) -> None:
    path = build / "model.safetensors"
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(ValidationError, match=r"model\.safetensors: overlong"):
        mlx.open_reader(build)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": "llama"}'])
def test_a_damaged_config(content: bytes, build: Path) -> None:
    (build / "config.json").write_bytes(content)
    with pytest.raises(ValidationError, match=r"config\.json"):
        mlx.open_reader(build)


def test_a_missing_shard(build: Path) -> None:
    (build / "model.safetensors").unlink()
    with pytest.raises(ValidationError, match=r"model\.embed_tokens\.weight is missing"):
        mlx.open_reader(build).read("model.embed_tokens.weight")


# ---- what mlx-lm would load and the reader does not know


refusal = partial(refusal_of, open_build)


def change(build: Path, edit: Callable[[Tensors], Any], *, index: bool = True) -> None:
    """Edit the tensors; the index follows."""
    path = build / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "mlx"})
    if index:
        weight_map = dict.fromkeys(tensors, path.name)
        (build / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def configure(build: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = build / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    config["quantization_config"] = config.get("quantization")
    path.write_text(json.dumps(config))


def test_a_sound_build_is_opened_and_read_by_rows(build: Path) -> None:
    change(build, lambda tensors: None)
    format, reader = open_build(build)
    assert format == "mlx"
    for name in (f"{GATE}.weight", "model.layers.2.feed_forward.experts.3.w2.weight"):
        np.testing.assert_array_equal(reader.read(name, 2, 5), reader.read(name)[2:5])
    assert reader.is_float(f"{GATE}.weight")
    assert not reader.is_float("model.layers.2.feed_forward.experts.3.w2.weight")


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"lm_head.weight": t[f"{GATE}.weight"]}), "'lm_head.weight' that"),
        (lambda t: t.update({f"{GATE}.bias": t[f"{GATE}.weight"][:, 0]}), f"'{GATE}.bias'"),
        (rename(f"{GATE}.weight", f"{GATE}.weights"), f"{GATE}.weight is missing"),
        (lambda t: t.pop("model.embed_tokens.biases"), "embed_tokens.biases is missing"),
        (
            lambda t: t.update(
                {"model.layers.4.ffn_norm.weight": t["model.embedding_norm.weight"]}
            ),
            r"'model.layers.4.ffn_norm.weight'",
        ),
        (
            lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"].T.copy()}),
            f"{GATE}.weight is F32",
        ),
    ],
)
def test_tensors_that_are_not_the_models(
    build: Path, edit: Callable[[Tensors], Any], message: str
) -> None:
    change(build, edit)
    assert message in refusal(build)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["quantization"].update({"model.layers.9.x": False}), "is no module"),
        (lambda c: c["quantization"].update({GATE: {"bits": 8, "group_size": 32}}), "scales is"),
        (lambda c: c["quantization"].update({"model.embed_tokens": False}), "the file has its"),
        (lambda c: c.update(model_file="x.py"), "model_file is 'x.py'"),
        (lambda c: c.update(quantize_activations=True), "quantize_activations is True"),
        (lambda c: c.update(num_experts=10**6), "cannot hold|shape|is U32|expected"),
        (lambda c: c.update(hidden_size=2**30), "weights, which its|config.json"),
    ],
)
def test_configs_that_say_otherwise(
    build: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    configure(build, edit)
    assert any(part in refusal(build) for part in message.split("|"))


def test_two_blocks_that_differ(build: Path) -> None:
    path = build / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(config))
    assert "quantization_config is not what quantization is" in refusal(build)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", ".", 7, None])
def test_an_index_that_names_no_file_of_the_folder(build: Path, file: Any) -> None:
    path = build / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][f"{GATE}.weight"] = file
    path.write_text(json.dumps(index))
    assert "expected the name of a file in the build's folder" in refusal(build)


def test_files_beside_the_build(build: Path) -> None:
    (build / "adapters.safetensors").write_bytes((build / "model.safetensors").read_bytes())
    assert "a file of tensors that is no part of the build" in refusal(build)
    (build / "adapters.safetensors").rename(build / "model-2.safetensors")
    assert "is also in model-2.safetensors" in refusal(build)
