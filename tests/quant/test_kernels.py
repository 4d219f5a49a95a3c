"""Where compiled kernels are kept, and that the user hears of the first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from lfmq.quant.kernels import inner, kernel, on_first_compile


@inner
def twice(x):
    return x + x


@kernel
def four_times(x):
    return twice(twice(x))


if __name__ == "__main__":
    on_first_compile(lambda: print("compiling"))
    print(four_times(1.5), four_times(2))
"""


def run(folder: Path, **environment: str) -> list[str]:
    """Lines that the module prints, run in a process of its own."""
    changed = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | environment
    done = subprocess.run(
        [sys.executable, str(folder / "some.py")],
        capture_output=True,
        text=True,
        check=True,
        env=changed,
    )
    return done.stdout.splitlines()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A folder with a module of kernels."""
    folder = tmp_path / "install"
    folder.mkdir()
    (folder / "some.py").write_text(MODULE)
    return folder


def test_compiling_is_told_once_and_kept(module: Path) -> None:
    assert run(module) == ["compiling", "6.0 8"]
    assert any((module / "__pycache__").glob("*.nbi"))
    assert run(module) == ["6.0 8"]


def test_a_read_only_install_without_a_home(module: Path, tmp_path: Path) -> None:
    """A file where numba would make a folder stands for one that cannot be written, also by root.

    Compiled code goes to a folder of temporary files that nobody else may write.
    """
    (module / "__pycache__").write_text("")
    nowhere = str(module / "some.py" / "below")
    (tmp_path / "temporary").mkdir()
    places = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "TMPDIR": str(tmp_path / "temporary")}
    assert run(module, **places) == ["compiling", "6.0 8"]
    (kept,) = (tmp_path / "temporary").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert any(kept.rglob("*.nbi"))
    assert run(module, **places) == ["6.0 8"]


def test_nowhere_to_keep_code(module: Path, tmp_path: Path) -> None:
    """A folder that others can write is not loaded from: code is compiled again each time."""
    (module / "__pycache__").write_text("")
    nowhere = str(module / "some.py" / "below")
    open_to_all = tmp_path / f"lfmq-kernels-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    places = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "TMPDIR": str(tmp_path)}
    for _ in range(2):
        assert run(module, **places) == ["compiling", "6.0 8"]
    assert not any(open_to_all.iterdir())
