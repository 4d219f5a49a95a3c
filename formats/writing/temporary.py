"""The name under which a file is written before it gets its own."""

from pathlib import Path


def make_way(part: Path) -> None:
    """Remove what is there under a temporary name.

    An earlier run may have left a file. A link would have whatever it points to written over.

    Raises:
        OSError: it cannot be removed, as a folder.
    """
    part.unlink(missing_ok=True)
