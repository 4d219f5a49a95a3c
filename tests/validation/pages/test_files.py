"""``lfmq validate --html --markdown``: whole files or none, refused before any work."""

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lfmq.cli import main
from lfmq.quant.errors import ValidationError
from lfmq.validation.pages.files import check_writable, write_report


def lfmq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[str]:
    output = tmp_path_factory.mktemp("builds")
    words = ("--uncalibrated", "--to", "gguf", "--to", "mlx", "--json", "--quiet")
    done = lfmq("convert", "sample", "--output", output, *words)
    return [b["path"] for b in json.loads(done.stdout)["builds"]]


WORDS = ("--tokens", 512, "--sequence", 128, "--threads", 1, "--json")


def test_both_files_hold_the_documents_numbers(builds, tmp_path):
    """Also when a threshold is missed, and in place of older ones."""
    page, table = tmp_path / "report.html", tmp_path / "table.md"
    page.write_text("an older one")
    words = ("--html", page, "--markdown", table, "--max-kld", 1e-9, "--quiet")
    done = lfmq("validate", "sample", *builds, *WORDS, *words)
    assert done.exit_code == 3, done.output
    assert done.stderr == ""
    document = json.loads(done.stdout)
    (embedded,) = re.findall(r'id="document">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert json.loads(embedded) == document
    assert "</span> Missed" in page.read_text("utf-8")
    assert "lfm2moe-tiny-int4.gguf | read |" in table.read_text("utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "table.md"]
    assert [b["warnings"] for b in document["builds"]] == [[], []]


@pytest.mark.parametrize("name", ["missing/report.html", ".", "twice", "pipe"])
def test_what_cannot_be_written_is_refused_before_the_work(builds, tmp_path, name):
    path = tmp_path / name
    if name == "pipe":  # as --html /dev/null: its name would be given to the report
        os.mkfifo(path)
    words = ["--html", path] + (["--markdown", path] if name == "twice" else [])
    done = lfmq("validate", "no-such-checkpoint", "no-such-build", *words)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {path}: ")


def test_a_report_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValidationError, match="No space left"):
        write_report(path, "newer")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_no_encoding_holds_is_written_out(tmp_path):
    write_report(tmp_path / "a.md", "a\udcffb\n")
    assert (tmp_path / "a.md").read_text("utf-8") == "a\\udcffb\n"


def test_a_file_in_the_working_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(Path("report.html"), None)


def test_a_conversion_says_what_is_known_of_installed_runtimes(tmp_path, monkeypatch):
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM", raising=False)
    words = ("--uncalibrated", "--to", "onnx", "--recipe", "int8", "--threads", 1)
    done = lfmq("convert", "sample", "--output", tmp_path, *words)
    assert "warning: onnx: onnxruntime 1.32.0 rounds the activations" in done.stderr
    assert "warning" not in done.stdout
    build = tmp_path / "lfm2moe-tiny-int8-onnx"
    found = lfmq("validate", "sample", build, *WORDS)
    (line,) = json.loads(found.stdout)["builds"][0]["warnings"]
    assert line.startswith("onnxruntime 1.32.0 rounds")
    assert f"warning: {build}: onnxruntime" in found.stderr
