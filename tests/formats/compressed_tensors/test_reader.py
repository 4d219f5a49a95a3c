"""Reading compressed-tensors builds back: damage and wrong patterns are one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors import container as ct
from lfmq.formats.compressed_tensors.reader import _shape
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.formats.registry import detect_format
from lfmq.quant.errors import ValidationError

CONV = "model.layers.0.conv.in_proj.weight"
EXPERT = "model.layers.2.feed_forward.experts.1.w2.weight"


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    write_random: Callable[..., Path],
) -> Path:
    plan = make_plan(tiny_config)
    return write_random(tmp_path / "a", plan, ct.layout(plan, tiny_assets))


def edit(build: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the quantization_config of a build."""
    config = json.loads((build / "config.json").read_text())
    change(config["quantization_config"])
    (build / "config.json").write_text(json.dumps(config))


def edit_header(build: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the weights; the tensors stay where they are."""
    path = build / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def failure(build: Path, name: str = CONV) -> str:
    with pytest.raises(ValidationError) as caught:
        ct.open_reader(build).read(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(build))
    return message


def test_the_folder_is_told_by_its_config(build: Path) -> None:
    assert detect_format(build) == "compressed-tensors"
    edit(build, lambda block: block.pop("quant_method"))
    assert detect_format(build) == "mlx"
    (build / "config.json").write_text("{")
    assert detect_format(build) == "mlx"


def test_the_reader_knows_every_shape(tiny_config: ModelConfig) -> None:
    for tensor in expected_tensors(tiny_config):
        assert _shape(tensor.name, tiny_config) == tensor.shape


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.4.conv.in_proj.weight",
        "model.layers.2.feed_forward.experts.6.w1.weight",
        "model.layers.0.conv.in_proj.bias",
    ],
)
def test_names_the_model_does_not_have(name: str, build: Path) -> None:
    assert failure(build, name).endswith(f"tensor {name} is not part of this model")


# ---- the config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "quant_method",
            None,
            "quant_method of quantization_config is None, expected 'compressed-",
        ),
        ("quant_method", "gptq", "quant_method of quantization_config is 'gptq'"),
        ("format", "int-quantized", "format of quantization_config is 'int-quantized'"),
        ("ignore", "lm_head", "ignore is 'lm_head', expected a list"),
        ("ignore", [7], "ignore is [7], expected a list"),
        ("ignore", ["re:("], "ignore has 're:(', which is not a pattern"),
        ("config_groups", None, "config_groups is None, expected an object"),
        ("config_groups", {}, "config_groups is {}, expected an object"),
        ("config_groups", {"a": 7}, "a of config_groups is 7, expected pack-quantized"),
    ],
)
def test_a_block_that_cannot_be(key: str, value: Any, message: str, build: Path) -> None:
    edit(build, lambda block: block.update({key: value}))
    assert f"config.json: {message}" in failure(build)


@pytest.mark.parametrize("block", [None, [], "x"])
def test_no_block_at_all(block: Any, build: Path) -> None:
    config = json.loads((build / "config.json").read_text())
    (build / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    assert "config.json: quantization_config is" in failure(build)


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 3},
        {"num_bits": True},
        {"num_bits": "4"},
        {"num_bits": 4.0},
        {"group_size": 0},
        {"group_size": None},
        {"type": "float"},
        {"symmetric": False},
        {"strategy": "channel"},
    ],
    ids=str,
)
def test_a_scheme_that_is_not_written(change: dict[str, Any], build: Path) -> None:
    edit(build, lambda block: block["config_groups"]["group_1"]["weights"].update(change))
    assert "group_1 of config_groups is" in failure(build)


@pytest.mark.parametrize(
    "change", [{"input_activations": {"num_bits": 8}}, {"format": "marlin-24"}], ids=str
)
def test_a_group_that_is_not_written(change: dict[str, Any], build: Path) -> None:
    edit(build, lambda block: block["config_groups"]["group_0"].update(change))
    assert "group_0 of config_groups is" in failure(build)


def test_groups_that_do_not_divide_a_row(build: Path) -> None:
    edit(build, lambda block: block["config_groups"]["group_1"]["weights"].update(group_size=48))
    assert f"groups of 48, which do not divide the 64 columns of {EXPERT}" in failure(
        build, EXPERT
    )


# ---- patterns, as engines would find out


def test_a_pattern_that_misses_its_modules(build: Path) -> None:
    edit(build, lambda block: block["config_groups"]["group_0"]["targets"].pop(0))
    assert f"{CONV}_packed is I32 [384, 32], expected I32 [384, 16]" in failure(build)


def test_a_gate_that_is_not_ignored(build: Path) -> None:
    edit(build, lambda block: block["ignore"].pop())
    gate = "model.layers.2.feed_forward.gate.weight"
    assert f"{gate}_packed is missing, config.json has the module in group_1" in failure(
        build, gate
    )


def test_a_module_ignored_though_it_is_packed(build: Path) -> None:
    edit(build, lambda block: block["ignore"].append(r"re:.*conv\."))
    assert f"{CONV} is missing, config.json has the module as floats" in failure(build)


def test_no_group_for_a_module(build: Path) -> None:
    edit(build, lambda block: block["config_groups"].pop("group_1"))
    assert f"{EXPERT} is missing, config.json has the module as floats" in failure(build, EXPERT)


def test_the_class_before_the_patterns(build: Path) -> None:
    def swap(block: dict[str, Any]) -> None:
        block["config_groups"] = dict(reversed(block["config_groups"].items()))

    edit(build, swap)
    message = failure(build)
    assert "conv.in_proj is in group_0 by name and in group_1, which stands before it" in message


def test_a_module_by_its_plain_name(build: Path) -> None:
    expected = ct.open_reader(build).read(CONV)
    edit(
        build,
        lambda block: block["config_groups"]["group_0"].update(
            targets=[CONV.removesuffix(".weight")]
        ),
    )
    np.testing.assert_array_equal(ct.open_reader(build).read(CONV), expected)


# ---- the weights


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_files(keep: int, build: Path) -> None:
    path = build / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: " in failure(build)


def test_a_missing_shard(build: Path) -> None:
    (build / "model.safetensors").unlink()
    assert "is missing, model.safetensors.index.json has it" in failure(build)


@pytest.mark.parametrize("part", ["packed", "scale", "shape"])
def test_a_missing_tensor(part: str, build: Path) -> None:
    edit_header(build, lambda header: header.update(x=header.pop(f"{CONV}_{part}")))
    assert f"tensor {CONV}_{part} is missing" in failure(build)


@pytest.mark.parametrize(
    ("part", "fields", "expected"),
    [
        ("packed", {"dtype": "U32"}, "expected I32 [384, 32]"),
        ("packed", {"shape": [32, 384]}, "expected I32 [384, 32]"),
        ("scale", {"dtype": "F8_E4M3"}, "expected BF16 or F16 or F32 [384, 4]"),
        ("shape", {"shape": [2, 1]}, "expected I64 [2]"),
    ],
)
def test_a_header_that_contradicts_the_config(
    part: str, fields: dict[str, Any], expected: str, build: Path
) -> None:
    edit_header(build, lambda header: header[f"{CONV}_{part}"].update(fields))
    message = failure(build)
    assert f"model.safetensors: {CONV}_{part} is " in message
    assert expected in message


def test_a_weight_shape_that_disagrees(build: Path) -> None:
    path = build / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + length])[f"{CONV}_shape"]["data_offsets"][0]
    at = 8 + length + begin
    path.write_bytes(content[:at] + (7).to_bytes(8, "little") + content[at + 8 :])
    assert f"{CONV}_shape is [7, 128], expected [384, 128]" in failure(build)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": "llama"}'])
def test_a_damaged_config(content: bytes, build: Path) -> None:
    (build / "config.json").write_bytes(content)
    assert "config.json: " in failure(build)
