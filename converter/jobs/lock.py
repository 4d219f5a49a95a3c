"""One run at a time in an output folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lfmq.quant.errors import PlanError

try:
    import fcntl
except ImportError:  # Windows has no such lock: two runs into one folder are not told apart there
    fcntl = None  # type: ignore[assignment]

NAME = ".lfmq.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder, made when missing, against other runs; the lock dies with the process.

    A file system without locks is written to without one.

    Raises:
        PlanError: another run holds it, or it cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path)
    except OSError as error:
        raise PlanError(f"{folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened it meanwhile looks again
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                os.close(descriptor)
                raise PlanError(
                    f"{path.parent}: another run is writing into this folder; wait for its end "
                    "or give another --output"
                ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
