"""A quantization block is known key by key, and its patterns match in little time."""

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lfmq.converter.run.open_build import open_build
from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors import container as ct
from lfmq.formats.compressed_tensors.block import read_block
from lfmq.formats.compressed_tensors.config import quantization_config
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.types import Scheme
from lfmq.tests.refusals import refusal_of

CONV = "model.layers.0.conv.in_proj.weight"


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    write_random: Callable[..., Path],
) -> Path:
    plan = make_plan(tiny_config, overrides={"model.embed_tokens.weight": "float32"})
    return write_random(tmp_path / "a", plan, ct.layout(plan, tiny_assets))


refusal = partial(refusal_of, open_build)


def configure(build: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = build / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_a_sound_build_is_opened_and_read_by_rows(build: Path) -> None:
    format, reader = open_build(build)
    assert format == "compressed-tensors"
    for name in (CONV, "model.embed_tokens.weight", "model.layers.2.feed_forward.expert_bias"):
        np.testing.assert_array_equal(reader.read(name, 2, 5), reader.read(name)[2:5])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_cache_scheme", {"num_bits": 8}),
        ("sparsity_config", {"format": "sparse-24"}),
        ("transform_config", {"config_groups": {"r1": {}}}),
        ("something_new", True),
    ],
)
def test_keys_that_engines_may_compute_with(build: Path, key: str, value: Any) -> None:
    configure(build, lambda c: c["quantization_config"].update({key: value}))
    assert f"'{key}' of quantization_config is" in refusal(build)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("weights", "actorder", "group"),
        ("weights", "dynamic", True),
        ("weights", "block_structure", [128, 128]),
        ("weights", "something_new", 1),
        ("", "something_new", 1),
    ],
)
def test_keys_of_a_group(build: Path, where: str, key: str, value: Any) -> None:
    def edit(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        (group[where] if where else group)[key] = value

    configure(build, edit)
    assert f"'{key}' of group_0 in config_groups is" in refusal(build)


@pytest.mark.parametrize("key", ["quantization", "compression_config"])
def test_another_quantization_beside_it(build: Path, key: str) -> None:
    configure(build, lambda c: c.update({key: {"bits": 4}}))
    assert key in refusal(build)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
        lambda t: t.update({f"{CONV}_g_idx": np.zeros(4, np.int32)}),
        lambda t: t.update({f"{CONV}_zero_point": np.zeros(4, np.int32)}),
        lambda t: t.update({CONV: np.zeros((384, 128), np.float16)}),
    ],
)
def test_tensors_that_the_model_does_not_have(build: Path, edit: Callable[[Any], Any]) -> None:
    path = build / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    weight_map = dict.fromkeys(tensors, path.name)
    (build / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "that the model does not have" in refusal(build)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*)*x$", r"(a+)+$", r"(?:a|a)*b", r"(.+.+)+y", r"((a{1,1000}){1,1000}){1,1000}",
        r".*.*.*.*.*x", r"(a)\1*", r"(?=.*x)", "(" * 5000 + ")" * 5000, "a" * 50_000,
    ],
)  # fmt: skip
def test_patterns_that_take_for_ever(build: Path, pattern: str) -> None:
    configure(build, lambda c: c["quantization_config"]["ignore"].append(f"re:{pattern}"))
    began = time.monotonic()
    assert "ignore has 're:" in refusal(build)
    assert time.monotonic() - began < 2


def test_the_patterns_of_every_plan_are_allowed(
    tiny_config: ModelConfig, make_plan: Callable[..., Plan]
) -> None:
    names = [e.name for e in make_plan(tiny_config).entries if e.expert is not None]
    rng = np.random.default_rng(0)
    schemes = (Scheme(4), Scheme(8), Scheme(4, 64), "float32")
    overrides = {name: schemes[rng.integers(4)] for name in names}
    block = quantization_config(make_plan(tiny_config, overrides=overrides))
    found = read_block({"quantization_config": block}, Path("config.json"))
    patterns = [t for g in found.groups for t in g.targets if t.startswith("re:")]
    assert len(patterns) > 5
    for pattern in patterns:
        re.compile(pattern[3:])
