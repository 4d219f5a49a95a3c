"""The examples run as they stand, on the sample, with few tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from lfmq.cli import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# Two windows of the length that the sample was trained for.
FEW = {"TOKENS": "512", "SEQUENCE": "256"}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program with this interpreter's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_every_example_is_in_the_list() -> None:
    page = (EXAMPLES / "README.md").read_text("utf-8")
    files = [p.name for p in EXAMPLES.iterdir() if p.is_file() and p.name != "README.md"]
    assert not [name for name in files if f"]({name})" not in page]


def test_custom_recipe_is_planned_in_every_format() -> None:
    recipe = EXAMPLES / "custom_recipe.toml"
    result = CliRunner().invoke(main, ["plan", "sample", "--recipe", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["recipe"] == "custom_recipe"
    assert [b["format"] for b in planned["builds"] if "refused" not in b] == [
        "gguf",
        "mlx",
        "onnx",
        "compressed-tensors",
    ]


def test_release_gate_refuses_a_build_that_misses_a_limit(tmp_path: Path) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text("[limits]\nmax_kld = 0\n", "utf-8")
    gate, output = EXAMPLES / "release_gate.sh", tmp_path / "builds"
    found = run(gate, "sample", output, "--uncalibrated", THRESHOLDS=str(thresholds), **FEW)
    assert found.returncode == 3, found.stderr
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert [failure["figure"] for failure in report["failures"]] == ["kld.mean"]
    assert (output / "report.html").is_file()


def test_convert_and_validate_prints_the_figures_of_its_builds(tmp_path: Path) -> None:
    found = run(
        sys.executable,
        EXAMPLES / "convert_and_validate.py",
        "sample-dense",
        tmp_path,
        "--uncalibrated",
        *("--tokens", FEW["TOKENS"], "--sequence", FEW["SEQUENCE"]),
    )
    assert found.returncode == 0, found.stderr
    assert "int4" in found.stdout
    assert "int8" in found.stdout
    assert "mean KLD" in found.stdout
