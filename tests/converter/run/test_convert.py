"""One pass, many builds: the bytes depend on the checkpoint and the recipe, on nothing else."""

import json

import pytest

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.jobs.execution import Execution, Step
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.converter.run.verify import verify_build
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import PlanError, ValidationError


@pytest.fixture(scope="module")
def sample(sample_folder) -> Checkpoint:
    return open_checkpoint(sample_folder)


def run(checkpoint, output, *formats, recipe="int4", force=False, **execution):
    loaded = load_recipe(recipe)
    plan = resolve_plan(checkpoint.config, loaded)
    chosen = {name: FORMATS[name] for name in formats or FORMATS}
    running = Execution(**execution)
    return convert(checkpoint, loaded, plan, chosen, output, force=force, execution=running).builds


def content(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_bytes_do_not_depend_on_threads_or_company(sample, tmp_path):
    run(sample, tmp_path / "a", threads=1)
    run(sample, tmp_path / "b", threads=4)
    together = content(tmp_path / "a")
    assert together == content(tmp_path / "b")
    for name in reversed([*FORMATS]):
        run(sample, tmp_path / name, name, threads=3)
        alone = content(tmp_path / name)
        manifest = json.loads(alone.pop("lfm2moe-tiny-int4.manifest.json"))
        assert list(manifest["builds"]) == [name]
        assert alone.items() <= together.items()


def test_a_tensor_is_read_once_for_all_formats(sample, count_reads, tmp_path):
    counting, reads = count_reads(sample)
    run(counting, tmp_path)
    assert sorted(reads) == sorted(sample.stored)


def test_progress_reaches_the_number_of_weights(sample, tmp_path):
    steps: list[Step] = []
    run(sample, tmp_path, "gguf", progress=steps.append)
    assert {step.phase for step in steps} == {"quantizing"}
    assert sum(step.done for step in steps) == steps[-1].total
    seen = [step.amounts for step in steps]
    total = seen[-1][1]
    assert sum(step.weights for step, _ in seen) == total.weights == 16_865_728
    assert sum(step.read for step, _ in seen) == total.read
    assert sum(step.written for step, _ in seen) == total.written
    assert total.layers == max(step.layers for step, _ in seen) == 6
    stored = sum(t.nbytes for t in sample.stored.values())
    assert total.read == stored


def test_force_replaces_and_leaves_nothing_else(sample, tmp_path):
    run(sample, tmp_path)
    before = content(tmp_path)
    with pytest.raises(PlanError, match="already exists"):
        run(sample, tmp_path)
    run(sample, tmp_path, force=True)
    assert content(tmp_path) == before


def test_verify_names_the_first_file_that_differs(sample, tmp_path):
    builds = {b.format: b.path for b in run(sample, tmp_path)}
    for path in builds.values():
        assert verify_build(path).name == "lfm2moe-tiny-int4.manifest.json"
    shard = builds["mlx"] / "model.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    last = r"; the first tensor that differs is model\.layers\.5\.[a-z0-9_.]+, at byte [0-9,]+$"
    with pytest.raises(ValidationError, match=r"mlx/model\.safetensors: sha256 differs.*" + last):
        verify_build(builds["mlx"])
    damaged[0] ^= 1
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValidationError, match=r"differs.*; no tensor differs, what lies before"):
        verify_build(builds["mlx"])
    shard.write_bytes(damaged[:-1])
    with pytest.raises(ValidationError, match=r"bytes, .*manifest\.json says [0-9,]+" + last):
        verify_build(builds["mlx"])
    shard.unlink()
    with pytest.raises(ValidationError, match="missing"):
        verify_build(builds["mlx"])
    (builds["onnx"] / "extra.txt").write_text("x")
    with pytest.raises(ValidationError, match=r"extra\.txt: not named"):
        verify_build(builds["onnx"])
    verify_build(builds["gguf"])


def test_the_manifest_holds_no_time_and_no_place(sample, tmp_path):
    run(sample, tmp_path, "gguf")
    text = (tmp_path / "lfm2moe-tiny-int4.manifest.json").read_text()
    assert str(tmp_path) not in text
    manifest = json.loads(text)
    assert set(manifest["inputs"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert manifest["recipe"]["name"] == "int4"
    assert len(manifest["plan"]) == 244
