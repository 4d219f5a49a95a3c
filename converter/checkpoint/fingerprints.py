"""Hashes of the checkpoint's files, taken by one read that runs a little ahead of the work.

The read is sequential, which disks like best, and leaves in the page cache what the work reads
next: each byte comes from the disk once.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.formats.writing.page_cache import PageTrail
from lfmq.quant.errors import CheckpointError

# How far the read runs ahead, bytes; less than any machine's page cache.
_AHEAD = 2**29
# What is kept behind the read, bytes: what the work may still want, and what it is at.
_BEHIND = _AHEAD + 2**28
# Small enough to be hashed before it leaves the processor's cache.
_CHUNK = 2**20


def input_files(checkpoint: Checkpoint) -> list[Path]:
    """Every file of the checkpoint's folder that a build depends on."""
    folder = checkpoint.folder
    inputs = [*checkpoint.weight_files, folder / "config.json"]
    inputs += [folder / name for name in sorted(checkpoint.assets.files)]
    inputs += [checkpoint.index] if checkpoint.index is not None else []
    return [path for path in inputs if path.is_file()]


class Fingerprints:
    """Size and sha256 of every input; a context manager whose end stops the read.

    With ``drop_page_cache`` what the work is done with is let go of by the page cache.
    """

    def __init__(self, checkpoint: Checkpoint, *, drop_page_cache: bool = False) -> None:
        self._folder = checkpoint.folder
        self._files = input_files(checkpoint)
        self._memory_headroom: float = _AHEAD
        self._stopped = False
        self._changed = Condition()
        self._pool = ThreadPoolExecutor(1)
        self._trail = PageTrail(_BEHIND, active=drop_page_cache)

    def __enter__(self) -> Self:
        self._found = self._pool.submit(self._read)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._pool.shutdown()

    def advance(self, nbytes: int) -> None:
        """The work has got on by so many bytes of the inputs."""
        self._allow(nbytes)

    def finish(self) -> dict[str, Any]:
        """By file name, when all is read.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._allow(float("inf"))
        try:
            return self._found.result()
        except OSError as error:
            where = error.filename or self._folder
            raise CheckpointError(
                f"{where}: cannot be read ({error.strerror or error})"
            ) from error

    def _allow(self, nbytes: float) -> None:
        with self._changed:
            self._memory_headroom += nbytes
            self._changed.notify()

    def _read(self) -> dict[str, Any]:
        with ExitStack() as opened:  # to the end: the trail is behind in another file
            return {
                str(path.relative_to(self._folder)): self._fingerprint(path, opened)
                for path in self._files
            }

    def _fingerprint(self, path: Path, opened: ExitStack) -> dict[str, Any]:
        digest, nbytes, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
        file = opened.enter_context(path.open("rb", buffering=0))
        while self._may_go_on() and (count := file.readinto(chunk)):
            digest.update(chunk[:count])
            self._trail.passed(file.fileno(), nbytes, nbytes + count)
            nbytes += count
            self._allow(-count)
        return {"bytes": nbytes, "sha256": digest.hexdigest()}

    def _may_go_on(self) -> bool:
        """Wait for the work to come near; False when nobody wants the result."""
        with self._changed:
            self._changed.wait_for(lambda: self._memory_headroom > 0 or self._stopped)
            return not self._stopped
