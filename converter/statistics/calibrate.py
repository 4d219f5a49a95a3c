"""``lfmq calibrate``: statistics from text to a file, through any number of interruptions."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.statefile import StateFile
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.model.text import Windows
from lfmq.converter.quantize.settings import ExpertCoverage
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import (
    Statistics,
    identity_of,
    load_statistics,
    save_statistics,
)
from lfmq.formats.gguf.imatrix import MAGIC, Imatrix, read_imatrix, write_imatrix
from lfmq.formats.plan import (
    EXPERT_ROLES,
    SHARED_ROLES,
    ModelConfig,
    Role,
)
from lfmq.quant.errors import PlanError, ValidationError

# Roles that llama.cpp's importance matrix speaks of; the embedding is looked up, not
# multiplied, and of the head no inputs are kept.
_MULTIPLIED = {*SHARED_ROLES, *EXPERT_ROLES, Role.ROUTER} - {Role.EMBEDDING, Role.HEAD}


def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    output: Path,
    *,
    merge: Sequence[Path] = (),
    imatrix: Path | None = None,
    force: bool = False,
    execution: Execution = Execution(),
) -> tuple[Statistics, list[ExpertCoverage]]:
    """Gather statistics and write them; a run that was killed goes on where it was.

    Args:
        checkpoint: whose weights are read.
        windows: the text.
        output: the statistics file; ``OUTPUT.resume`` holds the state while it is gathered.
        merge: statistics of the same checkpoint to add.
        imatrix: also write llama.cpp's importance matrix there.
        force: replace a file that exists.
        execution: threads or cluster, device, and whom to tell of each layer.

    Raises:
        PlanError: the output exists or cannot be written.
        CheckpointError: a tensor cannot be read.
        ValidationError: a file to merge is not one, or a hidden state is not finite.
    """
    if output.exists() and not force:
        raise PlanError(f"{output}: already exists; give --force to replace it")
    if imatrix is not None and imatrix.exists() and not force:
        raise PlanError(f"{imatrix}: already exists; give --force to replace it")
    others = [load_statistics(path, checkpoint.config) for path in merge]
    state = StateFile(output.with_name(output.name + ".resume"), _key(checkpoint, windows))
    found, coverage = collect(checkpoint, windows, state=state, execution=execution)
    for other in others:
        found = found.merge(other)
    save_statistics(output, found)
    if imatrix is not None:
        export_imatrix(imatrix, found, checkpoint.config, windows.ids.shape[1])
    state.remove()
    return found, coverage


def _key(checkpoint: Checkpoint, windows: Windows) -> str:
    """What a saved state depends on: the model, its files as they are, text and version."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in checkpoint.weight_files]
    facts = [
        version("lfmq"),
        identity_of(checkpoint.config),
        hashlib.sha256(windows.ids.tobytes()).hexdigest(),
        windows.ids.shape,
        files,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_statistics(path: Path, config: ModelConfig) -> Statistics:
    """Statistics from a file of ``lfmq calibrate`` or an importance matrix of llama.cpp.

    Raises:
        ValidationError: neither, damaged, or of another checkpoint.
    """
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start[:4] == MAGIC:
        return import_imatrix(path, config)
    if start[8:] == b"blk.":  # entries, length of the first name, the name
        raise ValidationError(
            f"{path}: an importance matrix in llama.cpp's old format; llama-imatrix --in-file "
            f"{path.name} --output-format gguf --output-file NEW.gguf brings it into the new one"
        )
    return load_statistics(path, config)


def export_imatrix(path: Path, statistics: Statistics, config: ModelConfig, sequence: int) -> None:
    """Write statistics as llama.cpp's importance matrix; the texts are named by their hashes.

    Args:
        path: the file.
        statistics: of a checkpoint with this config.
        config: of the model.
        sequence: tokens of a window.

    Raises:
        PlanError: it cannot be written.
    """
    imatrix = Imatrix(
        statistics.inputs,
        tuple(f"sha256:{text}" for text in statistics.texts),
        statistics.tokens // sequence,
        sequence,
    )
    write_imatrix(path, imatrix, config.num_hidden_layers)


def import_imatrix(path: Path, config: ModelConfig) -> Statistics:
    """Moments of inputs from llama.cpp's importance matrix; there are no losses in one.

    It names no model: what binds it to the checkpoint are the names and shapes of its entries.

    Raises:
        ValidationError: not an importance matrix, damaged, or of another model.
    """
    tensors = [t for t in expected_tensors(config) if t.role in _MULTIPLIED]
    found = read_imatrix(
        path,
        {t.name: t.shape[-1] for t in tensors},
        config.num_hidden_layers,
        optional=[t.name for t in tensors if t.role is Role.ROUTER],
    )
    text = hashlib.sha256(path.read_bytes()).hexdigest()
    tokens = max(moments.tokens for moments in found.inputs.values())
    return Statistics(identity_of(config), (text,), tokens, found.inputs, {}, {}, {})
