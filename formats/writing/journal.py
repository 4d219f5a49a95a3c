"""The journal of a build: what of it is on the disk, so that a killed run goes on where it was.

A text file beside the build, one JSON object a line, only ever appended to. The first line says
what the bytes depend on (``depends``); each other one is a finished unit of the plan: the names of
its tensors and the digest of each piece of their packed bytes. ``{"whole": INODE}`` ends it,
before the build gets its name. A killed process loses nothing of what it wrote, a machine without
power may lose any of it: digests tell, and a last line without its end does not count.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from lfmq.formats.build import BuildLayout

VERSION = 2
_DIGITS = 16  # of a digest; it tells damage, not intent


@dataclass(frozen=True, slots=True)
class Past:
    """What a journal says of an earlier run.

    Attributes:
        changed: why the build cannot go on; empty when it can.
        units: digests of the segments of each finished unit, by the names of its tensors.
        whole: inode of the build once every byte was on the disk and it was about to get its name;
            whatever has that inode under the final name is this build and no older one.
        nbytes: length of the journal up to the end of its last whole line.
    """

    changed: str = ""
    units: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    whole: int | None = None
    nbytes: int = 0


class Journal:
    """One journal file; lines may be added from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._lock = Lock()

    def read(self, depends: Mapping[str, str]) -> Past | None:
        """What an earlier run left; None when it left no journal.

        Args:
            depends: what the bytes depend on, now; keys are words for the user.
        """
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        nbytes = content.rfind(b"\n") + 1
        if not nbytes:
            return None
        header, *lines = (_parse(line) for line in content[:nbytes].splitlines())
        before = header.get("depends")
        if header.get("journal") != VERSION or not isinstance(before, dict):
            return Past("its journal cannot be read")
        for key in {**depends, **before}:
            if before.get(key) != depends.get(key):
                return Past(f"{key} changed")
        units = {tuple(line["unit"]): tuple(line["segments"]) for line in lines if _is_unit(line)}
        ends = [line["whole"] for line in lines if "whole" in line]
        return Past("", units, ends[-1] if ends else None, nbytes)

    def create(self, depends: Mapping[str, str]) -> None:
        """Begin anew."""
        self._open(os.O_EXCL)
        self._append({"journal": VERSION, "depends": dict(depends)})

    def go_on(self, past: Past) -> None:
        """Append to what an earlier run left, without the line it did not end."""
        self._open(0)
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, past.nbytes)

    def _open(self, flags: int) -> None:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(self.path, flags, 0o644)

    def add(self, names: tuple[str, ...], segments: tuple[str, ...]) -> None:
        """A unit whose bytes are all written.

        Raises:
            FileNotFoundError: the journal was removed, and so what it stands beside.
        """
        self._append({"unit": names, "segments": segments})

    def end(self, inode: int) -> None:
        """The build is whole; on the disk before anything is renamed."""
        self._append({"whole": inode})
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def _append(self, document: dict[str, Any]) -> None:
        line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self._descriptor is None:
                raise ValueError(f"{self.path}: not open")
            if not os.fstat(self._descriptor).st_nlink:
                raise FileNotFoundError(None, "removed while it was written", str(self.path))
            if os.write(self._descriptor, line) != len(line):
                os.write(self._descriptor, b"\n")  # no room: the error comes with this one

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def remove(self) -> None:
        """Drop the file: the build is done with, or starts over."""
        self.close()
        with suppress(FileNotFoundError, NotADirectoryError):
            self.path.unlink()


def digest_of(chunks: Iterable[Any]) -> str:
    """A piece's digest: the first digits of the sha256 of its bytes, which come in chunks."""
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()[:_DIGITS]


def digest(layout: BuildLayout) -> str:
    """sha256 of everything a layout fixes: files, sizes, known bytes, and every piece's place."""
    found = hashlib.sha256()
    for file in layout.files:
        constants = [(at, hashlib.sha256(content).hexdigest()) for at, content in file.constants]
        segments = [(p.offset, p.nbytes, p.sources) for p in file.segments]
        facts = (layout.format, layout.single_file, file.path, file.size, constants, segments)
        found.update(json.dumps(facts).encode())
    return found.hexdigest()


def _parse(line: bytes) -> dict[str, Any]:
    """A line's object; empty for a damaged line, whose unit is then written again."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_unit(line: dict[str, Any]) -> bool:
    lists = [line.get("unit"), line.get("segments")]
    return bool(lists[0]) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists
    )
