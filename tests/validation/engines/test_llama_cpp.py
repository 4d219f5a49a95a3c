"""GGUF builds of the sample in llama.cpp against the same weights in the reference forward.

Where weights are quantized llama.cpp rounds activations to blocks of 8 bits, which moves 1.7 % of
(token, layer) pairs to other experts on the sample (int4 and int8 alike, 16 windows of 256); with
float32 weights it rounds keys and values alone, and 2 of 16,384 pairs move. Given its inputs, the
router always chose the same experts.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines import llama_cpp as native_llama_cpp
from lfmq.validation.engines import llama_cpp_abi as llama_cpp
from lfmq.validation.engines.child_process import native_version, run_native

pytest.importorskip("xllamacpp")

FLOAT32 = '[[rule]]\nfloat = "float32"'
# Smallest share of pairs with the same experts, largest mean KLD (nats). Measured 0.9999 and
# 9e-6, 0.983 and 1.5e-3, 0.983 and 1.7e-3.
CUMULATIVE = {FLOAT32: (0.999, 1e-4), "int4": (0.97, 3e-3), "int8": (0.97, 3e-3)}
LOCAL = 0.999

SampleIds = Callable[[int, int], NDArray[np.int64]]


@pytest.fixture(scope="module")
def int4(convert_sample: Callable[[str, str], Path]) -> Path:
    return convert_sample("int4", "gguf")


@pytest.fixture(scope="module")
def float32(convert_sample: Callable[[str, str], Path]) -> Path:
    return convert_sample(FLOAT32, "gguf")


@pytest.fixture(scope="module")
def expected_int4(int4: Path, expect: Any, sample_ids: SampleIds) -> Any:
    return expect(int4, "gguf", sample_ids(4, 256))


@pytest.mark.parametrize("recipe", list(CUMULATIVE), ids=["float32", "int4", "int8"])
def test_routing_and_predictions(
    recipe: str, convert_sample: Callable[[str, str], Path], expect: Any, sample_ids: SampleIds
) -> None:
    expected = expect(convert_sample(recipe, "gguf"), "gguf", sample_ids(4, 256))
    found = expected.compare(run_native(expected.request, "gguf"))
    exact_set, kld = CUMULATIVE[recipe]
    assert found.exact_set >= exact_set
    assert found.kld <= kld
    assert expected.compare(run_native(expected.local, "gguf")).exact_set >= LOCAL


@pytest.mark.parametrize("length", [7, 600])
def test_windows_of_any_length(
    length: int, float32: Path, expect: Any, sample_ids: SampleIds
) -> None:
    """Longer than what llama.cpp takes at once; a window does not see the one before."""
    ids = np.repeat(sample_ids(1, length), 2, axis=0)
    expected = expect(float32, "gguf", ids)
    first, second = run_native(expected.request, "gguf")
    np.testing.assert_array_equal(first.logits, second.logits)
    found = expected.compare((first, second))
    assert found.exact_set >= 0.999
    assert np.median(found.largest) < 0.01
    assert expected.compare(run_native(expected.local, "gguf")).exact_set >= LOCAL


def test_given_inputs_are_what_the_router_reads(expected_int4: Any) -> None:
    """Inputs of other tokens give the experts of other tokens."""
    inputs = {k: x[:, ::-1] for k, x in expected_int4.local.router_inputs.items()}
    selected = {k: chosen[:, ::-1] for k, chosen in expected_int4.selected.items()}
    swapped = replace(expected_int4, selected=selected)
    runs = run_native(replace(expected_int4.local, router_inputs=inputs), "gguf")
    assert swapped.compare(runs).exact_set >= LOCAL


def test_version() -> None:
    assert native_version("gguf") == "llama.cpp 0.6.0-dev (xllamacpp 2026.10.11549)"


# ---- planted faults


def without_rope_base(path: Path) -> None:
    """llama.cpp falls back to 10,000 without a word."""
    content = path.read_bytes()
    key = b"lfm2moe.rope.freq_base"
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, b"lfm2mo_" + key[7:]))


def swap_experts(path: Path) -> None:
    """Neighbours of layer 3 change places; the router does not know."""
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    content = np.fromfile(path, np.uint8)
    for part in ("gate", "up", "down"):
        t = tensors[f"blk.3.ffn_{part}_exps.weight"]
        experts = content[t.data_offset : t.data_offset + t.n_bytes].reshape(8, 2, -1)
        experts[:] = experts[:, ::-1].copy()
    content.tofile(path)


@pytest.mark.parametrize("plant", [without_rope_base, swap_experts], ids=lambda f: f.__name__)
def test_a_planted_fault_shows(
    plant: Callable[[Path], None], int4: Path, expected_int4: Any, tmp_path: Path
) -> None:
    path = tmp_path / "faulty.gguf"
    shutil.copy(int4, path)
    plant(path)
    found = expected_int4.compare(run_native(replace(expected_int4.request, path=path), "gguf"))
    assert found.kld > 10 * CUMULATIVE["int4"][1]  # measured 0.30 and 0.09
    assert found.exact_set < CUMULATIVE["int4"][0] - 0.05  # 0.67 and 0.86


# ---- refusals


def failure(run: Callable[[], object]) -> str:
    with pytest.raises(ValidationError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_build_that_does_not_load(int4: Path, expected_int4: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(int4.read_bytes()[:5_000_000])
    message = failure(lambda: list(run_native(replace(expected_int4.request, path=path), "gguf")))
    assert message.startswith(f"{path}: llama.cpp does not load it: ")
    assert "not within the file bounds" in message


def test_a_token_outside_the_vocabulary(expected_int4: Any) -> None:
    request = replace(expected_int4.request, ids=np.full((1, 16), 8192))
    message = failure(lambda: list(run_native(request, "gguf")))
    assert "invalid token[0] = 8192" in message


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, expected_int4: Any) -> None:
    monkeypatch.setattr(llama_cpp, "version", lambda _: "2026.11.1")
    for run in (
        native_llama_cpp.version,
        lambda: list(native_llama_cpp.run_windows(expected_int4.request)),
    ):
        message = failure(run)
        assert message.startswith("xllamacpp 2026.11.1 is installed")
        assert "pip install 'lfmq[llama-cpp]'" in message


def test_no_release_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(llama_cpp, "version", version)
    with pytest.raises(ImportError):
        native_llama_cpp.version()


@pytest.mark.parametrize(
    ("module", "name", "value", "expected"),
    [
        # as if another field had come before
        (
            llama_cpp,
            "_CONTEXT",
            (("n_ctx", None, 0), *llama_cpp._CONTEXT[1:]),
            "llama_context_params",
        ),
        (native_llama_cpp, "_TOPK", "ffn_moe_weights", "ggml_tensor"),
        (native_llama_cpp, "_TOPK", "ffn_moe_choice", "graph"),
        (native_llama_cpp, "_NORMED", "ffn_norm", "router input"),
        (native_llama_cpp, "_NORMED", "l_out", "router input"),
    ],
)
def test_another_layout_is_an_error(
    module: Any,
    name: str,
    value: object,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    expected_int4: Any,
) -> None:
    monkeypatch.setattr(module, name, value)
    message = failure(lambda: list(native_llama_cpp.run_windows(expected_int4.local)))
    assert message.startswith(f"llama.cpp's {expected} is not what lfmq knows")
