"""The manifest beside the builds: hashes of every input and output, the plan and versions."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lfmq.converter.plan.recipe import Recipe
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.writing.temporary import make_way
from lfmq.quant.errors import PlanError
from lfmq.quant.types import Scheme

# Offset, length, digest and first tensor of each segment of a file, in order.
Segments = list[tuple[int, int, str, str]]

LIBRARIES = ("gguf", "numba", "numpy", "onnx", "torch")


@dataclass(frozen=True, slots=True)
class Made:
    """A build about to get its name.

    Attributes:
        target: its final path.
        part: where it is now.
        hashes: sha256 of each file (an empty name for a build of one file).
        segments: what each was written from.
    """

    target: Path
    part: Path
    hashes: Mapping[str, str]
    segments: Mapping[str, Segments]


def write_manifest(
    path: Path,
    checkpoint: str,
    inputs: Mapping[str, Any],
    plan: Plan,
    recipe: Recipe,
    builds: Mapping[str, Made],
    *,
    text_sha256: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the manifest beside its final name, for the caller to rename with the builds.

    It holds no time and no host, so equal runs give equal bytes. Builds of another format that an
    earlier manifest names stay in it when they are of the same checkpoint, plan and versions.

    Args:
        path: its final name.
        checkpoint: its name.
        inputs: size and sha256 of its files.
        plan: the storage of every tensor.
        recipe: what the plan came from.
        builds: by format.
        text_sha256: of the calibration text, if any.
        metadata: key-values that the user added, if any.

    Returns:
        Where it is now.

    Raises:
        PlanError: a build cannot be read, or the manifest not written.
    """
    document: dict[str, Any] = {
        "lfmq": version("lfmq"),
        "versions": {name: version(name) for name in LIBRARIES},
        "checkpoint": checkpoint,
        "inputs": dict(inputs),
        "recipe": {"name": recipe.name, "text": recipe.text},
        "text_sha256": text_sha256,
        "plan": {e.name: _storage(e) for e in plan.entries},
        **({"metadata": _plain(metadata)} if metadata else {}),
    }
    kept = _kept_builds(path, document)
    part = path.with_name(path.name + ".part")
    try:
        make_way(part)
        made = {name: _build(build) for name, build in builds.items()}
        document["builds"] = dict(sorted((kept | made).items()))
        with part.open("wb") as file:
            file.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise PlanError(f"{path}: cannot be written ({error.strerror})") from error
    return part


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in metadata.items()}


def _kept_builds(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Builds an earlier manifest names that are still there and of the same origin."""
    try:
        earlier = json.loads(path.read_bytes())
        builds = earlier.pop("builds")
        if earlier != document:
            return {}
        return {n: b for n, b in builds.items() if (path.parent / b["path"]).exists()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # none, or none of ours: it is replaced


def _storage(entry: TensorPlan) -> Any:
    return asdict(entry.storage) if isinstance(entry.storage, Scheme) else entry.storage


def _build(build: Made) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for inside, digest in sorted(build.hashes.items()):
        path = build.part / inside if inside else build.part
        entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": digest}
        if inside in build.segments:
            entry["pieces"] = [" ".join(map(str, segment)) for segment in build.segments[inside]]
        found[str(Path(build.target.name) / inside)] = entry
    return {"path": build.target.name, "files": found}
