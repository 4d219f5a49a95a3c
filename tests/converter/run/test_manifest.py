"""The manifest speaks of every build of one origin, and of nothing that is not there."""

import json
import shutil

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.converter.run.verify import verify_build
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import PlanError, ValidationError


def run(folder, output, *formats, **options):
    checkpoint, recipe = open_checkpoint(folder), load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    chosen = {name: FORMATS[name] for name in formats}
    made = convert(checkpoint, recipe, plan, chosen, output, **options)
    return {b.format: b.path for b in made.builds}


def manifest_of(output):
    (path,) = output.glob("*.manifest.json")
    return path


def test_formats_one_after_another_equal_formats_together(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    together = run(folder, tmp_path / "a", *FORMATS)
    for name in reversed([*FORMATS]):
        run(folder, tmp_path / "b", name)
    a, b = manifest_of(tmp_path / "a"), manifest_of(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()
    for path in together.values():
        assert verify_build(tmp_path / "b" / path.name) == b


def test_a_build_that_was_removed_is_forgotten(make_checkpoint, tmp_path):
    folder, output = make_checkpoint(), tmp_path / "out"
    builds = run(folder, output, "gguf", "mlx")
    shutil.rmtree(builds["mlx"])
    run(folder, output, "onnx")
    assert list(json.loads(manifest_of(output).read_text())["builds"]) == ["gguf", "onnx"]


def test_a_build_of_another_checkpoint_is_forgotten(make_checkpoint, tmp_path):
    folder, output = make_checkpoint(), tmp_path / "out"
    builds = run(folder, output, "gguf")
    (folder / "generation_config.json").write_text("{}")
    run(folder, output, "mlx")
    with pytest.raises(ValidationError, match="no manifest beside it names this build"):
        verify_build(builds["gguf"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"builds": 3}', "[" * 100_000])
def test_an_earlier_file_that_is_no_manifest_is_replaced(make_checkpoint, tmp_path, text):
    folder, output = make_checkpoint(), tmp_path / "out"
    output.mkdir()
    (output / "small-int4.manifest.json").write_text(text)
    verify_build(run(folder, output, "mlx")["mlx"])


def test_inputs_are_all_files_that_count(make_checkpoint, tmp_path):
    folder = make_checkpoint(shards=2)
    run(folder, tmp_path / "out", "mlx")
    found = set(json.loads(manifest_of(tmp_path / "out").read_text())["inputs"])
    assert found == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("builds"),
        lambda m: m["builds"]["mlx"].pop("path"),
        lambda m: m["builds"]["mlx"].update(files=[1]),
        lambda m: m["builds"]["mlx"]["files"].update(x=3),
        lambda m: m["builds"]["mlx"]["files"].update(x={"bytes": 1}),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(make_checkpoint, tmp_path, change):
    build = run(make_checkpoint(), tmp_path / "out", "mlx")["mlx"]
    path = manifest_of(tmp_path / "out")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValidationError, match="not a readable manifest"):
        verify_build(build)


def test_nothing_gets_its_name_when_the_manifest_cannot_be_written(make_checkpoint, tmp_path):
    folder, output = make_checkpoint(), tmp_path / "out"
    builds = run(folder, output, "gguf", "mlx")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    stamps = {p: p.stat().st_ino for p in before}
    (output / "small-int4.manifest.json.part").mkdir()
    with pytest.raises(PlanError, match=r"manifest\.json: cannot be written"):
        run(folder, output, "gguf", "mlx", force=True)
    (output / "small-int4.manifest.json.part").rmdir()
    assert {p: p.stat().st_ino for p in before} == stamps
    for path in builds.values():
        verify_build(path)
