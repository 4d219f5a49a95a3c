"""Fills a build layout in: any piece in any order, under a temporary name until it is whole."""

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from lfmq.formats.build import BuildLayout, FileLayout, Piece
from lfmq.quant.errors import PlanError
from lfmq.quant.types import Weight


class BuildWriter:
    """Writes one build beside its final name and renames it when every piece is there.

    The space is reserved before the first weight is read, so a full disk is found out at once.
    Used as a context manager it removes what it wrote when the body raises.

    Raises:
        PlanError: the target exists and ``force`` is not set, or cannot be written.
    """

    def __init__(self, target: Path, layout: BuildLayout, *, force: bool = False) -> None:
        self.target = target
        self.layout = layout
        self.part = target.with_name(target.name + ".part")
        if target.exists() and not force:
            raise PlanError(f"{target}: already exists; give --force to replace it")
        self._files: dict[str, int] = {}
        self._by_source: dict[str, list[tuple[str, Piece]]] = {}
        self._pending = 0
        self._lock = Lock()
        for file in layout.files:
            for piece in file.pieces:
                self._by_source.setdefault(piece.sources[0], []).append((file.path, piece))
                self._pending += 1
        try:
            self._create()
        except OSError as error:
            self.abort()
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> PlanError:
        if error.errno == errno.ENOSPC:
            need = self.layout.nbytes
            return PlanError(
                f"{self.target}: no space left on the device; the build needs {need:,} bytes"
            )
        return PlanError(f"{self.target}: cannot be written ({error.strerror or error})")

    def _create(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _remove(self.part)
        if not self.layout.single_file:
            self.part.mkdir()
        for file in self.layout.files:
            path = self.part / file.path if file.path else self.part
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._files[file.path] = descriptor
            self._reserve(descriptor, file)

    @staticmethod
    def _reserve(descriptor: int, file: FileLayout) -> None:
        if file.size:
            _allocate(descriptor, file.size)
        for offset, content in file.constants:
            _write_all(descriptor, memoryview(content), offset)

    def write(self, weights: Mapping[str, Weight]) -> None:
        """Pack and write every piece made of these tensors (one unit of the plan).

        Raises:
            PlanError: the file system refused.
        """
        try:
            for name in weights:
                for path, piece in self._by_source.get(name, ()):
                    content = piece.pack(*(weights[source] for source in piece.sources))
                    if content.nbytes != piece.nbytes:
                        raise ValueError(
                            f"{path} at {piece.offset}: {content.nbytes} bytes for a piece of "
                            f"{piece.nbytes} ({', '.join(piece.sources)})"
                        )
                    _write_all(self._files[path], content.data, piece.offset)
                    with self._lock:
                        self._pending -= 1
        except OSError as error:
            raise self._explain(error) from error

    def finish(self) -> None:
        """Have every byte on the disk, still under the temporary name.

        Raises:
            PlanError: a piece was never written, or the file system refused.
        """
        if self._pending:
            raise PlanError(f"{self.target}: {self._pending} pieces were never written")
        try:
            for descriptor in self._files.values():
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

    def abort(self) -> None:
        """Remove everything written so far; the final name is left as it was."""
        with suppress(OSError):  # the error that led here is the one to show
            self._close()
        with suppress(OSError):
            _remove(self.part)

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the space where the system can, else only set the length."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.ftruncate(descriptor, size)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    content = content.cast("B")
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
