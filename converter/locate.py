"""Where a checkpoint is: a folder, the word ``sample``, or a Hub id ``org/name[@revision]``."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import lfmq.converter
from lfmq.quant.errors import CheckpointError

SAMPLE = "sample"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "README.md", "LICENSE*"]


def sample_file(name: str = "lfm2moe-tiny") -> Path:
    """A file or folder of ``samples/``.

    Raises:
        CheckpointError: this installation has no samples folder.
    """
    path = Path(lfmq.converter.__file__).resolve().parents[1] / "samples" / name
    if not path.exists():
        raise CheckpointError(
            f"{path}: the sample is not part of an installed wheel; clone the lfmq repository "
            "and install it with 'pip install -e .', or name a checkpoint folder"
        )
    return path


def locate_checkpoint(reference: str) -> Path:
    """The checkpoint's folder, downloaded first when ``reference`` is a Hub id.

    Raises:
        CheckpointError: no such folder, or the download failed.
    """
    if reference == SAMPLE:
        return sample_file()
    path = Path(reference)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(reference):
        raise CheckpointError(f"{reference}: no such folder, and not a Hub id (org/name@revision)")
    return download(*reference.partition("@")[::2])


def download(repository: str, revision: str = "") -> Path:
    """Fetch a checkpoint's files from the Hub into its cache.

    Raises:
        CheckpointError: the Hub cannot be reached or has no such repository or revision.
    """
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{repository}: cannot be downloaded ({reason})") from error
    return Path(folder)
