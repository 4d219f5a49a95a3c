"""A name and metadata of the user's own, in the builds and their manifest."""

import json
import os
import shutil

import onnx
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

import lfmq
from lfmq.api.labels import Labels
from lfmq.cli import main
from lfmq.quant.errors import UsageError


@pytest.mark.parametrize(
    "name", ["", " x", ".x", "..", "-x", "a/b", "a\\b", "a:b", "a\nb", "\ud800", "x" * 151]
)
def test_a_name_that_is_none_for_a_file(name):
    with pytest.raises(UsageError, match=r"^--name "):
        Labels(name).checked(("gguf",))


def test_metadata_without_a_gguf():
    with pytest.raises(UsageError, match="--to gguf"):
        Labels(metadata={"my.key": 1}).checked(("mlx",))


def test_name_and_metadata_reach_builds_and_manifest(make_checkpoint, tmp_path):
    made = lfmq.convert(
        make_checkpoint(),
        tmp_path,
        to=["gguf", "onnx"],
        uncalibrated=True,
        name="My Model",
        metadata={"general.author": "Me", "my.list": [1, 2]},
    )
    paths = {build.format: build.path for build in made.builds}
    assert paths["gguf"].name == "My Model-int4.gguf"
    fields = GGUFReader(paths["gguf"]).fields
    assert fields["general.name"].contents() == "My Model"
    assert fields["general.author"].contents() == "Me"
    assert fields["my.list"].contents() == [1, 2]
    graph = onnx.load(paths["onnx"] / "model.onnx", load_external_data=False)
    assert {p.key: p.value for p in graph.metadata_props} == {"name": "My Model", "recipe": "int4"}
    manifest = json.loads((tmp_path / "My Model-int4.manifest.json").read_text())
    assert manifest["metadata"] == {"general.author": "Me", "my.list": [1, 2]}
    for path in paths.values():
        lfmq.verify(path)


@pytest.mark.parametrize(
    "words",
    [
        ("--name", "a/b"),
        ("--metadata", "general.name=x"),
        ("--metadata", "x"),
        ("--metadata", "a.b=1", "--to", "mlx"),
    ],
    ids=" ".join,
)
def test_wrong_usage(make_checkpoint, tmp_path, words):
    command = ["convert", str(make_checkpoint()), "--output", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(main, [*command, "--uncalibrated"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: --")
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_is_no_text(make_checkpoint, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffel")
    shutil.move(make_checkpoint(), folder)
    with pytest.raises(
        lfmq.CheckpointError, match=r"'mod\\udcffel': the checkpoint's name is not"
    ):
        lfmq.convert(folder, tmp_path / "out", to="gguf", uncalibrated=True)
    made = lfmq.convert(folder, tmp_path / "out", to="gguf", uncalibrated=True, name="model")
    assert made.builds[0].path.name == "model-int4.gguf"
