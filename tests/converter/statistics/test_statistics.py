"""Statistics: what is counted, the file, merging, resuming, and refusing another checkpoint's."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.jobs.execution import Execution, Step
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.model.text import load_windows
from lfmq.converter.statistics.calibrate import calibrate, open_statistics
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import (
    MEASURED,
    SCHEMES,
    WHOLE,
    Statistics,
    has_losses,
    identity_of,
    load_statistics,
    part_of,
    save_statistics,
)
from lfmq.formats.plan import FLOAT_ROLES, Role, TensorPlan
from lfmq.quant import rtn
from lfmq.quant.errors import LfmqError, PlanError, ValidationError
from lfmq.quant.types import InputStats, Scheme, dequantize

SEQUENCE = 128


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


def windows_of(sample, tokens):
    path = sample_file("calibration.jsonl")
    return load_windows([path], sample.assets, sample.config, tokens=tokens, sequence=SEQUENCE)


@pytest.fixture(scope="module")
def windows(sample):
    return windows_of(sample, 2048)


@pytest.fixture(scope="module")
def gathered(sample, windows):
    return collect(sample, windows)


@pytest.fixture(scope="module")
def statistics(gathered) -> Statistics:
    return gathered[0]


def test_moments_are_those_of_a_plain_forward_pass(sample, windows, statistics):
    """The forward pass is held to transformers elsewhere; it shows the inputs of every weight."""
    seen: dict[str, list] = {}

    def observe(names, x, affinity):
        counts = torch.ones(len(x)) if affinity is None else affinity
        for name in names:
            seen.setdefault(name, []).append((counts.double() @ x.double().square(), counts))

    run_model(Model(sample.config, sample.read), windows.ids, observe=observe)
    assert len(seen) > 100
    for name, parts in seen.items():
        found = statistics.inputs[name]
        assert found.tokens == sum(len(counts) for _, counts in parts)
        assert found.mass == pytest.approx(
            sum(float(c.double().sum()) for _, c in parts), rel=1e-5
        )
        sums = sum(part for part, _ in parts).numpy()
        # other batches, so other orders of float32 sums in the matrix products before
        np.testing.assert_allclose(found.sums, sums, rtol=1e-3, atol=1e-6 * sums.max())


def test_every_expert_is_accounted_for(sample, windows, gathered):
    statistics, coverage = gathered
    g = sample.config
    assert len(coverage) == len(g.moe_layers) * g.num_experts
    for layer in g.moe_layers:
        tokens = [e.tokens for e in coverage if e.layer == layer]
        assert sum(tokens) == windows.tokens * g.num_experts_per_tok
        router = f"model.layers.{layer}.feed_forward.gate.weight"
        assert statistics.inputs[router].tokens == windows.tokens
    for expert in coverage:
        assert expert.error < expert.error_nearest
        assert expert.rule == ("own" if expert.tokens >= expert.quota else "shrunk")


def test_losses_and_sensitivities_make_sense(sample, statistics):
    weights = [t for t in expected_tensors(sample.config) if t.role not in FLOAT_ROLES]
    assert set(statistics.losses) == set(statistics.grids) == {t.name for t in weights}
    assert all(loss > 0 for loss in statistics.losses.values())
    parts = {part_of(t) for t in weights}
    assert set(statistics.parts) == {*parts, "head", *WHOLE}
    assert all(s.error > 0 < s.kld < 0.1 for s in statistics.parts.values())
    wide, narrow = (statistics.parts[name].kld for name in WHOLE)
    assert wide < narrow / 8
    # the weights of a part alone add up to what all of them do together, roughly
    for part in parts:
        alone = sum(statistics.losses[t.name] for t in weights if part_of(t) == part)
        assert alone / statistics.tokens == pytest.approx(statistics.parts[part].error, rel=0.35)


def test_a_dense_model(sample_dense_folder, tmp_path):
    dense = open_checkpoint(sample_dense_folder)
    statistics, coverage = collect(dense, windows_of(dense, 2048))
    assert coverage == []
    assert has_losses(statistics, dense.config)
    layers = {f"{layer}.{kind}" for layer in range(6) for kind in ("mixer", "dense")}
    assert set(statistics.parts) == {*layers, "embedding", "head", *WHOLE}
    assert all(s.error > 0 < s.kld < 0.1 for s in statistics.parts.values())
    save_statistics(tmp_path / "statistics", statistics)
    assert load_statistics(tmp_path / "statistics", dense.config).parts == statistics.parts
    # a matrix of llama.cpp knows the inputs of all that is multiplied, the head aside
    shapes = {t.name for t in expected_tensors(dense.config) if t.role not in FLOAT_ROLES}
    assert set(statistics.inputs) == shapes - {"model.embed_tokens.weight"}


def test_errors_of_grids_are_those_of_the_weights(sample, statistics):
    """As the quantizer makes them; more bits and smaller groups have less."""
    name = "model.layers.1.conv.in_proj.weight"
    w, h = sample.read(name), statistics.inputs[name].mean
    errors = dict(zip(SCHEMES, statistics.grids[name], strict=True))
    assert errors[MEASURED] == 1

    def error(scheme):
        change = dequantize(rtn.quantize(w, scheme, h.astype(np.float32))) - w
        return (change.astype(float) ** 2 * h).sum()

    for scheme, found in errors.items():
        assert found == pytest.approx(error(scheme) / error(MEASURED), rel=0.1)
    assert errors[Scheme(4, 64)] > 1 > errors[Scheme(4, 32, "affine_bias")] > errors[Scheme(8)]


@pytest.fixture(scope="module")
def short(short_sample_folder):
    return open_checkpoint(short_sample_folder)


@pytest.fixture(scope="module")
def short_statistics(short, windows) -> Statistics:
    return collect(short, windows, execution=Execution(threads=2))[0]


def test_threads_do_not_matter(short, windows, short_statistics, tmp_path):
    save_statistics(tmp_path / "a", short_statistics)
    save_statistics(tmp_path / "b", collect(short, windows, execution=Execution(threads=1))[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_round_trip(sample, statistics, tmp_path):
    path = tmp_path / "folder" / "s.safetensors"
    save_statistics(path, statistics)
    found = load_statistics(path, sample.config)
    assert found.losses == statistics.losses
    assert (found.grids, found.parts) == (statistics.grids, statistics.parts)
    assert (found.texts, found.tokens) == (statistics.texts, statistics.tokens)
    assert set(found.inputs) == set(statistics.inputs)
    for name, moments in statistics.inputs.items():
        assert (found.inputs[name].tokens, found.inputs[name].mass) == (
            moments.tokens, moments.mass,
        )  # fmt: skip
        np.testing.assert_array_equal(found.inputs[name].sums, moments.sums)
    with safe_open(path, "numpy") as file:  # as docs/statistics.md says, for any reader
        name = "model.layers.2.feed_forward.experts.0.w2.weight"
        assert file.get_tensor(f"{name}.sums").shape == (sample.config.moe_intermediate_size,)
        assert file.get_tensor(f"{name}.loss").tolist() == [statistics.losses[name]]


def test_a_file_with_the_names_that_grids_had_before(sample, statistics, tmp_path):
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    save_statistics(path, statistics)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].decode()
    for now, before in (("affine_bias", "affine"), ("kquant", "superblock")):
        assert now in header
        header = header.replace(now, before)
    header = header.replace("affine_zero_point", "asymmetric")
    header += " " * (-len(header) % 8)
    old.write_bytes(len(header).to_bytes(8, "little") + header.encode() + content[8 + size :])
    assert load_statistics(old, sample.config).grids == statistics.grids


def test_merging_halves_gives_the_whole(short, windows, short_statistics):
    half = len(windows.ids) // 2
    parts = [
        replace(windows, ids=windows.ids[rows], text_sha256=name)
        for name, rows in (("a", slice(0, half)), ("b", slice(half, None)))
    ]
    first, second = (collect(short, part)[0] for part in parts)
    merged = first.merge(second)
    assert merged.texts == ("a", "b")
    assert merged.tokens == short_statistics.tokens
    for name, found in short_statistics.inputs.items():
        assert merged.inputs[name].tokens == found.tokens
        np.testing.assert_allclose(merged.inputs[name].sums, found.sums, rtol=1e-3)
    with pytest.raises(ValidationError, match="count twice"):
        merged.merge(second)
    with pytest.raises(ValidationError, match="different checkpoints"):
        first.merge(replace(second, identity="other"))


def test_cold_experts_take_the_layers_importance():
    def entry(expert, role=Role.EXPERT_GATE, part="w1"):
        name = f"model.layers.2.feed_forward.experts.{expert}.{part}.weight"
        return TensorPlan(name, (4, 4), role, 2, expert, Scheme(4))

    warm = InputStats(1000, 500.0, np.array([500.0, 1000.0, 0.0, 0.0]))
    cold = InputStats(0, 0.0, np.zeros(4))
    few = InputStats(4, 2.0, np.array([0.0, 0.0, 2.0, 0.0]))
    inputs = {entry(i).name: m for i, m in enumerate((warm, cold, few))}
    inputs[entry(1, Role.EXPERT_DOWN, "w2").name] = cold
    statistics = Statistics("", (), 1004, inputs, {}, {}, {})

    def of(item):
        importance = statistics.importance(item)
        assert importance is not None
        assert importance.dtype == np.float32
        return importance / importance.sum()

    pooled = (warm.sums + few.sums) / 502
    damped = pooled + 0.01 * pooled.mean()
    np.testing.assert_allclose(of(entry(1)), damped / damped.sum(), rtol=1e-4)
    np.testing.assert_allclose(of(entry(1, Role.EXPERT_DOWN, "w2")), 0.25)
    # half of its quota of 8 tokens: half its own, half the layer's
    mixed = few.sums / 4 + pooled / 2
    mixed += 0.01 * mixed.mean()
    np.testing.assert_allclose(of(entry(2)), mixed / mixed.sum(), rtol=1e-4)
    assert statistics.importance(entry(9)) is None


def test_statistics_of_another_checkpoint(sample, statistics, tmp_path):
    path = tmp_path / "s"
    save_statistics(path, statistics)
    other = replace(sample.config, norm_eps=2e-5)
    assert identity_of(other) != statistics.identity
    with pytest.raises(ValidationError, match="statistics of another checkpoint"):
        load_statistics(path, other)


@pytest.mark.parametrize("length", [0, 4, 100, 100_000, -8])
def test_truncated_file(sample, statistics, tmp_path, length):
    path = tmp_path / "s"
    save_statistics(path, statistics)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValidationError, match="damaged or not a statistics file"):
        open_statistics(path, sample.config)


def test_not_a_statistics_file(sample, tmp_path):
    with pytest.raises(ValidationError, match="cannot be read"):
        open_statistics(tmp_path / "none", sample.config)
    with pytest.raises(ValidationError, match="not a statistics file of lfmq"):
        open_statistics(sample.folder / "model.safetensors", sample.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, sums=m.sums[:-1]), r"sums is float64 \[255\], expected float64"),
        (lambda m: replace(m, sums=m.sums * np.nan), "negative or not finite"),
        (lambda m: replace(m, mass=-1.0), "negative or not finite"),
    ],
)
def test_damaged_values(sample, statistics, tmp_path, change, message):
    name = "model.layers.0.conv.in_proj.weight"
    inputs = dict(statistics.inputs) | {name: change(statistics.inputs[name])}
    save_statistics(tmp_path / "s", replace(statistics, inputs=inputs))
    with pytest.raises(ValidationError, match=message):
        load_statistics(tmp_path / "s", sample.config)


def test_an_existing_file_stays(sample, windows, tmp_path):
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(PlanError, match="already exists"):
        calibrate(sample, windows, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("model.layers.2.ffn_norm.weight", 1e25, r"layer 2, expert \d+ are not finite"),
        (
            "model.layers.2.feed_forward.experts.1.w2.weight",
            1e9,
            r"experts\.1\.w2.* beyond float16",
        ),
        ("model.layers.0.operator_norm.weight", np.nan, "layer 0: .* not finite"),
    ],
)
def test_activations_that_are_not_finite(make_checkpoint, tmp_path, tensor, value, message):
    """Which layer and which expert, and nothing left under the final name."""
    checkpoint = open_checkpoint(make_checkpoint(change=lambda t: t[tensor].fill(value)))
    windows = windows_of(checkpoint, 512)
    with pytest.raises(LfmqError, match=message):
        calibrate(checkpoint, windows, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_killed_run_goes_on(short, tmp_path):
    """SIGKILL after the second layer; the rest is done from there and gives the same bytes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [
        sys.executable, "-m", "lfmq.cli", "calibrate", str(short.folder), "--quiet",
        "--tokens", "512", "--sequence", str(SEQUENCE), "--threads", "1", "--output",
    ]  # fmt: skip
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    state = tmp_path / "killed.resume"
    with subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL) as run:
        while not _layer_saved(state) >= 2:
            assert run.poll() is None
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
    assert not killed.exists()
    resumed: list[Step] = []
    windows = windows_of(short, 512)
    calibrate(short, windows, killed, execution=Execution(progress=resumed.append))
    assert not state.exists()
    assert killed.read_bytes() == whole.read_bytes()


def _layer_saved(state) -> int:
    try:
        with safe_open(state, "numpy") as file:
            return json.loads(file.metadata()["state"])["layer"]
    except OSError:
        return 0


def test_names_are_those_of_the_model(sample, statistics):
    assert set(statistics.inputs) <= {t.name for t in expected_tensors(sample.config)}


def test_an_importance_matrix_and_back(short, windows, tmp_path):
    """Means survive; what an importance matrix does not hold is not there."""
    path, matrix = tmp_path / "s", tmp_path / "m.gguf"
    found, _ = calibrate(short, windows, path, imatrix=matrix)
    imported = open_statistics(matrix, short.config)
    assert set(imported.inputs) == set(found.inputs)
    for name, moments in found.inputs.items():
        assert imported.inputs[name].tokens == moments.tokens
        np.testing.assert_allclose(imported.inputs[name].mean, moments.mean, rtol=1e-6)
    assert imported.tokens == found.tokens
    assert (imported.losses, imported.grids, imported.parts) == ({}, {}, {})
    with pytest.raises(PlanError, match=r"m\.gguf: already exists"):
        calibrate(short, windows, tmp_path / "t", imatrix=matrix)


def test_an_importance_matrix_in_the_old_format(sample, tmp_path):
    path = tmp_path / "imatrix.dat"
    name = b"blk.0.ffn_down.weight"
    path.write_bytes(np.array([84, len(name)], "<i4").tobytes() + name + bytes(100))
    with pytest.raises(ValidationError, match="--output-format gguf"):
        open_statistics(path, sample.config)
