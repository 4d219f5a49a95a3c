"""What the bytes of a build depend on, cheap to compare: a run goes on only with the same."""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.fingerprints import input_files
from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.manifest import LIBRARIES
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.plan import Plan
from lfmq.quant.errors import CheckpointError


def depends_on(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    device: str = "cpu",
) -> dict[str, str]:
    """Each thing the bytes depend on, in words for the user, with what identifies it.

    Args:
        checkpoint: by names, sizes and times of its files.
        recipe: by its text.
        plan: by every tensor's storage.
        calibration: tokens and settings; None without one.
        statistics: that scales are chosen by; None without them.
        device: of the calibration.

    Raises:
        CheckpointError: a file of the checkpoint is gone.
    """
    return {
        "lfmq's version": version("lfmq"),
        "the version of a library": json.dumps({name: version(name) for name in LIBRARIES}),
        "the checkpoint": checkpoint_state(checkpoint),
        "the recipe": hashlib.sha256(recipe.text.encode()).hexdigest(),
        "the calibration": _of_calibration(calibration, device) if calibration else "none",
        "the statistics": _of_statistics(statistics) if statistics else "none",
        "the plan": _of_plan(plan),
        "the name or the metadata": _sha256(
            [checkpoint.assets.name, sorted(checkpoint.assets.metadata.items())]
        ),
    }


def checkpoint_state(checkpoint: Checkpoint) -> str:
    """sha256 of names, sizes and times of its files; their bytes take as long as a conversion.

    Raises:
        CheckpointError: a file is gone.
    """
    try:
        found = [(path.name, path.stat()) for path in input_files(checkpoint)]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return _sha256([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


def check_unchanged(checkpoint: Checkpoint, depends: dict[str, str]) -> None:
    """Refuse to finish a build of files that changed under it.

    Raises:
        CheckpointError: names the folder.
    """
    if checkpoint_state(checkpoint) != depends["the checkpoint"]:
        raise CheckpointError(
            f"{checkpoint.folder}: a file changed while it was converted; run again"
        )


def _of_plan(plan: Plan) -> str:
    return _sha256([[e.name, e.shape, repr(e.storage)] for e in plan.entries])


def _of_calibration(calibration: Calibration, device: str) -> str:
    windows = calibration.windows
    ids = hashlib.sha256(windows.ids.tobytes()).hexdigest()
    settings = asdict(calibration.settings)
    return _sha256([windows.text_sha256, ids, windows.ids.shape, settings, device])


def _of_statistics(statistics: Statistics) -> str:
    found = hashlib.sha256(_sha256([statistics.tokens, statistics.texts]).encode())
    for name, moments in sorted(statistics.inputs.items()):
        found.update(_sha256([name, moments.tokens, moments.mass]).encode())
        found.update(moments.sums.tobytes())
    return found.hexdigest()


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
