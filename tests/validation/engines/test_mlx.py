"""MLX builds of the sample in mlx-lm against the same weights in the reference forward.

On a CPU whole windows run in float32: 16 windows of 256 tokens send all 16,384 (token, layer)
pairs to the reference's experts, with a mean KLD of 2e-12 nats, int4 and int8 alike. Routers that
are given their inputs get them in float16, as the layer before would: 3 pairs (int4) and 4 (int8)
go elsewhere.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lfmq.validation.engines import mlx as native_mlx
from lfmq.validation.engines.child_process import native_version, run_native

mx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx_lm.utils")
lfm2_moe = pytest.importorskip("mlx_lm.models.lfm2_moe")

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
float = "float16"
"""
# Sums in another order: measured 2e-5. Means of KL divergences have float32's noise, 1e-8 nats.
LARGEST_LOGIT = 1e-3
LARGEST_KLD = 1e-7
LOCAL = 0.999
# MLX's CPU kernels add products up in the file's own float16: measured 0.996 and 7e-4 nats on 192
# tokens, the few of the test are a fifteenth of that, at 0.3 seconds each.
CUMULATIVE_FLOAT16 = 0.98
KLD_FLOAT16 = 0.01


@pytest.fixture(scope="module")
def ids(sample_ids: Callable[[int, int], NDArray[np.int64]]) -> Any:
    return sample_ids(2, 96)


@pytest.fixture(scope="module")
def int4(convert_sample: Callable[[str, str], Path]) -> Path:
    return convert_sample("int4", "mlx")


@pytest.fixture(scope="module")
def expected_int4(int4: Path, expect: Any, ids: Any) -> Any:
    return expect(int4, "mlx", ids)


@pytest.mark.parametrize("recipe", ["int4", "int8", MIXED], ids=["int4", "int8", "mixed"])
def test_routing_and_predictions(
    recipe: str, convert_sample: Callable[[str, str], Path], expect: Any, ids: Any
) -> None:
    expected = expect(convert_sample(recipe, "mlx"), "mlx", ids)
    found = expected.compare(run_native(expected.request, "mlx"))
    assert found.exact_set == 1
    assert found.kld <= LARGEST_KLD
    assert found.largest.max() <= LARGEST_LOGIT
    assert expected.compare(run_native(expected.local, "mlx")).exact_set >= LOCAL


def test_the_taps_change_nothing(int4: Path, expected_int4: Any) -> None:
    model, _ = utils.load_model(int4)
    model.set_dtype(mx.float32)
    request = replace(expected_int4.request, ids=expected_int4.request.ids[:1])
    (run,) = native_mlx.run_windows(request)
    logits = np.array(model(mx.array(request.ids))[0, request.scored])
    np.testing.assert_array_equal(run.logits, logits)


def test_given_inputs_are_what_the_router_reads(expected_int4: Any) -> None:
    """Inputs of other tokens give the experts of other tokens."""
    inputs = {k: x[:, ::-1].copy() for k, x in expected_int4.local.router_inputs.items()}
    selected = {k: chosen[:, ::-1] for k, chosen in expected_int4.selected.items()}
    runs = native_mlx.run_windows(replace(expected_int4.local, router_inputs=inputs))
    assert replace(expected_int4, selected=selected).compare(runs).exact_set >= LOCAL


def test_in_the_type_of_the_file(
    int4: Path, expect: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing is widened."""
    monkeypatch.setattr(lfm2_moe.Model, "set_dtype", lambda self, dtype: None)
    expected = expect(int4, "mlx", ids[:1, :16])
    found = expected.compare(native_mlx.run_windows(expected.request))
    assert found.exact_set >= CUMULATIVE_FLOAT16
    assert found.kld <= KLD_FLOAT16


def test_version() -> None:
    assert native_version("mlx") == "mlx-lm 0.32.2, mlx 0.32.4"


# ---- planted faults


def mix(block: Any, x: Any, scores: Any) -> Any:
    """The largest scores choose the experts, and are the weights they are mixed with."""
    chosen = mx.argpartition(scores, kth=-block.top_k, axis=-1)[..., -block.top_k :]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = (weights / (weights.sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)
    return (block.switch_mlp(x, chosen) * weights[..., None]).sum(-2)


def softmax_router(self: Any, x: Any) -> Any:
    """The rule of mlx-lm until 0.31.3: softmax, and the bias in the weights."""
    return mix(self, x, mx.softmax(self.gate(x).astype(mx.float32), axis=-1) + self.expert_bias)


def biased_weights(self: Any, x: Any) -> Any:
    """The right experts, mixed with the scores they were chosen by."""
    return mix(self, x, mx.sigmoid(self.gate(x)).astype(mx.float32) + self.expert_bias)


# What each does to local routing (at most) and the mean KLD (at least); measured MEASURED.
@pytest.mark.parametrize(
    ("rule", "local", "cumulative", "kld"),
    [(softmax_router, 0.6, 0.6, 0.01), (biased_weights, 1, 0.98, 1e-3)],
)
def test_a_wrong_routing_rule_shows(
    rule: Callable[[Any, Any], Any],
    local: float,
    cumulative: float,
    kld: float,
    expected_int4: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lfm2_moe.Lfm2MoeSparseMoeBlock, "__call__", rule)
    given = expected_int4.compare(native_mlx.run_windows(expected_int4.local))
    found = expected_int4.compare(native_mlx.run_windows(expected_int4.request))
    assert given.exact_set <= local
    assert found.exact_set <= cumulative
    assert found.kld >= kld


def test_swapped_experts_show(int4: Path, expected_int4: Any, tmp_path: Path) -> None:
    """Neighbours of layer 3 change places; the router does not know."""
    faulty = tmp_path / "faulty"
    shutil.copytree(int4, faulty)
    tensors = load_file(faulty / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.layers.3.feed_forward.switch_mlp."):
            pairs = tensor.reshape(8, 2, *tensor.shape[1:])[:, ::-1]
            tensors[name] = np.ascontiguousarray(pairs.reshape(tensor.shape))
    save_file(tensors, faulty / "model.safetensors", {"format": "mlx"})
    found = expected_int4.compare(run_native(replace(expected_int4.request, path=faulty), "mlx"))
    local = expected_int4.compare(run_native(replace(expected_int4.local, path=faulty), "mlx"))
    assert local.exact_set >= LOCAL
    assert found.exact_set < 0.95
    assert found.kld > 0.01
