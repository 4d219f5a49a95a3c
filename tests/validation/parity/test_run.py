"""Builds' tokenizers in their runtimes: sound ones are equal, planted differences are found."""

import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.formats.build import Assets
from lfmq.formats.plan import Plan
from lfmq.tests.formats.gguf.test_pretokenizer import write_header
from lfmq.validation.engines import mlx_tokenizer, transformers_tokenizer
from lfmq.validation.engines.protocol import TokenizerRun
from lfmq.validation.parity.probes import make_probe
from lfmq.validation.parity.result import Parity
from lfmq.validation.parity.run import measure_parity

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = ROOT / "benchmarks" / "tokenizer_parity.py"
# All that genai wants to know of a model whose tokenizer alone it opens.
GENAI = b'{"model": {"type": "lfm2", "context_length": 256, "decoder": {}}}'
Build = Callable[[str, str], Path]
Change = Callable[[dict[str, Any]], None]


def differences(found: Parity) -> dict[tuple[str, str], str | None]:
    return {(g.runtime, g.group): g.first_difference for g in found.tokenizer if not g.equal}


@pytest.fixture(scope="module")
def assets(sample_folder: Path) -> Assets:
    return open_checkpoint(sample_folder).assets


@pytest.fixture
def changed(assets: Assets) -> Callable[[Change], Assets]:
    """The checkpoint with another tokenizer; its builds are of the one it had."""

    def make(change: Change) -> Assets:
        tokenizer = json.loads(assets.files["tokenizer.json"])
        change(tokenizer)
        files = {"tokenizer.json": json.dumps(tokenizer).encode()}
        return replace(assets, files=assets.files | files)

    return make


def single_digits(tokenizer: dict[str, Any]) -> None:
    pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")


def no_contractions(tokenizer: dict[str, Any]) -> None:
    pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].partition("|[^")[2].join(["[^", ""])


def normalizer(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}


def left_strip(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][7]["lstrip"] = True


def right_strip(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][-1]["rstrip"] = True


def not_special(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][5]["special"] = False


def begins_texts(tokenizer: dict[str, Any]) -> None:
    bos = "<|startoftext|>"
    post = tokenizer["post_processor"]
    post["single"].insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
    post["special_tokens"] = {bos: {"id": bos, "ids": [1], "tokens": [bos]}}


def swapped_merge(tokenizer: dict[str, Any]) -> None:
    """An early merge comes last: what it makes is made of other parts, or not at all."""
    tokenizer["model"]["merges"].append(tokenizer["model"]["merges"].pop(3))
    tokenizer["model"]["ignore_merges"] = True


PLANTED: list[tuple[Change, str]] = [
    (single_digits, "digits"),
    (no_contractions, "contractions"),
    (normalizer, "combining marks"),
    (left_strip, "added tokens"),
    (right_strip, "added tokens"),
    (not_special, "added tokens"),
    (begins_texts, "start and end"),
    (swapped_merge, "code"),
]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_sound_build(format: str, assets: Assets, convert_sample: Build) -> None:
    path = convert_sample("int4", format)
    found = measure_parity(assets, {path: format}, native=False)
    assert differences(found) == {}
    runtimes = {"gguf": ["llama.cpp"], "onnx": ["onnxruntime-genai", "tokenizers"]}[format]
    assert [row.runtime for row in found.by_runtime()] == runtimes
    assert found.not_measured == ()
    assert [t.equal for t in found.template] == ([True] if format == "onnx" else [])


def test_many_added_tokens(
    changed: Callable[[Change], Assets], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """64 more, special and not, in the tokenizer files of a folder and in a GGUF of zeros."""
    added = runpy.run_path(str(BENCHMARK))["added_tokens"](8192)
    assert len(added) == 64
    assets = changed(lambda tokenizer: tokenizer["added_tokens"].extend(added))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {**assets.files, "genai_config.json": GENAI}.items():
        (folder / name).write_bytes(content)
    config = replace(open_checkpoint(assets.folder).config, vocab_size=8256)
    path = write_header(tmp_path / "a.gguf", assets, make_plan(config))
    found = measure_parity(assets, {path: "gguf", folder: "onnx"}, native=False)
    assert differences(found) == {}
    assert len({g.runtime for g in found.tokenizer}) == 3


@pytest.mark.parametrize(("plant", "group"), PLANTED, ids=lambda p: getattr(p, "__name__", None))
def test_llama_cpp_of_another_checkpoint(
    plant: Change, group: str, changed: Callable[[Change], Assets], convert_sample: Build
) -> None:
    pytest.importorskip("xllamacpp")
    path = convert_sample("int4", "gguf")
    found = differences(measure_parity(changed(plant), {path: "gguf"}, native=False))
    assert ("llama.cpp", group) in found


@pytest.mark.parametrize(("plant", "group"), PLANTED, ids=lambda p: getattr(p, "__name__", None))
def test_a_planted_file(
    plant: Change, group: str, assets: Assets, convert_sample: Build, tmp_path: Path
) -> None:
    """A folder build whose tokenizer.json is another: the tokenizers library finds all of them."""
    path = copy_of(convert_sample("int4", "mlx"), tmp_path)
    edit(path / "tokenizer.json", plant)
    found = differences(measure_parity(assets, {path: "mlx"}, native=False))
    difference = found["tokenizers", group]
    assert difference is not None
    assert " where the checkpoint has " in difference


def test_genai_follows_the_planted_file(
    assets: Assets, convert_sample: Build, tmp_path: Path
) -> None:
    path = copy_of(convert_sample("int4", "onnx"), tmp_path)
    edit(path / "tokenizer.json", single_digits)
    found = differences(measure_parity(assets, {path: "onnx"}, native=False))
    assert {runtime for runtime, group in found if group == "digits"} == {
        "onnxruntime-genai",
        "tokenizers",
    }


def test_a_planted_template(assets: Assets, convert_sample: Build, tmp_path: Path) -> None:
    path = copy_of(convert_sample("int4", "onnx"), tmp_path)
    template = (path / "chat_template.jinja").read_text().replace("List of tools", "Tools")
    (path / "chat_template.jinja").write_text(template)
    edit(path / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    found = measure_parity(assets, {path: "onnx"}, native=False)
    (row,) = found.template
    assert (row.equal, row.runtime) == (False, "onnxruntime-genai")
    assert row.first_difference is not None
    assert row.first_difference.startswith("a chat: ")
    assert found.tokenizer
    assert differences(found) == {}


def test_a_tokenizer_that_does_not_load(
    assets: Assets, convert_sample: Build, tmp_path: Path
) -> None:
    path = copy_of(convert_sample("int4", "mlx"), tmp_path)
    (path / "tokenizer.json").write_text("{}")
    (group,) = measure_parity(assets, {path: "mlx"}, native=False).tokenizer
    assert (group.group, group.equal) == ("loads", False)
    assert "tokenizer.json: not a tokenizer" in str(group.first_difference)


def test_a_runtime_that_is_not_installed(
    assets: Assets, convert_sample: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child does not find it either."""
    (tmp_path / "onnxruntime_genai.py").write_text("raise ImportError('no genai here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT.parent}")
    path = convert_sample("int4", "onnx")
    found = measure_parity(assets, {path: "onnx"}, native=False)
    (missing,) = found.not_measured
    assert missing.runtime == "onnxruntime-genai"
    assert "pip install 'lfmq[genai]'" in missing.why
    assert {g.runtime for g in found.tokenizer} == {"tokenizers"}


def test_llama_server_renders_the_ggufs_template(
    assets: Assets, convert_sample: Build, tmp_path: Path
) -> None:
    """Where the build runs natively; a template of another wording is found."""
    pytest.importorskip("xllamacpp")
    path = convert_sample("int4", "gguf")
    found = measure_parity(assets, {path: "gguf"}, native=True)
    assert [t.equal for t in found.template] == [True]
    assert differences(found) == {}
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes().replace(b"List of tools: ", b"List or tools: "))
    (row,) = measure_parity(assets, {other: "gguf"}, native=True).template
    assert "List or tools" in str(row.first_difference)


@pytest.mark.parametrize(
    ("format", "ask"),
    [("mlx", mlx_tokenizer.tokenize), ("compressed-tensors", transformers_tokenizer.tokenize)],
    ids=["mlx", "compressed-tensors"],
)
def test_runtimes_that_take_seconds_to_start(
    format: str, ask: Callable[..., TokenizerRun], assets: Assets, convert_sample: Build
) -> None:
    """In this process: they start once for all tests."""
    pytest.importorskip("mlx_lm" if format == "mlx" else "transformers")
    probe = make_probe(assets)
    assert ask(probe.request(convert_sample("int4", format))) == probe.expected


def copy_of(build: Path, folder: Path) -> Path:
    """The files of a folder build that a tokenizer is made of."""
    target = folder / build.name
    skipped = shutil.ignore_patterns("*.safetensors", "*.onnx*", "*.data")
    shutil.copytree(build, target, ignore=skipped)
    return target


def edit(path: Path, change: Change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
