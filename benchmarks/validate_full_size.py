"""Seconds and memory of validating a build of a full-size checkpoint.

Runs ``lfmq validate --engine read`` in a process of its own and samples its anonymous resident
memory, as ``full_size.py`` does.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from watch import watch


def main() -> None:
    """Validate, print a line of figures and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--by-layer", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "lfmq.cli", "validate"]
    command += [str(options.checkpoint), str(options.build), "--quiet", "--json"]
    for name in ("tokens", "sequence", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--by-layer"] if options.by_layer else []
    found = run(command)
    print(
        f"{options.build.name}: {options.tokens:,} tokens in windows of {options.sequence:,}, "
        f"{options.threads} threads: {found['seconds']:.1f} s, "
        f"peak anonymous memory {found['peak_anonymous_bytes'] / 1e6:,.0f} MB"
    )
    print(json.dumps(found))


def run(command: list[str]) -> dict[str, Any]:
    """Run a command that prints a report and watch its memory."""
    found = watch(command)
    (text,) = (line for _, line in found.lines if line.startswith("{"))
    build = json.loads(text)["builds"][0]
    return {
        "seconds": found.seconds,
        "peak_anonymous_bytes": found.peak_bytes,
        "bytes": build["bytes"],
        "kld_mean": build["kld"]["mean"],
        "routing_exact_set": build["routing"]["exact_set"],
    }


if __name__ == "__main__":
    main()
