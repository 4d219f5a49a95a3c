"""Every command that writes, on disks that are too small: one line, nothing left, then the same.

Each command runs on a file system in memory of a size that it does not fit, mounted where no other
process sees it (``unshare -m``, as root): the smallest, and shares of what the command wrote on a
disk without a limit. It must end with status 1 and one line that starts with ``Error:``, and leave
no file under a final name; with the limit gone, the same command must write the bytes of the first
run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHARES = (0.02, 0.3, 0.6, 0.9)
PAGE = 4096
TEXT = ("--tokens", "512", "--sequence", "128", "--threads", "1", "--quiet")
FORMATS = ("gguf", "mlx", "onnx", "compressed-tensors")
Words = tuple[str, ...]


def main() -> None:
    """Run every command on every disk, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="commands with this in their name")
    only = parser.parse_args().only
    table = Table(title="disks too small, by command")
    faults: list[dict[str, object]] = []
    for column in ("command", "bytes", "disks", "one line, nothing left", "then the same bytes"):
        table.add_column(column, justify="left" if column == "command" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        for name, words in commands(prepare(Path(scratch)), disk).items():
            if only not in name:
                continue
            sizes, lines, same = try_command(disk, words, faults)
            table.add_row(name, f"{sizes[-1]:,}", str(len(SHARES)), str(lines), str(same))
            print(name, sizes, lines, same, flush=True)
    Console(width=100).print(table)
    for fault in faults:
        print(json.dumps(fault))
    raise SystemExit(bool(faults))


def lfmq(*words: str) -> Words:
    """A command line."""
    return (sys.executable, "-m", "lfmq.cli", *words)


def prepare(scratch: Path) -> tuple[Path, Path]:
    """A statistics file and a build."""
    statistics, output = scratch / "statistics", scratch / "builds"
    subprocess.run(
        lfmq("calibrate", "sample-dense", *TEXT, "--output", str(statistics)), check=True
    )
    command = ("convert", "sample-dense", "--uncalibrated", "--to", "gguf", "--output")
    subprocess.run(lfmq(*command, str(output), "--quiet"), check=True, stdout=subprocess.DEVNULL)
    return statistics, output / "lfm2-tiny-int4.gguf"


def commands(inputs: tuple[Path, Path], disk: Path) -> dict[str, Words]:
    """By name; each writes into ``disk`` alone."""
    statistics, build = map(str, inputs)
    convert = ("convert", "sample-dense", "--quiet", "--threads", "1", "--output", str(disk))
    validate = ("validate", "sample-dense", build, *TEXT)
    frontier = ("frontier", "sample-dense", "--statistics", statistics, "--to", "gguf")
    plan = ("plan", "sample-dense", "--budget", "5.5bpw", "--statistics", statistics)
    found: dict[str, Words] = {
        f"convert --to {name}": lfmq(*convert, "--uncalibrated", "--to", name) for name in FORMATS
    }
    found |= {
        "convert, calibrated": lfmq(*convert, *TEXT[:4], "--to", "gguf"),
        "calibrate": lfmq("calibrate", "sample-dense", *TEXT, "--output", str(disk / "s")),
        "calibrate --imatrix": lfmq(
            "calibrate", "sample-dense", *TEXT,
            "--output", str(disk / "s"), "--imatrix", str(disk / "i.gguf"),
        ),
        "validate --html": lfmq(*validate, "--html", str(disk / "page.html")),
        "validate --markdown": lfmq(*validate, "--markdown", str(disk / "page.md")),
        "frontier --html": lfmq(*frontier, "--html", str(disk / "page.html")),
        "frontier --save": lfmq(*frontier, "--point", "1", "--save", str(disk / "r.toml")),
        "plan --save": lfmq(*plan, "--to", "gguf", "--save", str(disk / "r.toml")),
    }  # fmt: skip
    return found


def try_command(
    disk: Path, words: Words, faults: list[dict[str, object]]
) -> tuple[list[int], int, int]:
    """Bytes of its disks and of what it writes; how many ended well, and were the same after."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    expected = content(disk)
    whole = sum(path.stat().st_size for path in files(disk))
    sizes = [max(PAGE, int(share * whole) // PAGE * PAGE) for share in SHARES]
    if whole <= PAGE:
        sizes = [1] * len(SHARES)  # no page beside the folder's own
    lines = same = 0
    for size in sizes:
        clear(disk)
        status, error, left = run_on_disk(disk, size, words)
        good = status == 1 and error.count("\n") == 1 and error.startswith("Error: ") and not left
        lines += good
        if not good:
            fault = {"command": words[3:], "disk": size, "status": status, "left": left}
            faults.append(fault | {"error": error[-600:]})
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        same += content(disk) == expected
    clear(disk)
    if same < len(sizes):
        faults.append({"command": words[3:], "same": same})
    return [*sizes, whole], lines, same


def run_on_disk(disk: Path, size: int, words: Words) -> tuple[int, str, list[str]]:
    """Status, standard error, and the files left under final names."""
    pages = f"size={size}" if size > 1 else "nr_inodes=1"
    script = f'mount -t tmpfs -o {pages} none "$0" && "$@" >/dev/null; s=$?; ls -A "$0"; exit $s'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(disk), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    left = [name for name in done.stdout.split("\n") if name and not unfinished(name)]
    return done.returncode, done.stderr, left


def unfinished(name: str) -> bool:
    """What a later run goes on from, and the lock of the folder."""
    return ".part" in name or name.endswith((".resume", ".lock")) or name.startswith(".")


def files(folder: Path) -> list[Path]:
    """All of them, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(folder)
    }


def clear(folder: Path, keep: Iterable[str] = ()) -> None:
    """Empty it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.name not in keep:
            path.rmdir() if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
