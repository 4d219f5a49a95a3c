"""Where a checkpoint is: a folder, the word for a sample, or a Hub id ``org/name[@revision]``."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lfmq.converter
from lfmq.quant.errors import CheckpointError

# Words for the checkpoints of ``samples/``: a mixture of experts, and a dense model.
SAMPLES = {"sample": "lfm2moe-tiny", "sample-dense": "lfm2-tiny"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# A repository's folder in the Hub's cache (huggingface_hub, repo_folder_name).
_CACHED = re.compile(r"models--(?:.+--)?(.+)")
_REASON_LENGTH = 300  # characters of the Hub client's message, which can be a page
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "README.md", "LICENSE*"]


def sample_file(name: str = SAMPLES["sample"]) -> Path:
    """A file or folder of ``samples/``.

    Raises:
        CheckpointError: this installation has no samples folder.
    """
    path = Path(lfmq.converter.__file__).resolve().parents[1] / "samples" / name
    if not path.exists():
        raise CheckpointError(
            f"{path}: the sample is not part of an installed wheel; clone the lfmq repository "
            "and install it with 'pip install -e .', or name a checkpoint folder and --text of "
            "your own (convert also runs --uncalibrated)"
        )
    return path


@dataclass(frozen=True, slots=True)
class Location:
    """A checkpoint's folder and the name its builds get."""

    folder: Path
    name: str


def locate_checkpoint(reference: str, *, bars: bool = False) -> Location:
    """The checkpoint's folder, downloaded first when ``reference`` is a Hub id.

    Args:
        reference: a folder, ``sample``, ``sample-dense`` or ``org/name[@revision]``.
        bars: let the Hub client draw its progress bars on stderr.

    Raises:
        CheckpointError: no such folder, or the download failed.
    """
    if reference in SAMPLES:
        folder = sample_file(SAMPLES[reference])
        return Location(folder, folder.name)
    path = Path(reference)
    if path.exists():
        path = snapshot_of(path)
        return Location(path, checkpoint_name(path))
    if not _HUB_ID.fullmatch(reference):
        raise CheckpointError(f"{reference}: no such folder, and not a Hub id (org/name@revision)")
    repository, _, revision = reference.partition("@")
    folder = download(repository, revision, bars=bars)
    return Location(folder, repository.rpartition("/")[2])


def checkpoint_name(folder: Path) -> str:
    """What builds of a folder are named after: it, or the repository it is a snapshot of.

    The Hub's cache keeps them as ``models--ORG--NAME/snapshots/COMMIT``.
    """
    for path in (folder.absolute(), folder.resolve()):
        found = _CACHED.fullmatch(path.parent.parent.name)
        if path.parent.name == "snapshots" and found is not None:
            return found[1]
    return folder.resolve().name


def snapshot_of(path: Path) -> Path:
    """The snapshot in a repository's folder of the Hub's cache; any other path as it is.

    Raises:
        CheckpointError: it holds several snapshots, or none.
    """
    if _CACHED.fullmatch(path.resolve().name) is None or not (path / "snapshots").is_dir():
        return path
    found = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
    with suppress(OSError, ValueError):
        main = path / "snapshots" / (path / "refs" / "main").read_text("ascii").strip()
        if main in found:
            return main
    if len(found) == 1:
        return found[0]
    several = f"{len(found)} snapshots; give one, such as {found[-1]}" if found else "no snapshot"
    raise CheckpointError(f"{path}: a repository in the Hub's cache with {several}")


def download(repository: str, revision: str = "", *, bars: bool = False) -> Path:
    """Fetch a checkpoint's files from the Hub into its cache.

    Raises:
        CheckpointError: the Hub cannot be reached or has no such repository or revision.
    """
    # its own imports take longer than opening a folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not bars:
        disable_progress_bars()
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=_PATTERNS)
    except Exception as error:  # of any HTTP library: the Hub client has changed its own twice
        reason = " ".join(str(error).split())[:_REASON_LENGTH] or repr(error)
        raise CheckpointError(
            f"{repository}: no such folder, and as a Hub id it cannot be downloaded ({reason})"
        ) from error
    return Path(folder)
