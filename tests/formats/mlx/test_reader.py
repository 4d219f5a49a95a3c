"""Reading MLX builds back: damage is one clear line, before any memory is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.build import Assets
from lfmq.formats.mlx import container as mlx
from lfmq.formats.mlx.names import module_path
from lfmq.formats.mlx.reader import _shape
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import ValidationError
from lfmq.quant.types import Weight


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    random_weight: Callable[[TensorPlan], Weight],
) -> Path:
    plan = make_plan(tiny_config)
    with BuildWriter(tmp_path / "a-mlx", mlx.layout(plan, tiny_assets)) as writer:
        for unit in plan.write_groups():
            writer.write({e.name: random_weight(e) for e in unit})
        writer.commit()
    return tmp_path / "a-mlx"


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


EMBEDDING = "model.embed_tokens"


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
