"""The name under which a file is written before it gets its own."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def make_way(part: Path) -> None:
    """Remove what is there under a temporary name.

    An earlier run may have left a file. A link would have whatever it points to written over.

    Raises:
        OSError: it cannot be removed, as a folder.
    """
    part.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The temporary name of a small file, which gets its own when the block ends well.

    Yields:
        Where to write; after an error nothing is left there.

    Raises:
        OSError: it cannot be written, or what has the name is a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "what has this name is no file")
    part = path.with_name(path.name + ".part")
    try:
        make_way(part)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
