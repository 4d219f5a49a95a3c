"""Fills a build layout in: any piece in any order, under a temporary name until it is whole."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lfmq.formats.build import BuildLayout, FileLayout
from lfmq.formats.writing.filler import Filler, write_all
from lfmq.formats.writing.hashes import TrailingHashes
from lfmq.formats.writing.journal import Journal, Past, digest, digest_of
from lfmq.quant.errors import PlanError
from lfmq.quant.types import Weight

_CHUNK = 2**24  # bytes read at a time to be checked
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class BuildWriter:
    """Writes one build beside its final name and renames it when every piece is there.

    A context manager. Entering it reserves the space, so a full disk is found out before the first
    weight is read, or takes up what an earlier run left under the temporary name: units whose
    bytes are there are ``finished``, writing them again does nothing. After an error what is
    written stays for the next run, unless there is none of it yet. With ``drop_page_cache`` the
    page cache lets go of what is on the disk.

    Attributes:
        target: the final name.
        part: the temporary name.
        finished: names of the first tensors of units an earlier run finished.
        started_over: why what an earlier run left was of no use; empty without such.
        rewritten: units an earlier run finished whose bytes are not there.

    Raises:
        PlanError: the target exists and ``force`` is not set, or cannot be written.
    """

    def __init__(
        self,
        target: Path,
        layout: BuildLayout,
        *,
        force: bool = False,
        depends: Mapping[str, str] | None = None,
        threads: int = 1,
        drop_page_cache: bool = False,
    ) -> None:
        self.target = target
        self.layout = layout
        self.part = target.with_name(target.name + ".part")
        self.finished: frozenset[str] = frozenset()
        self.started_over = ""
        self.rewritten = 0
        self._journal = Journal(target.with_name(target.name + ".part.journal"))
        self._depends = {**(depends or {}), "the layout of the build": digest(layout)}
        self._threads = threads
        self._drop_page_cache = drop_page_cache
        self._files: dict[str, int] = {}
        self._filler = Filler(self.part, layout, self.finished)
        self._digests: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._kept = self._committed = False
        self._hashes: TrailingHashes | None = None
        self._found: dict[str, str] = {}
        self._pending = {p.sources[0] for file in layout.files for p in file.segments}
        try:
            self._past = self._journal.read(self._depends)
        except OSError as error:
            raise self._explain(error) from error
        if target.exists() and not force and not self._named_early():
            raise PlanError(f"{target}: already exists; give --force to replace it")

    def _named_early(self) -> bool:
        """The build has its name, but the run that wrote it was killed before its end."""
        if self._past is None or self._past.whole is None or os.path.lexists(self.part):
            return False
        return self.target.exists() and self.target.lstat().st_ino == self._past.whole

    def _explain(self, error: OSError) -> PlanError:
        if error.errno == errno.ENOSPC:
            reason = f"no space left on the device; the build needs {self.layout.nbytes:,} bytes"
        else:
            reason = f"cannot be written ({error.strerror or error})"
        if self._kept:
            reason += "; the next run goes on with what is written"
        return PlanError(f"{self.target}: {reason}")

    # ---- opening

    def __enter__(self) -> Self:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self._named_early():
                self._kept = True
                self.target.rename(self.part)
            if self._past is not None and not self._past.changed and self._is_there():
                self._kept = True
                self._reopen(self._past)
            else:
                self._create()
            self._hashes = TrailingHashes(
                self.layout.files, self._files, drop_page_cache=self._drop_page_cache
            )
            for names in self._digests:
                self._follow(names)
        except OSError as error:
            self._leave()
            raise self._explain(error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def _is_there(self) -> bool:
        one = self.layout.single_file
        return not self.part.is_symlink() and (self.part.is_file() if one else self.part.is_dir())

    def _create(self) -> None:
        if self._past is not None:
            self.started_over = self._past.changed or f"{self.part.name} is gone"
        self._kept = False
        self._journal.remove()  # first: it must never speak of another part
        _remove(self.part)
        if not self.layout.single_file:
            self.part.mkdir()
        for file in self.layout.files:
            self._open_file(file, os.O_EXCL)
        self._journal.create(self._depends)

    def _open_file(self, file: FileLayout, flags: int = 0) -> int:
        """Open or create a file with its space reserved and everything but the segments in it."""
        path = self.part / file.path if file.path else self.part
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, _OPEN_FLAGS | flags, 0o644)
        self._files[file.path] = descriptor
        if os.fstat(descriptor).st_size > file.size:
            os.ftruncate(descriptor, file.size)
        if file.size:
            _allocate(descriptor, file.size)
        for offset, content in file.constants:
            write_all(descriptor, memoryview(content), offset)
        return descriptor

    def _reopen(self, past: Past) -> None:
        """Take up what an earlier run left: nothing counts that its hash does not prove."""
        known = {self.part / file.path for file in self.layout.files}
        for path in [] if self.layout.single_file else sorted(self.part.rglob("*")):
            if path.is_symlink() or (path.is_file() and path not in known):
                path.unlink()
        for file in self.layout.files:
            descriptor = self._open_file(file)
            for start, end in _gaps(file):
                write_all(descriptor, memoryview(bytes(end - start)), start)
        with ThreadPoolExecutor(self._threads) as pool:
            intact = list(pool.map(self._is_intact, past.units, past.units.values()))
        found = [names for names, good in zip(past.units, intact, strict=True) if good]
        self.finished = frozenset(names[0] for names in found)
        self._digests.update((names, past.units[names]) for names in found)
        self.rewritten = len(past.units) - len(found)
        self._pending.difference_update(*found)
        self._kept = bool(found)
        self._journal.go_on(past)

    @property
    def filler(self) -> Filler:
        """For workers in other processes; what they wrote is told to :meth:`record`."""
        return Filler(self.part, self.layout, self.finished)

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Bytes of the segments that a unit's tensors fill in."""
        return sum(segment.nbytes for _, segment in self._filler.segments(names))

    def _is_intact(self, names: tuple[str, ...], digests: tuple[str, ...]) -> bool:
        segments = self._filler.segments(names)
        return len(segments) == len(digests) and all(
            digest_of(read_run(self._files[path], p.offset, p.nbytes)) == expected
            for (path, p), expected in zip(segments, digests, strict=True)
        )

    # ---- filling in

    def write(self, weights: Mapping[str, Weight]) -> None:
        """Pack and write every piece made of these tensors (one unit of the plan).

        Raises:
            PlanError: the file system refused.
        """
        names = tuple(weights)
        if names[0] in self.finished:
            return
        try:
            digests = self._filler.fill(weights, self._files)
        except OSError as error:
            raise self._explain(error) from error
        self.record(names, digests)

    def record(self, names: tuple[str, ...], digests: tuple[str, ...]) -> None:
        """Take note of a unit whose segments are all written.

        Raises:
            PlanError: the file system refused.
        """
        if names[0] in self.finished:
            return
        try:
            self._journal.add(names, digests)
        except OSError as error:
            raise self._explain(error) from error
        self._digests[names] = digests
        self._pending.difference_update(names)
        self._kept = True
        self._follow(names)

    def _follow(self, names: tuple[str, ...]) -> None:
        assert self._hashes is not None
        self._hashes.finished((path, p.offset) for path, p in self._filler.segments(names))

    # ---- the end

    def digests(self) -> dict[str, list[tuple[int, int, str, str]]]:
        """Offset, length, digest and first tensor of each piece written, by file, in order."""
        found: dict[str, list[tuple[int, int, str, str]]] = {}
        for names, digests in self._digests.items():
            for (path, segment), hashed in zip(self._filler.segments(names), digests, strict=True):
                place = (segment.offset, segment.nbytes, hashed, segment.sources[0])
                found.setdefault(path, []).append(place)
        return {path: sorted(places) for path, places in sorted(found.items())}

    def hashes(self) -> dict[str, str]:
        """sha256 of every file, by path, after :meth:`finish`."""
        return self._found

    def finish(self) -> None:
        """Have every byte on the disk, still under the temporary name, and every file hashed.

        Raises:
            PlanError: a piece was never written, or the file system refused.
        """
        if self._pending:
            missing = len(self._filler.segments(self._pending))
            raise PlanError(f"{self.target}: {missing} segments were never written")
        assert self._hashes is not None
        try:
            if self._files:  # not finished before
                self._found = self._hashes.result()
            for descriptor in self._files.values():
                if not os.fstat(descriptor).st_nlink:
                    raise FileNotFoundError(None, "removed while it was written")
                os.fsync(descriptor)
            self._close()
        except OSError as error:
            raise self._explain(error) from error

    def commit(self) -> None:
        """Give the finished build its name, replacing an older one.

        Raises:
            PlanError: a piece was never written, or the rename failed; an older build is back.
        """
        self.finish()
        old = self.target.with_name(self.target.name + ".old")
        try:
            self._journal.end(self.part.stat().st_ino)
            _remove(old)
            aside = self.target.is_dir() or (os.path.lexists(self.target) and self.part.is_dir())
            if aside:  # a folder cannot be replaced by a rename
                self.target.rename(old)
            try:
                self.part.rename(self.target)
            except OSError:
                if aside:
                    old.rename(self.target)
                raise
            _remove(old)
        except OSError as error:
            raise self._explain(error) from error
        self._committed = True

    def discard(self) -> None:
        """What is written is of no use to another run either: leave nothing of it."""
        self._kept = False

    def _close(self) -> None:
        files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def _leave(self, *, done: bool = False) -> None:
        """Let go of everything; what is written stays unless nothing is."""
        if self._hashes is not None:
            self._hashes.stop()
        with suppress(OSError):  # an error that led here is the one to show
            self._close()
        with suppress(OSError):
            self._journal.close()
        if done:
            _sync_folder(self.target.parent)  # names are on the disk before the journal goes
        if done or not self._kept:
            with suppress(OSError):
                self._journal.remove()
        if not self._kept:
            with suppress(OSError):
                _remove(self.part)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(done=self._committed and kind is None)


def read_run(descriptor: int, offset: int, nbytes: int) -> Iterator[bytes]:
    """A run of a file in chunks; shorter where the file ends."""
    end = offset + nbytes
    while offset < end and (content := os.pread(descriptor, min(_CHUNK, end - offset), offset)):
        yield content
        offset += len(content)


def _gaps(file: FileLayout) -> Iterator[tuple[int, int]]:
    """What neither known bytes nor segments cover, by start and end."""
    runs = [(at, at + len(content)) for at, content in file.constants]
    runs += [(segment.offset, segment.offset + segment.nbytes) for segment in file.segments]
    at = 0
    for start, end in [*sorted(runs), (file.size, file.size)]:
        if start > at:
            yield at, start
        at = max(at, end)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the space where the system can, else only set the length."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.ftruncate(descriptor, size)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
