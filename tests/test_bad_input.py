"""Damaged, hostile and mistaken input: one clear line, exit status 1 or 2, nothing left behind."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lfmq.cli import main

WEIGHT = "model.layers.2.feed_forward.experts.3.w2.weight"


def lfmq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def convert(checkpoint: Path, output: Path, *words: object) -> Result:
    return lfmq("convert", checkpoint, "--output", output, "--uncalibrated", "--quiet", *words)


def refused(result: Result, *expected: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    assert not result.stdout
    lines = [x for x in result.stderr.splitlines() if not x.startswith("compiling kernels")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for text in expected:
        assert text in lines[0]


def empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_truncated_weights(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[:-100])
    refused(convert(folder, tmp_path / "out"), "model.safetensors", "truncated", "fetch it again")
    assert empty(tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 7, 8, 500])
def test_weights_cut_in_the_header(make_checkpoint, keep):
    folder = make_checkpoint()
    weights(folder).write_bytes(weights(folder).read_bytes()[:keep])
    refused(lfmq("inspect", folder), "model.safetensors")


def test_overlong_weights(make_checkpoint):
    folder = make_checkpoint()
    with weights(folder).open("ab") as file:
        file.write(b"x" * 10)
    refused(lfmq("inspect", folder), "model.safetensors", "overlong")


def test_header_length_of_2_to_the_60(make_checkpoint):
    folder = make_checkpoint()
    content = bytearray(weights(folder).read_bytes())
    content[:8] = struct.pack("<Q", 2**60)
    weights(folder).write_bytes(content)
    refused(lfmq("inspect", folder), "the header claims 1,152,921,504,606,846,976 bytes")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [1099511627776, 1099511627780]}}',
    ],
    ids=lambda h: h[:60].decode(),
)
def test_header_that_contradicts_itself(make_checkpoint, header):
    folder = make_checkpoint()
    weights(folder).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(lfmq("inspect", folder), "model.safetensors")


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/x.safetensors", "..", "a/b", "x.bin"]
)
def test_index_that_leaves_the_folder(make_checkpoint, name):
    folder = make_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][WEIGHT] = name
    index.write_text(json.dumps(document))
    refused(lfmq("inspect", folder), "index.json", repr(name), "inside the checkpoint folder")


def test_index_that_names_a_missing_shard(make_checkpoint):
    folder = make_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(lfmq("inspect", folder), "model-00002-of-00002.safetensors", "not found")


def test_index_that_names_a_tensor_that_is_nowhere(make_checkpoint):
    folder = make_checkpoint(change=lambda t: t.pop(WEIGHT), shards=2)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][WEIGHT] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))
    refused(
        lfmq("inspect", folder), WEIGHT, "is missing", "the index says that it is in model-00001"
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_index_that_is_no_index(make_checkpoint, text):
    folder = make_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(lfmq("inspect", folder), "model.safetensors.index.json")


def test_a_shard_that_is_another_one(make_checkpoint):
    folder = make_checkpoint(shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(
        lfmq("inspect", folder), "is missing", f"it is in {second.name}; fetch that file again"
    )


def test_missing_tensor(make_checkpoint):
    folder = make_checkpoint(change=lambda t: t.pop(WEIGHT))
    refused(lfmq("inspect", folder), f"tensor {WEIGHT} is missing")


def test_extra_tensor(make_checkpoint):
    folder = make_checkpoint(change=lambda t: t.update(extra=np.zeros(3, np.float32)))
    refused(lfmq("inspect", folder), "unexpected tensor extra")


def test_wrong_shape(make_checkpoint):
    folder = make_checkpoint(change=lambda t: t.update({WEIGHT: t[WEIGHT][:, :32].copy()}))
    refused(lfmq("inspect", folder), WEIGHT, "[128, 32]", "[128, 64]")


def test_wrong_dtype(make_checkpoint):
    folder = make_checkpoint(change=lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.int32)}))
    refused(lfmq("inspect", folder), WEIGHT, "dtype I32", "BF16, F16 or F32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [WEIGHT, "model.embedding_norm.weight"])
def test_weights_that_are_no_numbers(make_checkpoint, tmp_path, name, value):
    def change(tensors):
        tensors[name].reshape(-1)[5] = value

    folder = make_checkpoint(change=change)
    refused(convert(folder, tmp_path / "out"), name)
    assert empty(tmp_path / "out")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_instead_of_safetensors(make_checkpoint, name):
    folder = make_checkpoint()
    weights(folder).rename(folder / name)
    refused(lfmq("inspect", folder), name, "pickle", "safetensors")


def test_no_weights_at_all(make_checkpoint):
    folder = make_checkpoint()
    weights(folder).unlink()
    refused(lfmq("inspect", folder), "neither model.safetensors nor")


def test_folder_without_config(tmp_path):
    refused(lfmq("inspect", tmp_path), "config.json", "not a checkpoint folder")


def test_no_such_folder(tmp_path):
    refused(lfmq("inspect", tmp_path / "gone"), "gone: no such folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'lfm2_moe'"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"hidden_size": -128}, "hidden_size is -128"),
        ({"num_experts": 2**40}, "num_experts is"),
        ({"num_experts": 4}, "experts.4.w1.weight"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ({"layer_types": ["conv"]}, "layer_types must list"),
        ({"layer_types": ["conv", "mamba", "conv", "conv"]}, "layer_types[1] is 'mamba'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None}, "rope_theta is None"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, but lm_head.weight is"),
        ({"conv_bias": True}, "conv_bias is true"),
        ({"num_hidden_layers": 2**30}, "layer_types must list"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_config_of_another_model(make_checkpoint, change, message):
    refused(lfmq("inspect", make_checkpoint(config=change)), message)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_config_that_is_no_json(make_checkpoint, text):
    folder = make_checkpoint()
    (folder / "config.json").write_text(text, "latin-1")
    refused(lfmq("inspect", folder), "config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files(make_checkpoint, name):
    folder = make_checkpoint()
    (folder / name).write_text("{")
    refused(lfmq("inspect", folder), name, "not valid JSON")


def test_tokenizer_larger_than_the_vocabulary(make_checkpoint, tmp_path):
    name = "model.embed_tokens.weight"
    folder = make_checkpoint(
        change=lambda t: t.update({name: t[name][:8000].copy()}), config={"vocab_size": 8000}
    )
    for words in ((), ("--to", "gguf"), ("--to", "mlx"), ("--to", "onnx")):
        result = convert(folder, tmp_path / "out", *words)
        refused(result, "tokenizer.json", "id 8191", "8000 rows")
    refused(lfmq("plan", folder, "--to", "mlx"), "tokenizer.json", "id 8191")
    assert empty(tmp_path / "out")
    shown = lfmq("inspect", folder)
    assert shown.exit_code == 0
    assert "warning: the tokenizer has 8,192 tokens" in shown.stdout


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("[[rule]]\nbits = 4\nbitz = 4", "unknown key 'bitz'"),
        ("[[rule]]\nbits = 5", "bits"),
        ("[[rule]]\nbits = 4\n[[rule]]\nbits = 8\nnames = ['*.w9.*']", "matches no tensor"),
        ("[[rule]]\nbits = 4\n[[rule]]\nbits = 8\nlayers = ['90-95']", ""),
        ("[[rule]]\nbits = 4\nroles = ['router']", "router"),
        ("[[rule]]\nbits = 4\nroles = ['wheels']", "wheels"),
        ("[[rule]]\nroles = ['experts']\nbits = 4", ""),
        ("rule = 3", ""),
        ("[[rule", "not"),
        ("", ""),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_recipes(make_checkpoint, tmp_path, recipe, message):
    path = tmp_path / "mine.toml"
    path.write_text(recipe)
    result = lfmq("plan", make_checkpoint(), "--recipe", path)
    refused(result, "mine", message)


def test_no_such_recipe(make_checkpoint):
    refused(lfmq("plan", make_checkpoint(), "--recipe", "int3"), "int3", "int4")


def test_output_that_cannot_be_written(make_checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = convert(make_checkpoint(), tmp_path / "file" / "out")
    refused(result, "file/out", "cannot be written")
    refused(convert(make_checkpoint("b"), Path("/proc/out")), "/proc/out", "cannot be written")


def run(*words: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfmq.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_full_disk(make_checkpoint, tmp_path):
    """A limit on file size stops the write in the middle, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    checkpoint = make_checkpoint()
    assert convert(checkpoint, tmp_path / "whole").exit_code == 0  # also compiles the kernels
    done = run(
        "convert", checkpoint, "--output", tmp_path / "out", "--uncalibrated", "--quiet",
        preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "out/small-int4" in done.stderr
    assert empty(tmp_path / "out")


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_existing_output_stays_without_force(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    assert convert(folder, tmp_path / "out").exit_code == 0
    before = files(tmp_path / "out")
    refused(convert(folder, tmp_path / "out", "--to", "mlx"), "already exists", "--force")
    assert files(tmp_path / "out") == before


def test_existing_output_stays_when_force_fails(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    assert convert(folder, tmp_path / "out").exit_code == 0
    before = files(tmp_path / "out")
    damaged = make_checkpoint("damaged", change=lambda t: t[WEIGHT].fill(np.nan))
    weights(damaged).replace(weights(folder))
    refused(convert(folder, tmp_path / "out", "--force"), WEIGHT)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("bfloat16", 3.4e38)])
def test_a_value_beyond_the_float_type_asked_for(make_checkpoint, tmp_path, dtype, value):
    recipe = tmp_path / "mine.toml"
    name = "model.layers.1.self_attn.q_proj.weight"
    recipe.write_text(f"[[rule]]\nbits = 4\n[[rule]]\nnames = ['{name}']\nfloat = '{dtype}'")
    folder = make_checkpoint(change=lambda t: t[name].fill(value))
    result = convert(folder, tmp_path / "out", "--recipe", recipe, "--to", "gguf")
    refused(result, name, f"a value beyond {dtype}")
    assert empty(tmp_path / "out")


def test_names_cannot_break_the_line_or_reach_the_terminal(make_checkpoint):
    name = "a\nError: b\x1b[31m\u202ec"
    folder = make_checkpoint(change=lambda t: t.update({name: np.zeros(3, np.float32)}))
    result = lfmq("inspect", folder)
    refused(result, r"unexpected tensor a\nError: b\x1b[31m\u202ec")
    assert "\x1b" not in result.stderr


def test_the_weights_shrink_while_they_are_read(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint()
    read = os.preadv

    def shrink_and_read(*arguments):
        os.truncate(weights(folder), 100_000)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", shrink_and_read)
    refused(convert(folder, tmp_path / "out"), "model.safetensors: became shorter")
    assert empty(tmp_path / "out")


def test_a_folder_name_longer_than_the_file_system_allows(make_checkpoint, tmp_path):
    refused(convert(make_checkpoint(), tmp_path / ("x" * 300)), "name too long")
    refused(lfmq("inspect", "x" * 5000), "name too long")


def test_no_space_on_the_device(make_checkpoint, tmp_path):
    """On a disk of 1 MB of memory, mounted where no other process sees it."""
    output, checkpoint = tmp_path / "disk", make_checkpoint()
    output.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {output}"
    if shutil.which("unshare") is None or subprocess.call(["unshare", "-m", *mount.split()]):
        pytest.skip("needs the right to mount")
    convert = f"{sys.executable} -m lfmq.cli convert {checkpoint} --output {output}"
    options = "--uncalibrated --quiet"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount}; {convert} {options}; echo $?; ls {output}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "1\n"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: {output}/small-int4")
    assert "no space left on the device; the build needs" in done.stderr


def test_wrong_usage():
    for words in (["convert"], ["convert", "sample"], ["plan", "sample", "--to", "exe"], ["fly"]):
        result = lfmq(*words)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr


def test_no_traceback_from_the_real_program(make_checkpoint):
    folder = make_checkpoint()
    weights(folder).write_bytes(b"\x00" * 4)
    done = run("inspect", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("build", ["gone.gguf", "empty", "text.gguf"])
def test_validate_refuses_what_is_no_build(tmp_path, build):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not a model")
    refused(lfmq("validate", "sample", tmp_path / build, "--quiet"), build)
    refused(lfmq("verify", tmp_path / build), build)


def test_a_link_at_a_temporary_name_is_not_written_through(make_checkpoint, tmp_path):
    """Neither the manifest's, nor that of statistics and importance matrices."""
    checkpoint, out = make_checkpoint(), tmp_path / "out"
    (tmp_path / "mine").write_text("mine")
    out.mkdir()
    for name in ("small-int4.manifest.json", "s", "m"):
        (out / f"{name}.part").symlink_to(tmp_path / "mine")
    assert convert(checkpoint, out).exit_code == 0
    words = ["--text", checkpoint / "README.txt", "--tokens", 64, "--sequence", 32]
    (checkpoint / "README.txt").write_text("one two three " * 200)
    done = lfmq("calibrate", checkpoint, "--output", out / "s", "--imatrix", out / "m", *words)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "mine").read_text() == "mine"
    assert not [p for p in out.iterdir() if p.suffix == ".part" or p.is_symlink()]


def test_statistics_and_importance_matrix_have_two_names(make_checkpoint, tmp_path):
    same = tmp_path / "x" / ".." / "s"
    words = ["--output", tmp_path / "s", "--imatrix", same]
    result = lfmq("calibrate", make_checkpoint(), *words)
    assert result.exit_code == 2
    assert "--imatrix and --output are both" in result.stderr


def test_a_name_that_is_not_utf_8(make_checkpoint, tmp_path):
    done = run(
        "convert", make_checkpoint(), "--output", str(tmp_path / "\udcff"), "--uncalibrated"
    )
    assert done.returncode == 0, done.stderr
    done = run("inspect", tmp_path / "\udcfe")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "\\udcfe" in done.stderr
