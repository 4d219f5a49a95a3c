"""CPU seconds that commands need before they do anything: user and system, the best of five.

    python benchmarks/startup.py

Exits with status 1 when one needs more than its limit.
"""

import os
import subprocess
import sys

RUNS = 5
# What is started, and the most CPU seconds it may take on the machine of docs/running.md.
STARTS = (
    ("import lfmq", ("-c", "import lfmq"), 0.2),
    ("lfmq --version", ("-m", "lfmq.cli", "--version"), 0.5),
    ("lfmq --help", ("-m", "lfmq.cli", "--help"), 0.5),
    ("lfmq inspect sample", ("-m", "lfmq.cli", "inspect", "sample"), 1.0),
    ("lfmq plan sample", ("-m", "lfmq.cli", "plan", "sample"), 1.0),
)


def cpu_seconds(words: tuple[str, ...]) -> float:
    """User and system time of one run of this interpreter."""
    before = os.times()
    subprocess.run([sys.executable, "-P", *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user - before.children_user
    return spent + after.children_system - before.children_system


def main() -> None:
    """See the module."""
    missed = 0
    for name, words, limit in STARTS:
        best = min(cpu_seconds(words) for _ in range(RUNS))
        missed += best > limit
        print(f"{name:22} {best:.2f} s, at most {limit:.1f}{'  MISSED' if best > limit else ''}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
