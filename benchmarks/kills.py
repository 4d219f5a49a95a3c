"""SIGKILLs ``lfmq convert`` at random moments and counts how often the next run ends the same.

A first run is left alone; its bytes are what every other must end with. Each kill falls, from a
seed, between a run's first file and the time that the first run took from there to its manifest;
the same command then goes on. Builds, manifest and what else is in the folder must be identical.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

POLL_SECONDS = 0.001


def main() -> None:
    """Run, kill, go on, compare; print a table and a line of JSON."""
    options = parse_options()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        reference = Path(scratch) / "reference"
        seconds = convert(options, reference)
        expected = content(reference)
        shutil.rmtree(reference)
        kills = []
        for _ in range(options.kills):
            output = Path(scratch) / "killed"
            kills.append(kill(options, output, rng.uniform(0, seconds), expected))
            shutil.rmtree(output)
    result = {
        "checkpoint": options.checkpoint,
        "seconds": seconds,
        "seed": options.seed,
        "kills": kills,
        "identical": sum(found["identical"] for found in kills),
    }
    print_table(result)
    print(json.dumps(result))
    if result["identical"] != len(kills):
        raise SystemExit(1)


def parse_options() -> argparse.Namespace:
    """The command line; what is not known here goes to ``lfmq convert``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="sample", help="a folder, or 'sample'")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="folder for what is written")
    options, words = parser.parse_known_args()
    options.words = words or ["--uncalibrated"]
    return options


def start(options: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    """Begin a conversion."""
    command = [sys.executable, "-m", "lfmq.cli", "convert", options.checkpoint, "--quiet"]
    command += ["--output", str(output), *options.words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def first_file(process: subprocess.Popen[bytes], output: Path) -> float:
    """Wait until the run has made a build's first file; when that was."""
    while process.poll() is None and not any(output.glob("*.part*")):
        time.sleep(POLL_SECONDS)
    return time.monotonic()


def convert(options: argparse.Namespace, output: Path) -> float:
    """Let a run come to its end; seconds from its first file to its manifest."""
    with start(options, output) as process:
        began = first_file(process, output)
        while process.poll() is None and not any(output.glob("*.manifest.json")):
            time.sleep(POLL_SECONDS)
        ended = time.monotonic()
    if process.returncode:
        raise SystemExit(process.returncode)
    return ended - began


def kill(
    options: argparse.Namespace, output: Path, seconds: float, expected: dict[str, str]
) -> dict[str, Any]:
    """Kill a run some seconds after its first file, go on, compare."""
    with start(options, output) as process:
        began = first_file(process, output)
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(POLL_SECONDS)
        process.send_signal(signal.SIGKILL)
    units = [lines(path) - 1 for path in output.glob("*.part.journal")]
    again = time.monotonic()
    # A run that had named its manifest when it was killed was over, and the next one says so.
    over = process.returncode == 0 or any(output.glob("*.manifest.json"))
    with start(options, output) as process:
        pass  # wait
    return {
        "after_seconds": seconds,
        "units": max(units, default=0),
        "over": over,
        "seconds": time.monotonic() - again,
        "identical": content(output) == expected and (over or process.returncode == 0),
    }


def lines(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n")


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[os.fspath(path.relative_to(folder))] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


def print_table(result: dict[str, Any]) -> None:
    """One row for each kill."""
    table = Table(
        title=f"{result['identical']} of {len(result['kills'])} killed runs ended byte-identical"
    )
    for column in ("killed after s", "units finished", "going on took s", "identical"):
        table.add_column(column, justify="right")
    for found in result["kills"]:
        units = "over" if found["over"] else str(found["units"])
        times = (f"{found['after_seconds']:.3f}", units, f"{found['seconds']:.1f}")
        table.add_row(*times, "yes" if found["identical"] else "no")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
