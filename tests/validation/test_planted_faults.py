"""Every fault that runtimes and builds had is caught by the gate: exit status 3 and the figure.

One command, ``pytest tests/validation/test_planted_faults.py -s``, prints what was missed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lfmq.cli import main
from lfmq.tests.validation.engines import test_llama_cpp as gguf
from lfmq.tests.validation.engines import test_onnx as onnx
from lfmq.validation.engines import child_process as native

LIMITS = """
[limits]
max_kld = 0.01
min_local_routing = 0.999
max_routing_below_read = 0.02
"""


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``lfmq validate`` in both engines; its exit status and what was missed, by figure."""
    limits = tmp_path / "limits.toml"
    limits.write_text(LIMITS)

    def run(build: Path, checkpoint: Path | str = "sample") -> dict[str, Any]:
        words: list[Any] = ["validate", checkpoint, build]
        words += ["--engine", "read", "--engine", "native"]
        tokens = 512 if build.name.endswith("-mlx") else 2048  # MLX has no fast path on a CPU
        words += [
            "--tokens",
            tokens,
            "--sequence",
            256,
            "--thresholds",
            limits,
            "--json",
            "--quiet",
        ]
        words += ["--allow-other"]  # what is exchanged is measured, not refused
        result = CliRunner().invoke(main, [str(w) for w in words])
        failures = json.loads(result.stdout)["failures"]
        for f in failures:
            line = f"{f['engine']}: {f['figure']} is {f['found']}, limit {f['limit']}: {f['why']}"
            print(line)  # noqa: T201 - shown with -s
        figures = {(f["engine"], f["figure"]): f["found"] for f in failures}
        return {"exit": result.exit_code, "figures": figures}

    return run


@pytest.fixture
def planted(
    convert_sample: Callable[[str, str], Path], tmp_path: Path
) -> Callable[[str, Callable[[Path], None]], Path]:
    """A copy of the sample's int4 build with a fault in it."""

    def make(format: str, plant: Callable[[Path], None]) -> Path:
        sound = convert_sample("int4", format)
        faulty = tmp_path / f"faulty{sound.suffix}"
        (shutil.copytree if sound.is_dir() else shutil.copy)(sound, faulty)
        plant(faulty)
        return faulty

    return make


@pytest.mark.parametrize("format", sorted(native.NATIVE))
def test_a_sound_build_passes(
    format: str, gate: Callable[..., Any], convert_sample: Callable[[str, str], Path]
) -> None:
    assert gate(convert_sample("int4", format)) == {"exit": 0, "figures": {}}


@pytest.mark.parametrize("rule", ["softmax_router", "biased_weights"])
def test_a_wrong_rule_of_mlx_lm(
    rule: str,
    gate: Callable[..., Any],
    convert_sample: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(native.NATIVE, "mlx", f"lfmq.tests.runners.mlx_{rule}")
    found = gate(convert_sample("int4", "mlx"))
    assert found["exit"] == 3
    assert {engine for engine, _ in found["figures"]} == {"mlx-lm"}
    local = found["figures"].get(("mlx-lm", "routing.local_exact_set"))
    assert (local is not None and local < 0.6) if rule == "softmax_router" else local is None
    assert found["figures"]["mlx-lm", "kld.mean"] > 0.01


@pytest.mark.parametrize(
    ("format", "plant", "engines"),
    [
        ("gguf", gguf.without_rope_base, {"llama.cpp"}),
        ("gguf", gguf.swap_experts, {"read", "llama.cpp"}),
        ("onnx", onnx.experts_of_another_order, {"read", "onnxruntime"}),
        ("onnx", onnx.rows_in_two_halves, {"onnxruntime"}),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_wrong_build(
    format: str,
    plant: Callable[[Path], None],
    engines: set[str],
    gate: Callable[..., Any],
    planted: Callable[..., Path],
) -> None:
    found = gate(planted(format, plant))
    assert found["exit"] == 3
    assert engines <= {engine for engine, figure in found["figures"] if figure == "kld.mean"}


@pytest.mark.parametrize(
    ("format", "plant", "reason"),
    [
        ("gguf", gguf.swap_experts, "not a build of this checkpoint"),
        ("onnx", onnx.experts_of_another_order, "not a build of this checkpoint"),
        ("onnx", onnx.rows_in_two_halves, "not a build of this checkpoint"),
        ("onnx", onnx.softmax_router, "op_type Softmax, expected Sigmoid"),
        ("onnx", onnx.biased_weights, "has input"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_wrong_build_is_refused_before_it_runs(
    format: str, plant: Callable[[Path], None], reason: str, planted: Callable[..., Path]
) -> None:
    build = planted(format, plant)
    result = CliRunner().invoke(main, ["validate", "sample", str(build), "--quiet"])
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("fault", ["bos", "tokens"])
def test_another_tokenizer_or_start_of_text(
    fault: str,
    gate: Callable[..., Any],
    convert_sample: Callable[[str, str], Path],
    sample_folder: Path,
    tmp_path: Path,
) -> None:
    """The build is sound and of a checkpoint that differs in nothing else."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(sample_folder, checkpoint)
    if fault == "bos":
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}))
    else:
        text = (checkpoint / "tokenizer.json").read_text("utf-8")
        document = json.loads(text)
        vocabulary = document["model"]["vocab"]
        a, b = sorted(vocabulary, key=vocabulary.__getitem__)[4000:4002]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        (checkpoint / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    found = gate(convert_sample("int4", "gguf"), checkpoint)
    assert found["exit"] == 3
    expected = "bos_token_id" if fault == "bos" else "tokenizer.ggml.tokens"
    assert any(expected in figure for _, figure in found["figures"])
