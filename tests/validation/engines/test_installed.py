"""What is said of installed runtimes and of tokenizer files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.formats.versions import KNOWN_BAD, PROVEN
from lfmq.quant.types import Scheme
from lfmq.validation.engines.installed import (
    build_concerns,
    build_warnings,
    installed_versions,
    plan_warnings,
    warnings_for,
)
from lfmq.validation.engines.tokenizer import from_before_the_update, tokenizer_difference

NONE: dict[str, str] = {}
OLD = b"# LFM2.5-8B-A1B\nLFM2.5 is a new family of models.\n"
NEW = b"> before [commit `feb5e04`](https://...)\n\n# LFM2.5-8B-A1B\n"


@pytest.mark.parametrize(
    ("format", "concerns", "package", "bad", "good"),
    [
        ("mlx", (), "mlx-lm", ["0.31.3", "0.29.1", "0.31.0rc1"], ["0.32.0", "0.32.2"]),
        ("onnx", ("packed experts",), "onnxruntime", ["1.24.4", "1.23.2"], ["1.25.0", "1.30.0"]),
        (
            "onnx",
            ("packed experts", "8-bit experts"),
            "onnxruntime",
            ["1.31.0", "1.32.0", "1.33.1"],
            ["1.25.0", "1.30.0"],
        ),
        (
            "compressed-tensors",
            ("packed convolutions",),
            "vllm",
            ["0.26.0", "0.25.1", "0.26.1.dev7+g0123abc"],
            ["0.27.0", "0.33.0", "a-fork"],
        ),
    ],
)
def test_versions_are_told_apart(format, concerns, package, bad, good):
    for version in bad:
        (line,) = warnings_for(format, set(concerns), {package: version}, NONE)
        assert line.startswith(f"{package} {version} ")
        assert "https://" in line
        assert "; " in line
    for version in good:
        assert warnings_for(format, set(concerns), {package: version}, NONE) == ()
    assert warnings_for(format, set(concerns), {}, NONE) == ()


def test_a_build_without_the_concern_is_not_warned_of():
    installed = {"onnxruntime": "1.32.0", "vllm": "0.20.0"}
    assert warnings_for("onnx", {"packed experts"}, installed, NONE) == ()
    assert warnings_for("compressed-tensors", set(), installed, NONE) == ()
    assert warnings_for("gguf", {"8-bit experts", "packed convolutions"}, installed, NONE) == ()


def test_a_switch_that_is_set_ends_the_warning():
    def warned(value: str) -> int:
        switch = {"ORT_QMOE_CPU_QNBIT_GEMM": value}
        return len(warnings_for("onnx", {"8-bit experts"}, {"onnxruntime": "1.32.0"}, switch))

    assert warned("int8") == 1
    assert warned("fp32") == 0


def test_what_is_installed_is_asked_of_the_installation():
    pins = dict(p.split(" ") for packages in PROVEN.values() for p in packages)
    found = installed_versions()
    assert found["onnxruntime"] == pins["onnxruntime"]
    assert set(found) <= {row.what for row in KNOWN_BAD}


def test_a_conversion_is_warned_of_its_own_formats(
    tiny_assets, make_plan, tiny_config, monkeypatch
):
    versions = {"mlx-lm": "0.31.3", "onnxruntime": "1.32.0"}
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM", raising=False)
    plan = make_plan(tiny_config)
    (line,) = plan_warnings(plan, FORMATS, tiny_assets, versions)
    assert line.startswith("mlx: mlx-lm 0.31.3 routes by softmax")
    assert plan_warnings(plan, ["onnx"], tiny_assets, versions) == ()
    wide = make_plan(tiny_config, experts=Scheme(8))
    assert len(plan_warnings(wide, FORMATS, tiny_assets, versions)) == 2
    old = replace(tiny_assets, files=tiny_assets.files | {"README.md": OLD})
    assert "feb5e04" in plan_warnings(plan, ["gguf"], old, versions)[0]


def test_the_card_tells_whether_a_download_is_older(tiny_assets, tmp_path):
    def said(card: bytes, folder: Path = tmp_path) -> str | None:
        files = tiny_assets.files | {"README.md": card}
        return from_before_the_update(replace(tiny_assets, files=files, folder=folder))

    line = said(OLD)
    assert line is not None
    assert "tool calls" in line
    assert "\n" not in line
    assert said(NEW) is None
    assert said(b"") is None
    assert said(b"# A fine-tune\nbase_model: LiquidAI/LFM2.5-8B-A1B") is None
    revision = tmp_path / "snapshots" / "feb5e04da4910dd56d33f0cd03747ff298c1e801"
    assert said(OLD, revision) is None


@pytest.fixture(scope="module")
def built(sample_folder, tmp_path_factory):
    """The sample with 8-bit experts in every format."""
    checkpoint = open_checkpoint(sample_folder)
    recipe = load_recipe("int8")
    plan = resolve_plan(checkpoint.config, recipe)
    output = tmp_path_factory.mktemp("built")
    made = convert(checkpoint, recipe, plan, FORMATS, output).builds
    return checkpoint, {b.format: b.path for b in made}


def test_concerns_are_read_from_the_files(built):
    _, paths = built
    assert build_concerns(paths["onnx"], "onnx") == {"packed experts", "8-bit experts"}
    assert build_concerns(paths["compressed-tensors"], "compressed-tensors") == {
        "packed convolutions"
    }
    assert build_concerns(paths["gguf"], "gguf") == frozenset()


def test_a_build_of_the_checkpoint_has_its_tokenizer(built):
    checkpoint, paths = built
    for format, path in paths.items():
        assert tokenizer_difference(path, format, checkpoint.assets) is None


def test_builds_of_another_download_are_told(built, tmp_path):
    checkpoint, paths = built
    assets = checkpoint.assets
    template = replace(assets, files=assets.files | {"chat_template.jinja": b"{{ messages }}"})
    document = json.loads(assets.files["tokenizer.json"])
    special = next(a for a in document["added_tokens"] if a["content"] == "</think>")
    special["special"] = not special["special"]
    kinds = replace(assets, files=assets.files | {"tokenizer.json": json.dumps(document).encode()})
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokens = replace(
        assets, files=assets.files | {"tokenizer.json": json.dumps(document).encode()}
    )
    for format, path in paths.items():
        assert tokenizer_difference(path, format, template) == "chat template"
        assert tokenizer_difference(path, format, kinds) == "kinds of tokens"
        assert tokenizer_difference(path, format, tokens) == "tokens"
        (line,) = [x for x in build_warnings(path, format, tokens) if "tokens" in x]
        assert line.startswith("its tokens ")
    bare = tmp_path / "mlx"
    shutil.copytree(paths["mlx"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (bare / "tokenizer.json").write_bytes(b"{")
    assert tokenizer_difference(bare, "mlx", assets) == "tokenizer"
    (bare / "tokenizer.json").unlink()
    assert tokenizer_difference(bare, "mlx", assets) is None


def test_the_hint_names_the_update(built):
    checkpoint, paths = built
    named = replace(
        checkpoint.assets,
        name="LFM2.5-8B-A1B",
        files=checkpoint.assets.files | {"chat_template.jinja": b"other"},
    )
    assert "feb5e04" in build_warnings(paths["gguf"], "gguf", named)[-1]
