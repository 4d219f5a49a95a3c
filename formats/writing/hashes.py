"""sha256 of a build's files, taken while they are filled in.

A thread reads each file behind the segments that are written, out of the page cache, so that the
hashes are there when the last segment is.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from heapq import heapify, heappop
from threading import Condition

from lfmq.formats.build import FileLayout
from lfmq.formats.writing.page_cache import PageTrail

# Small enough to be hashed before it leaves the processor's cache.
_CHUNK = 2**20
# Kept in the page cache until the disk has it, bytes.
_BEHIND = 2**28


class TrailingHashes:
    """Hashes of files whose segments are finished in any order; :meth:`stop` ends the thread.

    With ``drop_page_cache`` what is hashed is let go of by the page cache.
    """

    def __init__(
        self,
        files: Iterable[FileLayout],
        descriptors: Mapping[str, int],
        *,
        drop_page_cache: bool = False,
    ) -> None:
        self._descriptors = descriptors
        self._trail = PageTrail(_BEHIND, active=drop_page_cache, written=True)
        layouts = tuple(files)
        self._sizes = {file.path: file.size for file in layouts}
        self._missing = {f.path: [p.offset for p in f.segments if p.nbytes] for f in layouts}
        for offsets in self._missing.values():
            heapify(offsets)
        self._finished: dict[str, set[int]] = {path: set() for path in self._sizes}
        self._hashes = {path: hashlib.sha256() for path in self._sizes}
        self._done = dict.fromkeys(self._sizes, 0)
        self._stopped = False
        self._changed = Condition()
        self._pool = ThreadPoolExecutor(1)
        self._found = self._pool.submit(self._run)

    def finished(self, segments: Iterable[tuple[str, int]]) -> None:
        """Pieces, by file and offset, whose bytes are all written."""
        with self._changed:
            for path, offset in segments:
                self._finished[path].add(offset)
                missing = self._missing[path]
                while missing and missing[0] in self._finished[path]:
                    self._finished[path].discard(heappop(missing))
            self._changed.notify_all()

    def result(self) -> dict[str, str]:
        """By file, once every piece is finished.

        Raises:
            OSError: a file cannot be read.
        """
        return self._found.result()

    def stop(self) -> None:
        """Have the thread end, whatever it has not read."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown()

    def _is_over(self) -> bool:
        return all(self._done[path] == size for path, size in self._sizes.items())

    def _next(self) -> tuple[str, int] | None:
        """A file and how far it can be read, or None at the end."""
        with self._changed:
            while not self._stopped and not self._is_over():
                for path, size in self._sizes.items():
                    limit = self._missing[path][0] if self._missing[path] else size
                    if self._done[path] < limit:
                        return path, limit
                self._changed.wait()
        return None

    def _run(self) -> dict[str, str]:
        chunk = memoryview(bytearray(_CHUNK))
        while (found := self._next()) is not None:
            path, limit = found
            at = self._done[path]
            part = chunk[: min(_CHUNK, limit - at)]
            count = os.preadv(self._descriptors[path], [part], at)
            if not count:
                raise FileNotFoundError(None, "removed or cut while it was written")
            self._hashes[path].update(part[:count])
            self._trail.passed(self._descriptors[path], at, at + count)
            self._done[path] += count
        return {path: found.hexdigest() for path, found in self._hashes.items()}
