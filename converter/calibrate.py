"""``lfmq calibrate``: statistics from text to a file, through any number of interruptions."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lfmq.converter.calibration import ExpertCoverage
from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.collect import Progress, collect
from lfmq.converter.statefile import StateFile
from lfmq.converter.statistics import (
    Statistics,
    identity_of,
    load_statistics,
    save_statistics,
)
from lfmq.converter.text import Windows
from lfmq.quant.errors import PlanError
from lfmq.quant.types import Geometry


def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    output: Path,
    *,
    merge: Sequence[Path] = (),
    imatrix: Path | None = None,
    force: bool = False,
    threads: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Statistics, list[ExpertCoverage]]:
    """Gather statistics and write them; a run that was killed goes on where it was.

    Args:
        checkpoint: whose weights are read.
        windows: the text.
        output: the statistics file; ``OUTPUT.resume`` holds the state while it is gathered.
        merge: statistics of the same checkpoint to add.
        imatrix: also write llama.cpp's importance matrix there.
        force: replace a file that exists.
        threads: batches and experts at a time.
        device: where matrices are multiplied.
        progress: called with 1 and the number of layers after each layer.

    Raises:
        PlanError: the output exists or cannot be written.
        CheckpointError: a tensor cannot be read.
        ValidationError: a file to merge is not one, or a hidden state is not finite.
    """
    if output.exists() and not force:
        raise PlanError(f"{output}: already exists; give --force to replace it")
    others = [load_statistics(path, checkpoint.geometry) for path in merge]
    state = StateFile(output.with_name(output.name + ".resume"), _key(checkpoint, windows))
    found, coverage = collect(
        checkpoint, windows, threads=threads, device=device, state=state, progress=progress
    )
    for other in others:
        found = found.merge(other)
    save_statistics(output, found)
    state.remove()
    return found, coverage


def _key(checkpoint: Checkpoint, windows: Windows) -> str:
    """What a saved state depends on: the model, its files as they are, text and version."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in checkpoint.weight_files]
    facts = [
        version("lfmq"),
        identity_of(checkpoint.geometry),
        hashlib.sha256(windows.ids.tobytes()).hexdigest(),
        windows.ids.shape,
        files,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_statistics(path: Path, geometry: Geometry) -> Statistics:
    """Statistics from a file of ``lfmq calibrate`` or an importance matrix of llama.cpp.

    Raises:
        ValidationError: neither, damaged, or of another checkpoint.
    """
    return load_statistics(path, geometry)
