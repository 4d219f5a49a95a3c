"""Work on what strangers wrote, in a process of its own with limits of time and memory.

A chat template may loop for ever or ask for gigabytes, and a tokenizer's native code may abort.
The parent writes questions to a pipe, one line of JSON each; the child answers each with one line.
It limits itself before it reads the first: the processor time of an answer, the memory, and no
file may be written. How it died says which question it died of, and of what.
"""

import io
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

from lfmq.quant.errors import ValidationError

_START_SECONDS = 60.0  # to import its modules, on a machine that is busy
# The child has its parent's own package, wherever that was imported from.
_START = """
import importlib.util, runpy, sys
root, module = sys.argv[1:3]
del sys.argv[1:3]
spec = importlib.util.spec_from_file_location(
    "lfmq", root + "/__init__.py", submodule_search_locations=[root]
)
sys.modules["lfmq"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["lfmq"])
runpy.run_module(module, run_name="__main__")
"""
_BUSY = 3  # how many times the processor time an answer may take on a machine that is busy


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use.

    Attributes:
        seconds: of processor time for an answer.
        memory: bytes of address space.
        answer: bytes of an answer.
    """

    seconds: int = 3
    memory: int = 2**30
    answer: int = 2**26


class ChildDied(Exception):
    """The child gave no answer; the message says why, in words for the user."""


# ---- parent


def ask(module: str, questions: Iterable[Any], limits: Limits) -> Generator[Any]:
    """Have ``module`` answer each question in a child, in order.

    Args:
        module: one that calls :func:`serve` when it is run.
        questions: values that JSON holds.
        limits: of the child.

    Yields:
        The answers, one for each question.

    Raises:
        ChildDied: instead of the first answer that is missing.
        ValidationError: the child could not be started.
    """
    listed = list(questions)
    root = str(Path(__file__).resolve().parents[2])
    words = [root, module, str(limits.seconds), str(limits.memory)]
    command = [sys.executable, "-P", "-c", _START, *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        feeder = Thread(target=_feed, args=(child, listed), daemon=True)
        feeder.start()
        try:
            yield from _answers(child, len(listed), limits)
        finally:
            child.kill()  # which ends the feeder too
            feeder.join()


def _feed(child: "subprocess.Popen[bytes]", questions: list[Any]) -> None:
    assert child.stdin is not None
    with suppress(OSError), child.stdin as stream:  # a child that died takes no more
        for question in questions:
            stream.write(json.dumps(question).encode() + b"\n")
            stream.flush()


def _answers(child: "subprocess.Popen[bytes]", count: int, limits: Limits) -> Generator[Any]:
    assert child.stdout is not None
    lines = _Lines(child.stdout, limits.answer)
    with suppress(TimeoutError):
        if not lines.next(_START_SECONDS):  # it has imported its modules
            raise ValidationError(
                f"a process that lfmq starts for itself {_death(child.wait(), limits)} before its "
                "first answer; install lfmq and its dependencies again"
            )
    for _ in range(count):
        try:
            line = lines.next(limits.seconds * _BUSY)
        except TimeoutError:
            raise ChildDied(f"took more than {limits.seconds} s") from None
        except OverflowError:
            raise ChildDied(f"gave more than {limits.answer:,} bytes") from None
        if not line:
            raise ChildDied(_death(child.wait(), limits))
        yield json.loads(line)


def _death(status: int, limits: Limits) -> str:
    if -status == signal.SIGXCPU:
        return f"took more than {limits.seconds} s"
    if status < 0:
        with suppress(ValueError):
            return f"ended its process with {signal.Signals(-status).name}"
    return f"ended its process with status {status}"


class _Lines:
    """Lines of a pipe, each within a time and a length."""

    def __init__(self, stream: IO[bytes], longest: int) -> None:
        self._descriptor = stream.fileno()
        self._longest = longest
        self._rest = bytearray()

    def next(self, seconds: float) -> bytes:
        """The next line; empty at the end.

        Raises:
            TimeoutError: none came in so many seconds.
            OverflowError: it is too long.
        """
        deadline, searched = time.monotonic() + seconds, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            while (end := self._rest.find(b"\n", searched)) < 0:
                searched = len(self._rest)
                if searched > self._longest:
                    raise OverflowError
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._descriptor, 2**20)
                if not chunk:
                    return b""
                self._rest += chunk
        if end > self._longest:
            raise OverflowError
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line or b" "


# ---- child


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the questions of stdin, each in its time; the main of a child's module.

    Args:
        answer: takes a question, returns what JSON holds.
    """
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, memory)
    # what libraries print goes nowhere, answers through a descriptor of their own
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr = _Nowhere()
    pipe.write("ready\n")
    pipe.flush()
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        pipe.write(json.dumps(answer(json.loads(line))) + "\n")
        pipe.flush()


class _Nowhere(io.TextIOBase):
    """Takes all text, whatever the limit on files says of the null device."""

    def write(self, text: str) -> int:
        return len(text)


def _limit(kind: int, value: int) -> None:
    with suppress(ValueError, OSError):  # a stricter limit of the system's own stays
        resource.setrlimit(kind, (value, value))
