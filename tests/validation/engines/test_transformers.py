"""compressed-tensors builds of the sample in transformers against the reference forward.

Everything but the experts is float32. The library rounds products of code and scale to float16,
and experts run in it, which moves 2 of 16,384 (token, layer) pairs to other experts with int4 and
1 with int8 (16 windows of 256); with the experts cast to float32 none of 8192.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines import transformers as native_transformers
from lfmq.validation.engines.child_process import native_version, run_native

modeling = pytest.importorskip("transformers.models.lfm2_moe.modeling_lfm2_moe")
pytest.importorskip("compressed_tensors")

FORMAT = "compressed-tensors"
MIXED = """
[[rule]]
bits = 4
[[rule]]
roles = ["experts"]
layers = 3
bits = 8
[[rule]]
roles = ["experts"]
layers = 4
experts = [0, 3]
bits = 8
[[rule]]
roles = ["expert_down"]
layers = 5
float = "bfloat16"
"""
# Measured 0.9997 and 3e-6 nats; one token that goes elsewhere is most of it.
CUMULATIVE = 0.998
LARGEST_KLD = 2e-4
MEDIAN_LOGIT = 5e-3
LOCAL = 0.999


@pytest.fixture(scope="module")
def ids(sample_ids: Callable[[int, int], NDArray[np.int64]]) -> Any:
    return sample_ids(3, 256)


@pytest.fixture(scope="module")
def int4(convert_sample: Callable[[str, str], Path]) -> Path:
    return convert_sample("int4", FORMAT)


@pytest.fixture(scope="module")
def expected_int4(int4: Path, expect: Any, ids: Any) -> Any:
    return expect(int4, FORMAT, ids)


@pytest.mark.parametrize("recipe", ["int4", MIXED], ids=["int4", "mixed"])
def test_routing_and_predictions(
    recipe: str, convert_sample: Callable[[str, str], Path], expect: Any, ids: Any
) -> None:
    expected = expect(convert_sample(recipe, FORMAT), FORMAT, ids)
    found = expected.compare(run_native(expected.request, FORMAT))
    assert found.exact_set >= CUMULATIVE
    assert found.kld <= LARGEST_KLD
    assert np.median(found.largest) <= MEDIAN_LOGIT
    assert expected.compare(run_native(expected.local, FORMAT)).exact_set >= LOCAL


def test_which_builds_are_dequantized_first(
    convert_sample: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, int4: Path
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(native_transformers, "_from_pretrained", lambda p, _: loaded.append(p))
    native_transformers._load(int4)
    assert loaded == [int4]
    mixed = convert_sample(MIXED, FORMAT)
    native_transformers._load(mixed)
    assert loaded[1].name == mixed.name
    assert not loaded[1].exists()


def test_version() -> None:
    assert native_version(FORMAT) == "transformers 5.23.0, compressed-tensors 0.20.0"


# ---- planted faults


def softmax_router(self: Any, states: Any, expert_bias: Any = None) -> Any:
    """What mlx-lm did until 0.32: softmax, and the bias in the weights."""
    logits = modeling.F.linear(states, self.weight)
    weights, chosen = (logits.softmax(-1) + expert_bias).topk(self.top_k, -1)
    return logits, weights / (weights.sum(-1, keepdim=True) + 1e-6), chosen


def biased_weights(self: Any, states: Any, expert_bias: Any = None) -> Any:
    """The right experts, mixed with the scores they were chosen by."""
    logits = modeling.F.linear(states, self.weight)
    weights, chosen = (logits.sigmoid() + expert_bias).topk(self.top_k, -1)
    return logits, weights / (weights.sum(-1, keepdim=True) + 1e-6), chosen


def test_biased_weights_show_in_predictions(
    expected_int4: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local routing cannot show them: the choice is right."""
    monkeypatch.setattr(modeling.Lfm2MoeTopKRouter, "forward", biased_weights)
    found = expected_int4.compare(native_transformers.run_windows(expected_int4.request))
    local = expected_int4.compare(native_transformers.run_windows(expected_int4.local))
    assert local.exact_set >= LOCAL
    assert found.kld > 10 * LARGEST_KLD  # measured 0.014
    assert found.exact_set < 0.98  # 0.959


def test_another_routing_rule_shows_in_local_routing(
    expected_int4: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling.Lfm2MoeTopKRouter, "forward", softmax_router)
    local = expected_int4.compare(native_transformers.run_windows(expected_int4.local))
    assert local.exact_set < 0.9  # measured 0.47


# ---- refusals


def edited(build: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with another config."""
    copy = folder / build.name
    shutil.copytree(build, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def failure(path: Path, expected: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        list(native_transformers.run_windows(replace(expected.request, path=path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_truncated_file(int4: Path, expected_int4: Any, tmp_path: Path) -> None:
    copy = edited(int4, tmp_path, lambda config: None)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    assert str(weights) in failure(copy, expected_int4)


def test_what_transformers_cannot_load(int4: Path, expected_int4: Any, tmp_path: Path) -> None:
    copy = edited(int4, tmp_path, lambda config: config.update(model_type="lfm2_mo"))
    assert failure(copy, expected_int4).startswith(str(copy))


def test_a_model_that_loads_in_part(int4: Path, expected_int4: Any, tmp_path: Path) -> None:
    """transformers would fill what it does not find with random numbers."""
    copy = edited(int4, tmp_path, lambda config: None)
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    name = b"model.layers.1.ffn_norm.weight"
    assert content.count(name) == 1
    weights.write_bytes(content.replace(name, name[:-1] + b"u"))
    message = failure(copy, expected_int4)
    assert f"tensor {name.decode()} is missing" in message
