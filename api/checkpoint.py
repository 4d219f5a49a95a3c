"""Opening a checkpoint by whatever names it."""

from os import PathLike, fspath

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.checkpoint import open_checkpoint as open_folder
from lfmq.converter.checkpoint.locate import locate_checkpoint

# A checkpoint, or what names one.
Source = Checkpoint | str | PathLike[str]


def open_checkpoint(reference: str | PathLike[str], *, bars: bool = False) -> Checkpoint:
    """Open a checkpoint and check every tensor's name, shape and dtype; no weight is read.

    Args:
        reference: a folder with ``config.json`` and safetensors, the word ``sample`` or
            ``sample-dense``, or a Hub id ``org/name[@revision]``, which is downloaded first.
        bars: let the Hub client draw its progress bars on stderr.

    Returns:
        The checkpoint. ``read(name)`` gives a tensor as float32 in the checkpoint's own shape,
        for a linear layer [out features, in features].

    Raises:
        CheckpointError: what is missing, damaged, unexpected or of the wrong shape.
    """
    location = locate_checkpoint(fspath(reference), bars=bars)
    return open_folder(location.folder, location.name)


def opened(source: Source) -> Checkpoint:
    """The checkpoint itself, opened where only its name is given.

    Raises:
        CheckpointError: see :func:`open_checkpoint`.
    """
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)
