"""Seconds, bytes and memory of converting a checkpoint of LFM2.5-8B-A1B's exact shapes.

Runs ``lfmq convert`` in a process of its own and samples its anonymous resident memory
(``RssAnon`` of /proc/PID/status: what the page cache holds of files does not count), beside a
plain read of the input. Without ``--checkpoint`` a checkpoint is made first (17 GB, two minutes).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lfmq.formats.registry import FORMATS

MAKER = Path(__file__).with_name("make_checkpoint.py")
SAMPLING_SECONDS = 0.05
READ_BYTES = 2**24


def main() -> None:
    """Make what is missing, convert, print a table and a line of JSON."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(scratch) / "full-size"
            subprocess.run([sys.executable, str(MAKER), str(checkpoint)], check=True)
        read_bytes, read_seconds = read_plainly(checkpoint)
        runs = [
            convert(checkpoint, Path(scratch) / "builds", formats, options)
            for formats in options.formats
        ]
    result = {
        "input_bytes": read_bytes,
        "plain_read_seconds": read_seconds,
        "cores": len(os.sched_getaffinity(0)),
        "recipe": options.recipe,
        "runs": runs,
    }
    print_table(result)
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint made before")
    parser.add_argument("--scratch", type=Path, help="folder for what is written, 40 GB")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--formats",
        action="append",
        type=lambda text: text.split(","),
        help="formats of one run, separated by commas; may be repeated. Default: all in one run",
    )
    parser.add_argument("--calibrated", action="store_true", help="with the sample's text")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration text")
    options = parser.parse_args()
    options.formats = options.formats or [list(FORMATS)]
    return options


def read_plainly(checkpoint: Path) -> tuple[int, float]:
    """Bytes of the weight files and the seconds a plain sequential read takes."""
    started, total = time.monotonic(), 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(READ_BYTES):
                total += len(chunk)
    return total, time.monotonic() - started


def convert(
    checkpoint: Path, output: Path, formats: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Run ``lfmq convert`` and watch its memory."""
    command = [sys.executable, "-m", "lfmq.cli", "convert", str(checkpoint)]
    command += ["--output", str(output), "--recipe", options.recipe, "--force"]
    command += ["--threads", str(options.threads), "--quiet", "--json"]
    command += ["--tokens", str(options.tokens)] if options.calibrated else ["--uncalibrated"]
    command += [word for name in formats for word in ("--to", name)]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLING_SECONDS)
        seconds = time.monotonic() - started
        text = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "formats": formats,
        "seconds": seconds,
        "peak_anonymous_bytes": peak,
        "builds": json.loads(text)["builds"],
    }


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process now, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
    return 1024 * int(found[1]) if found else 0


def print_table(result: dict[str, Any]) -> None:
    """One row for each build."""
    table = Table(
        title=f"{result['input_bytes']:,} bytes in, plain read "
        f"{result['plain_read_seconds']:.1f} s, {result['cores']} cores, {result['recipe']}"
    )
    for column in ("run", "seconds", "peak anonymous MB", "format", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    for run in result["runs"]:
        for i, build in enumerate(run["builds"]):
            head = ("+".join(run["formats"]), f"{run['seconds']:.1f}")
            memory = f"{run['peak_anonymous_bytes'] / 1e6:,.0f}"
            size = (build["format"], f"{build['bytes']:,}", f"{build['bits_per_weight']:.3f}")
            table.add_row(*((*head, memory) if i == 0 else ("", "", "")), *size)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
