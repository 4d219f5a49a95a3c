"""Packs weights and writes them where a layout says; works in any process that sees the files."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lfmq.formats.build import BuildLayout, Segment
from lfmq.formats.writing.journal import digest_of
from lfmq.quant.errors import PlanError
from lfmq.quant.types import SLAB, Weight, rows_of


class Filler:
    """Packs weights and writes them where they belong, in any process that sees the files.

    Attributes:
        part: the build under its temporary name.
        finished: first tensors of units that are there already.
    """

    def __init__(self, part: Path, layout: BuildLayout, finished: frozenset[str]) -> None:
        self.part = part
        self.finished = finished
        self._by_source: dict[str, list[tuple[str, Segment]]] = {}
        for file in layout.files:
            for segment in file.segments:
                self._by_source.setdefault(segment.sources[0], []).append((file.path, segment))

    def segments(self, names: Iterable[str]) -> list[tuple[str, Segment]]:
        """Pieces that a unit's tensors fill in, each with its file."""
        return [placed for name in names for placed in self._by_source.get(name, ())]

    def fill(self, weights: Mapping[str, Weight], files: Mapping[str, int]) -> tuple[str, ...]:
        """Pack and write every segment made of these tensors; the digest of each.

        Raises:
            OSError: the file system refused.
        """
        return tuple(
            digest_of(_write_segment(path, files[path], segment, weights))
            for path, segment in self.segments(weights)
        )

    def fill_alone(self, weights: Mapping[str, Weight]) -> tuple[str, ...]:
        """The same with files opened for it and closed after, which shared storage wants.

        Raises:
            PlanError: the file system refused.
        """
        if next(iter(weights)) in self.finished:
            return ()
        paths = {path for path, _ in self.segments(weights)}
        files: dict[str, int] = {}
        try:
            for path in sorted(paths):
                place = self.part / path if path else self.part
                files[path] = os.open(place, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            return self.fill(weights, files)
        except OSError as error:
            reason = error.strerror or error
            raise PlanError(f"{self.part}: cannot be written ({reason})") from error
        finally:
            for descriptor in files.values():
                os.close(descriptor)


def _write_segment(
    path: str, descriptor: int, segment: Segment, weights: Mapping[str, Weight]
) -> Iterator[memoryview]:
    """Pack and write a segment, yielding its bytes as they are written."""
    at, end = segment.offset, segment.offset + segment.nbytes
    for parts in _slabs(segment, [weights[source] for source in segment.sources]):
        content = segment.pack(*parts).data.cast("B")
        if at + content.nbytes <= end:
            write_all(descriptor, content, at)
            yield content
        at += content.nbytes
    if at != end:
        raise ValueError(
            f"{path} at {segment.offset}: {at - segment.offset} bytes for a segment of "
            f"{segment.nbytes} ({', '.join(segment.sources)})"
        )


def _slabs(segment: Segment, weights: list[Weight]) -> Iterator[list[Weight]]:
    """The weights of a segment, a large one a few rows at a time where its bytes allow."""
    shape = weights[0].shape
    rows = max(1, SLAB * shape[0] // max(1, math.prod(shape)))
    if not segment.by_rows or rows >= shape[0]:
        yield weights
        return
    for start in range(0, shape[0], rows):
        yield [rows_of(w, start, start + rows) for w in weights]


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write at an offset, however often the system stops short."""
    content = content.cast("B")
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
