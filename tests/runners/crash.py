"""Runs ``convert`` over and over, killed before its first, second, third... call that counts.

``python crash.py CHECKPOINT FOLDER FORMATS [all]``: one process imports everything and forks a run
for each point, which kills itself there with SIGKILL, then goes on. Prints a line of JSON.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import PlanError

# Everything that changes a file, a folder or what is on the disk.
CALLS = (
    "fsync",
    "ftruncate",
    "mkdir",
    "open",
    "posix_fallocate",
    "pwrite",
    "rename",
    "replace",
    "unlink",
    "write",
)

# Once for all runs: it has the tokenizer tried in a child.
OPENED = cache(open_checkpoint)


@contextmanager
def killed_at(point: int) -> Iterator[list[int]]:
    """SIGKILL this process before its call number ``point``; the list counts the calls."""
    count, real = [0], {name: getattr(os, name) for name in CALLS}

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if count[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return call(*arguments, **options)

        return counted

    for name, call in real.items():
        setattr(os, name, watched(call))
    try:
        yield count
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def run(checkpoint: Path, output: Path, formats: list[str], point: int = -1) -> int:
    """Convert in this process; the number of calls that count."""
    opened, recipe = OPENED(checkpoint), load_recipe("int4")
    plan = resolve_plan(opened.config, recipe)
    chosen = {name: FORMATS[name] for name in formats}
    with killed_at(point) as count:
        convert(opened, recipe, plan, chosen, output, execution=Execution(threads=1))
    return count[0]


def killed(checkpoint: Path, output: Path, formats: list[str], point: int) -> bool:
    """Whether a run in a process of its own was killed at this point."""
    child = os.fork()
    if not child:
        try:
            run(checkpoint, output, formats, point)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def goes_on(checkpoint: Path, output: Path, formats: list[str]) -> bool:
    """Whether the next run came to its end; it is refused when the last one had done so."""
    try:
        run(checkpoint, output, formats)
    except PlanError as error:
        sys.stderr.write(f"{error}\n")
        return False
    return True


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones among them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def points(total: int) -> list[int]:
    """The end, where names are given, whole; some of the beginning and of the middle."""
    return [0, 5, 11, 20, *range(40, total - 24, (total - 64) // 3), *range(total - 24, total)]


def main(checkpoint: Path, folder: Path, formats: list[str], every: bool) -> None:
    """Kill and go on at each point."""
    run(checkpoint, folder / "warm", formats)  # imports and compiled functions
    total = run(checkpoint, folder / "reference", formats)
    expected = content(folder / "reference")
    output = folder / "killed"
    outcome: dict[str, list[int]] = {"identical": [], "named": [], "different": []}
    for point in range(total) if every else points(total):
        if not killed(checkpoint, output, formats, point):
            raise SystemExit(f"not killed at {point} of {total}")
        # Once the manifest has its name, the next run may find that there is nothing to do.
        named = any(output.glob("*.manifest.json")) and content(output).items() >= expected.items()
        ended = goes_on(checkpoint, output, formats)
        found = content(output)
        kind = "identical" if ended and found == expected else "different"
        if named and not ended:
            kind = "named"
        outcome[kind].append(point)
        shutil.rmtree(output)
    print(json.dumps({"calls": total, **outcome}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), "all" in sys.argv[4:])
