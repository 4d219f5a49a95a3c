"""A run killed anywhere goes on and ends with the bytes of one never killed; or says why not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.jobs.execution import Execution, Step
from lfmq.converter.jobs.lock import lock_folder
from lfmq.converter.model.text import Windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.quantize.settings import Calibration, Settings
from lfmq.converter.run import resume_key as origin
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import CheckpointError, PlanError

CRASH = Path(__file__).parent / "runners" / "crash.py"
STEM = "lfm2moe-tiny-int4"


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(checkpoint, output, *formats, recipe=None, threads=2, progress=None, **options):
    """Convert; the lines of notice."""
    recipe = recipe or load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    chosen = {name: FORMATS[name] for name in formats or FORMATS}
    lines: list[str] = []
    execution = Execution(threads, progress=progress, notice=lines.append)
    convert(checkpoint, recipe, plan, chosen, output, execution=execution, **options)
    return lines


class StoppedError(Exception):
    pass


def stop_after(units):
    """A progress that ends the run after some units."""
    seen = []

    def progress(step):
        seen.append(step)
        if len(seen) == units:
            raise StoppedError

    return progress


def stopped(checkpoint, output, *formats, units=60, **options):
    with pytest.raises(StoppedError):
        run(checkpoint, output, *formats, progress=stop_after(units), **options)


@pytest.fixture(scope="module")
def sample(sample_folder) -> Checkpoint:
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def expected(sample, tmp_path_factory) -> dict[str, str]:
    """The builds of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("never-killed")
    run(sample, output)
    return content(output)


def lines_of(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.mark.parametrize("lines", np.random.default_rng(4).integers(2, 100, 2).tolist())
def test_the_command_killed_goes_on(sample, expected, tmp_path, lines):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "lfmq.cli", "convert", "sample", "--uncalibrated"]
    command += ["--output", str(output), "--threads", "1", "--quiet"]
    journal = output / f"{STEM}-onnx.part.journal"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and lines_of(journal) < lines:
            time.sleep(0.001)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(PlanError, match=r"out: another run is writing into this folder"):
            run(sample, output)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert lines_of(journal) >= lines
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["builds"]) == len(FORMATS)
    assert content(output) == expected


@pytest.mark.slow
def test_killed_before_any_call_that_changes_a_file(make_checkpoint, tmp_path):
    """Every call at the end, where builds and manifest get their names, and some of the others."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CRASH), str(make_checkpoint()), str(tmp_path / "runs"), "gguf,mlx"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    outcome = json.loads(done.stdout)
    assert outcome["different"] == []
    assert len(outcome["identical"]) >= 24
    # The manifest is there and the run over but for its exit: the next one finds it all in place.
    assert all(point >= outcome["calls"] - 4 for point in outcome["named"])


def test_finished_units_are_not_read_again(sample, count_reads, expected, tmp_path):
    counting, reads = count_reads(sample)
    stopped(counting, tmp_path)
    first = set(reads)
    reads.clear()
    seen: list[Step] = []
    lines = run(counting, tmp_path, progress=seen.append)
    assert len(first | set(reads)) == len(first) + len(reads) == len(sample.stored)
    done = [step.amounts[0].weights for step in seen]
    assert sum(done) == seen[0].amounts[1].weights
    assert len(lines) == 1
    finished, units = (int(w) for w in lines[0].split() if w.isdigit())
    assert finished >= 60
    assert lines == [f"going on: {finished} of {units} units are finished"]
    assert content(tmp_path) == expected


def test_another_choice_of_formats_goes_on_with_what_they_share(sample, expected, tmp_path):
    stopped(sample, tmp_path, "gguf", "mlx", units=50)
    (line,) = run(sample, tmp_path, "gguf", threads=1)
    assert line.startswith("going on: ")
    assert (tmp_path / f"{STEM}-mlx.part.journal").exists()
    assert run(sample, tmp_path, *(f for f in FORMATS if f != "gguf")) == []  # onnx has nothing
    assert content(tmp_path) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_part_is_repaired(sample, expected, tmp_path, threads):
    stopped(sample, tmp_path)
    part = tmp_path / f"{STEM}.gguf.part"
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 4)
        file.write(bytes(part.stat().st_size // 2))
    with (tmp_path / f"{STEM}-mlx.part.journal").open("ab") as journal:
        journal.write(b'{"unit": ["model.lay')
    lines = run(sample, tmp_path, threads=threads)
    assert any("did not reach the disk" in line for line in lines)
    assert content(tmp_path) == expected


def windows(seed: int = 1) -> Windows:
    ids = np.random.default_rng(seed).integers(8, 500, (2, 16))
    return Windows(ids, ("x", "x"), "0" * 64)


CHANGES = {
    "the recipe": lambda o: o | {"recipe": replace(load_recipe("int4"), text="# the same\n")},
    "the calibration": lambda o: o | {"calibration": Calibration(windows())},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_starts_over_and_says_what(make_checkpoint, tmp_path, what):
    checkpoint = open_checkpoint(make_checkpoint())
    stopped(checkpoint, tmp_path / "out", "gguf", units=20)
    options = CHANGES[what]({})
    assert run(checkpoint, tmp_path / "out", "gguf", **options) == [
        f"starting over: {what} changed"
    ]
    run(checkpoint, tmp_path / "new", "gguf", **CHANGES[what]({}))
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_another_version_starts_over(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(make_checkpoint())
    for name, words in (("lfmq", "lfmq's version"), ("numpy", "the version of a library")):
        stopped(checkpoint, tmp_path / name, "mlx", units=20)
        monkeypatch.setattr(
            "lfmq.converter.run.resume_key.version", lambda n, c=name: version(n) + "9" * (n == c)
        )
        lines = run(checkpoint, tmp_path / name, "mlx")
        assert lines == [f"starting over: {words} changed"]
        monkeypatch.undo()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_touched_input_starts_over(make_checkpoint, tmp_path, file):
    folder = make_checkpoint()
    stopped(open_checkpoint(folder), tmp_path / "out", "gguf", units=20)
    os.utime(folder / file, ns=(1, 1))
    lines = run(open_checkpoint(folder), tmp_path / "out", "gguf")
    assert lines == ["starting over: the checkpoint changed"]


def test_what_a_calibration_depends_on(sample):
    recipe = load_recipe("int4")
    plan = resolve_plan(sample.config, recipe)
    calibrations = [
        None,
        Calibration(windows()),
        Calibration(windows(2)),
        Calibration(windows(), Settings(sweeps=0)),
        Calibration(replace(windows(), text_sha256="1" * 64)),
    ]
    found = [origin.depends_on(sample, recipe, plan, c)["the calibration"] for c in calibrations]
    assert len(set(found)) == len(calibrations)
    cuda = origin.depends_on(sample, recipe, plan, calibrations[1], device="cuda")
    assert cuda["the calibration"] not in found


def test_a_calibrated_run_ends_with_the_same_bytes(make_checkpoint, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint())
    stopped(checkpoint, tmp_path / "out", calibration=Calibration(windows()), units=30)
    run(checkpoint, tmp_path / "out", calibration=Calibration(windows()))
    run(checkpoint, tmp_path / "new", calibration=Calibration(windows()))
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_an_input_that_changes_under_the_run(make_checkpoint, tmp_path):
    folder = make_checkpoint()

    def touch(step):
        os.utime(folder / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="a file changed while it was converted; run again"):
        run(open_checkpoint(folder), tmp_path / "out", "gguf", progress=touch)
    lines = run(open_checkpoint(folder), tmp_path / "out", "gguf")
    assert lines == ["starting over: the checkpoint changed"]


def test_a_read_error_is_one_line_and_the_next_run_goes_on(make_checkpoint, tmp_path, monkeypatch):
    folder, read, count = make_checkpoint(), os.preadv, []

    def fail(*arguments):
        count.append(1)
        if len(count) == 30:
            raise OSError(5, "Input/output error")
        return read(*arguments)

    failing = SimpleNamespace(**vars(os) | {"preadv": fail})
    monkeypatch.setattr("lfmq.formats.huggingface.safetensors_file.os", failing)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\)$"):
        run(open_checkpoint(folder), tmp_path / "out", threads=1)
    monkeypatch.undo()
    (line,) = run(open_checkpoint(folder), tmp_path / "out")
    assert line.startswith("going on: ")
    run(open_checkpoint(folder), tmp_path / "new")
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with lock_folder(out), pytest.raises(PlanError, match="another run"), lock_folder(out):
        pass
    assert not list(out.iterdir())
    (out / ".lfmq.lock").touch()  # of a run that was killed
    with lock_folder(out):
        pass
    assert not list(out.iterdir())
