"""Commands that compute nothing start without what takes seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

import lfmq

HEAVY = ("torch", "numba", "llvmlite", "onnxruntime", "transformers", "huggingface_hub.hf_api")
REPORT = f"""
import sys
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""


def start(code: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build and its manifest."""
    output = tmp_path_factory.mktemp("build")
    report = lfmq.convert("sample", output, recipe="int8", to=request.param, uncalibrated=True)
    return report.builds[0].path


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        *((name, "--help") for name in ("inspect", "plan", "convert", "validate", "compare")),
        ("inspect", "sample"),
        ("plan", "sample"),
        ("plan", "sample", "--recipe", "q4_k_m", "--to", "gguf", "--tensors"),
    ],
    ids=" ".join,
)
def test_a_command_starts_light(words: tuple[str, ...]) -> None:
    start("from lfmq.cli import main" + REPORT, *words)


def test_verify_starts_light(build: Path) -> None:
    start("from lfmq.cli import main" + REPORT, "verify", str(build))


def test_help_draws_nothing() -> None:
    code = "from lfmq.cli import main" + REPORT
    start(code + "assert not {'rich', 'onnx', 'gguf'} & set(sys.modules)", "--help")


def test_the_package_itself_imports_none_of_its_modules() -> None:
    start("import sys, lfmq; assert not [n for n in sys.modules if n.startswith('lfmq.')]")
