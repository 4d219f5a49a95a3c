"""A child that does what a test asks, also to its end."""

import os
import time
from typing import Any

from lfmq.converter.jobs.limited_child import serve


def loop() -> None:
    while True:
        pass


def write() -> None:
    with open(f"/tmp/lfmq-limited-{os.getpid()}", "wb") as file:
        os.unlink(file.name)
        file.write(b"x")


TRICKS = {
    "loop": loop,
    "sleep": lambda: time.sleep(1000),
    "abort": os.abort,
    "exit": lambda: os._exit(7),
    "memory": lambda: len(bytearray(2**30)),
    "write": write,
    "print": lambda: print("to nowhere"),  # noqa: T201
}


def answer(question: list[Any]) -> Any:
    """The second word of the question, after doing what the first says."""
    what, *rest = question
    if what in TRICKS:
        TRICKS[what]()
    return "x" * rest[0] if what == "answer" else rest[0] if rest else None


if __name__ == "__main__":
    serve(answer)
