"""Reports as files: written beside their final names and renamed, so that none is half there."""

import os
from pathlib import Path

from lfmq.formats.writing.temporary import whole_file
from lfmq.quant.errors import ValidationError


def check_writable(*paths: Path | None) -> None:
    """Refuse, before hours of work, names that cannot be written.

    Raises:
        ValidationError: a folder that is not there, or a folder under the name.
    """
    named = [path for path in paths if path is not None]
    for path in named:
        if path.is_dir():
            raise ValidationError(f"{path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            raise ValidationError(f"{path}: is a device, not a file that is replaced; name a file")
        if not path.parent.is_dir():
            raise ValidationError(f"{path}: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK):
            raise ValidationError(f"{path}: cannot be written (permission denied)")
        if sum(path.resolve() == other.resolve() for other in named) > 1:
            raise ValidationError(f"{path}: two reports cannot have one name")


def write_report(path: Path, text: str) -> None:
    """Write a report, replacing one of that name as a whole.

    Raises:
        ValidationError: it cannot be written.
    """
    try:
        with whole_file(path) as part:
            part.write_text(text, "utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise ValidationError(f"{path}: cannot be written ({error.strerror})") from error
