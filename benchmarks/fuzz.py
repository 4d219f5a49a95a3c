"""Damages every kind of file that lfmq opens, and counts what becomes of it.

Each input is made from a seed, its kind and its number, so that any of them can be made again.
It is opened in a process with limits of time and memory. Right is one line that says what is
wrong, or the weights that the file holds; faults are any other exception, a line that is too long,
a hang, a process that ends or grows, and weights that are not the file's.

    python benchmarks/fuzz.py --count 10000
    python benchmarks/fuzz.py --kind gguf --first 812 --count 1    # one input again
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lfmq.benchmarks.fuzz_kinds import KINDS, Refused, copy_subjects, make_subjects
from lfmq.cli import _one_line
from lfmq.quant.errors import LfmqError

SECONDS = 10.0  # of processor time: other programs may be at work
WALL_SECONDS = 6 * SECONDS
TICKS = os.sysconf("SC_CLK_TCK")
MEMORY = 2 * 2**30
LONGEST_LINE = 400
RIGHT = ("refused", "accepted")


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    kind: str
    number: int
    result: str  # refused, accepted, or the word of a fault
    detail: str = ""


def main() -> None:
    """Run all inputs; print each fault, counts by kind, and a line of JSON."""
    options = parse_options()
    kinds = options.kind or list(KINDS)
    inputs = [
        (kinds[i % len(kinds)], options.first + i // len(kinds)) for i in range(options.count)
    ]
    with tempfile.TemporaryDirectory(prefix="lfmq-fuzz-") as scratch:
        outcomes = []
        for o in fuzz(inputs, options.seed, Path(scratch), options.workers):
            outcomes.append(o)
            if options.show or o.result not in RIGHT:
                print(f"{o.kind} {o.number}: {o.result}: {o.detail}", flush=True)
    print_outcomes(outcomes)
    faults = [o for o in outcomes if o.result not in RIGHT]
    counts = Counter(o.result for o in outcomes)
    print(json.dumps({"seed": options.seed, "inputs": len(outcomes), "results": counts}))
    if faults:
        raise SystemExit(1)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="inputs, of all kinds together")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of each kind's first input")
    parser.add_argument("--show", action="store_true", help="print every line of refusal")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


# ---- processes


class Worker:
    """A process that opens inputs, one after another."""

    def __init__(self, seed: int, subjects: Path, folder: Path) -> None:
        copy_subjects(subjects, folder)
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(theirs, seed, folder), daemon=True)
        self.process.start()
        theirs.close()
        self.now: tuple[str, int] | None = None
        self.began = (0.0, 0.0)

    def give(self, kind: str, number: int) -> None:
        """Send it the next input."""
        self.now, self.began = (kind, number), (time.monotonic(), self._used())
        self.pipe.send(self.now)

    def hangs(self) -> bool:
        """Whether its input took too long."""
        wall, used = self.began
        return time.monotonic() - wall > WALL_SECONDS or self._used() - used > SECONDS

    def _used(self) -> float:
        """Processor time of the process, seconds."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(
    inputs: list[tuple[str, int]], seed: int, scratch: Path, workers: int
) -> Iterator[Outcome]:
    """Open every input in one of several processes; a process that hangs or ends is replaced."""
    subjects = scratch / "subjects"
    subjects.mkdir()
    torch.set_num_threads(1)
    make_subjects(subjects)
    names = iter(range(10**9))
    pool = [Worker(seed, subjects, scratch / str(next(names))) for _ in range(workers)]
    waiting = iter(inputs)
    try:
        busy: list[Worker] = []
        for worker in pool:
            if (following := next(waiting, None)) is not None:
                worker.give(*following)
                busy.append(worker)
        while busy:
            ready = wait([w.pipe for w in busy], timeout=0.5)
            for worker in list(busy):
                if worker.pipe not in ready and not worker.hangs():
                    continue
                assert worker.now is not None
                outcome = _received(worker, worker.pipe in ready)
                yield outcome
                if outcome.result in ("hang", "crash"):
                    worker.stop()
                    pool.remove(worker)
                    busy.remove(worker)
                    worker = Worker(seed, subjects, scratch / str(next(names)))
                    pool.append(worker)
                    busy.append(worker)
                if (following := next(waiting, None)) is None:
                    busy.remove(worker)
                else:
                    worker.give(*following)
    finally:
        for worker in pool:
            worker.stop()


def _received(worker: Worker, ready: bool) -> Outcome:
    assert worker.now is not None
    if not ready:
        return Outcome(*worker.now, "hang", f"more than {SECONDS:g} s")
    try:
        return Outcome(*worker.now, *worker.pipe.recv())
    except EOFError:
        worker.process.join(1)
        return Outcome(*worker.now, "crash", f"exit status {worker.process.exitcode}")


def _serve(pipe: Connection, seed: int, folder: Path) -> None:
    """Open what is asked for until nobody asks; each sound file once, to compare with."""
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    sound: dict[str, Any] = {}
    with Path("/proc/self/statm").open() as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    while True:
        kind, number = pipe.recv()
        if kind not in sound and kind != "options":
            sound[kind] = KINDS[kind].run(folder)
        pipe.send(_open(kind, number, seed, folder, sound.get(kind)))


def _open(kind: str, number: int, seed: int, folder: Path, sound: Any) -> tuple[str, str]:
    """Damage one file, open it, and put the sound one back."""
    rules = KINDS[kind]
    path = folder / rules.file
    kept = path.read_bytes() if path.exists() else b""
    rng = random.Random(f"{seed}/{kind}/{number}")
    content = rules.mutate(rng, kept)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        return _judged(rules, folder, sound)
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(kept)


def _judged(rules: Any, folder: Path, sound: Any) -> tuple[str, str]:
    try:
        found = rules.run(folder)
    except (LfmqError, Refused, OSError) as error:
        line = _one_line(str(error))
        if len(line) > LONGEST_LINE or not line:
            return "long line", f"{len(line)} characters: {line[:300]}"
        return "refused", line
    except MemoryError:
        return "memory", traceback.format_exc(limit=-3)[-600:]
    except BaseException as error:  # a panic of Rust is one
        return "traceback", f"{error!r:.200} {_where(error)}"
    wrong = rules.judge(folder, sound, found)
    return ("wrong", wrong) if wrong else ("accepted", "")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/lfmq/" in f.filename]
    return " ".join(ours[-4:])


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Counts by kind."""
    words = [*RIGHT, *sorted({o.result for o in outcomes} - set(RIGHT))]
    table = Table(title=f"{len(outcomes):,} damaged inputs")
    for column in ("kind", *words):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in KINDS:
        counts = Counter(o.result for o in outcomes if o.kind == kind)
        if counts:
            table.add_row(kind, *(str(counts[word]) for word in words))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
