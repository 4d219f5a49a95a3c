"""Intact is a build whose every file was hashed and opened, by a manifest that is its own."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.converter.run.verify import inputs_of, verify_build
from lfmq.formats.registry import FORMATS
from lfmq.tests.refusals import refusal_of

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(params=["gguf", "mlx"])
def build(request: pytest.FixtureRequest, make_checkpoint: Any, tmp_path: Path) -> Path:
    checkpoint, recipe = open_checkpoint(make_checkpoint()), load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    formats = {request.param: FORMATS[request.param]}
    (made,) = convert(checkpoint, recipe, plan, formats, tmp_path / "out").builds
    assert verify_build(made.path) == manifest(made.path)
    return made.path


def manifest(build: Path) -> Path:
    (path,) = build.parent.glob("*.manifest.json")
    return path


def edit(build: Path, change: Edit) -> None:
    path = manifest(build)
    document = json.loads(path.read_text())
    (entry,) = document["builds"].values()
    change(entry)
    path.write_text(json.dumps(document))


refusal = partial(refusal_of, verify_build)


def first(entry: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = next(f for f in entry["files"].values() if f.get("pieces"))
    return fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(files={}), "it names no file"),
        (lambda e: e["files"].update({"/etc/passwd": first(e)}), "'/etc/passwd', which is no"),
        (lambda e: e["files"].update({"../x": first(e)}), "'../x', which is no file"),
        (lambda e: e["files"].update({f"{e['path']}/../y": first(e)}), "which is no file of"),
        (lambda e: e["files"].update({f"{e['path']}//y": first(e)}), "which is no file of"),
        (lambda e: e["files"].update({"other.gguf": first(e)}), "'other.gguf', which is no file"),
        (lambda e: first(e).update(bytes=-1), "bytes or sha256 of"),
        (lambda e: first(e).update(bytes="7"), "bytes or sha256 of"),
        (lambda e: first(e).update(bytes=10**400), "bytes or sha256 of"),
        (lambda e: first(e).update(sha256="x"), "bytes or sha256 of"),
        (lambda e: first(e).update(sha256=7), "not a readable manifest"),
        (lambda e: first(e).update(pieces=["0 9 x"]), "a piece of"),
        (lambda e: first(e).update(pieces=["0 99999999999 0123456789abcdef a"]), "a piece of"),
        (lambda e: first(e).update(pieces=[7]), "not a readable manifest"),
        (lambda e: first(e).update(pieces=7), "not a readable manifest"),
        (lambda e: first(e).update(sha256="0" * 64), "sha256 differs from"),
    ],
)
def test_a_manifest_that_cannot_be_believed(build: Path, change: Edit, message: str) -> None:
    edit(build, change)
    assert message in refusal(build)


def test_a_manifest_that_names_a_part_of_the_files(build: Path) -> None:
    if build.is_file():
        pytest.skip("of a folder")
    edit(build, lambda e: e["files"].pop(f"{build.name}/tokenizer.json"))
    assert "tokenizer.json: not named by" in refusal(build)


def test_a_file_more_or_less(build: Path) -> None:
    if build.is_file():
        pytest.skip("of a folder")
    (build / "more").symlink_to("/etc/passwd")
    assert "more: not named by" in refusal(build)
    (build / "more").unlink()
    (build / "config.json").rename(build.parent / "config.json")
    assert "config.json: named by small-int4.manifest.json but missing" in refusal(build)


def test_links_to_files_elsewhere(build: Path, tmp_path: Path) -> None:
    file = build if build.is_file() else build / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    if build.is_file():  # the build itself may be reached by a link
        assert verify_build(build)
    else:
        assert "model.safetensors: a link to" in refusal(build)


def test_a_manifest_of_another_build(build: Path, make_checkpoint: Any, tmp_path: Path) -> None:
    def other(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] *= 2

    checkpoint = open_checkpoint(make_checkpoint("elsewhere", change=other), "small")
    recipe = load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    formats = {f.NAME: f for f in FORMATS.values() if build.name.endswith(f.SUFFIX)}
    (made,) = convert(checkpoint, recipe, plan, formats, tmp_path / "other").builds
    assert inputs_of(made.path) != inputs_of(build)
    shutil.copy(manifest(made.path), manifest(build))
    assert "the first tensor that differs is model.embed_tokens.weight" in refusal(build)


def test_hashes_that_agree_do_not_make_it_a_build(build: Path) -> None:
    """A manifest can be made for anything; what no reader knows is not intact."""
    if build.is_dir():
        pytest.skip("of a file")
    import hashlib

    build.write_bytes(b"GGUF")
    sha256 = hashlib.sha256(b"GGUF").hexdigest()
    edit(build, lambda e: e.update(files={build.name: {"bytes": 4, "sha256": sha256}}))
    assert "not a readable GGUF file" in refusal(build)
