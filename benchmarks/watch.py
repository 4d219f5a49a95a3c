"""Runs a program and watches its time and memory; reads and writes files plainly beside it."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLING_SECONDS = 0.05
CHUNK_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Watched:
    """A run of a program.

    Attributes:
        seconds: from its start to its end.
        peak_bytes: most anonymous memory its processes held together; what the page cache holds
            of files does not count.
        lines: what it printed, each line with the seconds from the start.
    """

    seconds: float
    peak_bytes: int
    lines: tuple[tuple[float, str], ...]


def watch(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Watched:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    started, peak, lines, rest = time.monotonic(), 0, [], b""
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | (environment or {}),
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        ended = False
        while not ended:
            ended = process.poll() is not None
            peak = max(peak, anonymous_bytes(process.pid))
            *whole, rest = (rest + (process.stdout.read() or b"")).split(b"\n")
            lines += [
                (time.monotonic() - started, line.decode("utf-8", "replace")) for line in whole
            ]
            if not ended:
                time.sleep(SAMPLING_SECONDS)
        seconds = time.monotonic() - started
    if process.returncode:
        last = "\n".join(line for _, line in lines[-30:])
        raise SystemExit(f"{' '.join(map(str, command))}\n{last}")
    return Watched(seconds, peak, tuple(lines))


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process and its children now; 0 when it is gone."""
    try:
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return 0
    return sum(map(_anonymous_bytes, pids))


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
    return 1024 * int(found[1]) if found else 0


def forget(folder: Path) -> None:
    """Drop what the page cache holds of a folder's files, so that a run reads the disk."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: Iterable[Path]) -> float:
    """Seconds of a plain sequential read."""
    started = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass
    return time.monotonic() - started


def write_plainly(path: Path, nbytes: int) -> float:
    """Seconds of a plain sequential write that reaches the disk; the file is removed."""
    chunk = os.urandom(CHUNK_BYTES)
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, CHUNK_BYTES):
            file.write(chunk[: nbytes - start])
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return seconds
