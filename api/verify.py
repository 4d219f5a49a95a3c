"""A build's bytes against its manifest."""

from os import PathLike
from pathlib import Path

from lfmq.converter.run.verify import verify_build


def verify(build: str | PathLike[str]) -> Path:
    """Check that a build holds the bytes that the manifest beside it names, and nothing unknown.

    Returns:
        The manifest.

    Raises:
        ValidationError: no manifest names the build, or a file differs; the message names the
            first file and the first tensor in it.
    """
    return verify_build(Path(build))
