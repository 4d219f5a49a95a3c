"""Whether a build is one of the checkpoint it is held against, by its manifest and its weights.

A build of another model of the same shape, of a fine-tune, or with two tensors exchanged runs as
well as any; only its figures are worse. A few rows of every weight tell without a run: rounding
moves them by a known share of their size, and leaves what is always stored as floats alone.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.converter.run.verify import inputs_of
from lfmq.formats.build import Reader
from lfmq.formats.plan import FLOAT_ROLES, Role
from lfmq.quant.errors import CheckpointError
from lfmq.quant.types import widened

OPTION = "--allow-other"
# Norm of a row's error over the row's: 2 bits round to nearest give 0.4, weights of other models
# differ by 1.4.
_LARGEST_ERROR = 0.6
# Of the projection of a row onto what it should be, from 1; rounding itself takes a share of the
# error's square away.
_SCALING = 0.1
# What no conversion changes; calibration refits routers.
_UNCHANGED = tuple(role for role in FLOAT_ROLES if role is not Role.ROUTER)
_ROWS = 2  # in a run; one run in each half of a weight
_CARD = re.compile(r"^# (.+), [^,\n]+, for (?:mlx|onnx|transformers)$", re.M)


def why_other(path: Path, reader: Reader, checkpoint: Checkpoint) -> str:
    """Why a build is not of the checkpoint, in words; empty when nothing says so.

    A manifest beside the build names the files it was made of; without one its own name counts.
    The weights are looked at in either case.

    Raises:
        ValidationError: the build cannot be read.
        CheckpointError: the checkpoint cannot be read.
    """
    inputs = inputs_of(path)
    if inputs is None:
        found = _other_name(path, reader, checkpoint.assets.name)
    else:
        found = _other_inputs(inputs, checkpoint)
    return found or _other_weights(reader, checkpoint)


def _other_inputs(inputs: dict[str, str], checkpoint: Checkpoint) -> str:
    """Compare the manifest's safetensors files with the checkpoint's by their content."""
    made_of = {digest for name, digest in inputs.items() if name.endswith(".safetensors")}
    for file in checkpoint.weight_files:
        try:
            status = file.stat()
            digest = _sha256(file, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        if digest not in made_of:
            return (
                f"its manifest names other weights than {file.name} of the checkpoint (sha256 "
                f"{digest[:16]}...)"
            )
    return ""


@lru_cache(256)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file; size and time of its last change stand for its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _other_name(path: Path, reader: Reader, name: str) -> str:
    """Compare the name that a build says its model has, where it says one."""
    said: Any = None
    if (header := getattr(reader, "header", None)) is not None:
        said = header.value("general.name")
    elif (card := path / "README.md").is_file():
        title = _CARD.search(card.read_bytes()[:10_000].decode("utf-8", "replace"))
        said = None if title is None else title[1]
    if not isinstance(said, str) or _letters(said) == _letters(name):
        return ""
    return f"it says that its model is {said[:60]!r}, the checkpoint is {name[:60]!r}"


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _other_weights(reader: Reader, checkpoint: Checkpoint) -> str:
    """The first tensor that is not the checkpoint's within what rounding does, in words."""
    for tensor in expected_tensors(checkpoint.config):
        if tensor.role in _UNCHANGED and reader.is_float(tensor.name):
            if not _same_floats(checkpoint.read(tensor.name), reader.read(tensor.name)):
                return f"{tensor.name} has other values than the checkpoint's"
        elif found := _other_rows(tensor, reader, checkpoint):
            return found
    return ""


def _same_floats(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> bool:
    """Equal, as they are or in one of the narrower types that containers store them in."""
    if np.array_equal(wanted, found):
        return True
    with np.errstate(over="ignore"):
        return any(
            np.array_equal(wanted.astype(narrow).astype(np.float32), found)
            for narrow in (np.float16, ml_dtypes.bfloat16)
        )


def _other_rows(tensor: Tensor, reader: Reader, checkpoint: Checkpoint) -> str:
    """Two runs of rows of a weight against what rounding does to them."""
    rows = tensor.shape[0]
    for start in sorted({rows // 4, rows * 3 // 4}):
        stop = min(start + _ROWS, rows)
        wanted = widened(checkpoint.read_rows(tensor.name, start, stop)).reshape(-1)
        found = reader.read(tensor.name, start, stop).reshape(-1)
        size = float(wanted.astype(np.float64) @ wanted)
        if size == 0.0:
            if found.any():
                return (
                    f"rows {start} to {stop - 1} of {tensor.name} are not 0 as in the checkpoint"
                )
            continue
        difference = (found - wanted).astype(np.float64)
        error = float(difference @ difference / size) ** 0.5
        scaling = abs(float(difference @ wanted / size))
        if not (error <= _LARGEST_ERROR and scaling <= _SCALING + error**2):
            return (
                f"rows {start} to {stop - 1} of {tensor.name} differ from the checkpoint's by "
                f"{error:.2g} of their size, more than rounding does"
            )
    return ""
