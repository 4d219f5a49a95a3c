"""The manifest beside the builds: hashes of every input and output, the plan and versions."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint import INDEX, Checkpoint
from lfmq.converter.recipe import Recipe
from lfmq.quant.errors import CheckpointError, PlanError, ValidationError
from lfmq.quant.types import Entry, Plan, Scheme

LIBRARIES = ("gguf", "numba", "numpy", "onnx", "torch")


def write_manifest(
    path: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    builds: Mapping[str, tuple[Path, Path]],
    *,
    text_sha256: str | None = None,
) -> Path:
    """Write the manifest beside its final name, for the caller to rename with the builds.

    It holds no time and no host, so equal runs give equal bytes. Builds of another format that an
    earlier manifest names stay in it when they are of the same checkpoint, plan and versions.

    Args:
        path: its final name.
        checkpoint: whose files are the inputs.
        plan: the storage of every tensor.
        recipe: what the plan came from.
        builds: by format, the final path and where the bytes are now.
        text_sha256: of the calibration text, if any.

    Returns:
        Where it is now.

    Raises:
        CheckpointError: an input cannot be read.
        PlanError: a build cannot be read, or the manifest not written.
    """
    document: dict[str, Any] = {
        "lfmq": version("lfmq"),
        "versions": {name: version(name) for name in LIBRARIES},
        "checkpoint": checkpoint.assets.name,
        "inputs": _hash_inputs(checkpoint),
        "recipe": {"name": recipe.name, "text": recipe.text},
        "text_sha256": text_sha256,
        "plan": {e.name: _storage(e) for e in plan.entries},
    }
    kept = _kept_builds(path, document)
    part = path.with_name(path.name + ".part")
    try:
        made = {name: _build(target.name, now) for name, (target, now) in builds.items()}
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


def input_files(checkpoint: Checkpoint) -> list[Path]:
    """Every file of the checkpoint's folder that a build depends on."""
    folder = checkpoint.folder
    inputs = [*checkpoint.weight_files, folder / "config.json"]
    inputs += [folder / name for name in (*sorted(checkpoint.assets.files), INDEX)]
    return [path for path in inputs if path.is_file()]


def _hash_inputs(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return {path.name: _fingerprint(path) for path in input_files(checkpoint)}
    except OSError as error:
        where = error.filename or checkpoint.folder
        raise CheckpointError(f"{where}: cannot be read ({error.strerror or error})") from error


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


def _storage(entry: Entry) -> Any:
    return asdict(entry.storage) if isinstance(entry.storage, Scheme) else entry.storage


def _build(name: str, now: Path) -> dict[str, Any]:
    files = [now] if now.is_file() else sorted(p for p in now.rglob("*") if p.is_file())
    return {
        "path": name,
        "files": {str(Path(name) / p.relative_to(now)): _fingerprint(p) for p in files},
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def verify_build(build: Path) -> Path:
    """Compare a build with its manifest, found beside it.

    Returns:
        The manifest.

    Raises:
        ValidationError: no manifest names the build, or the first file that differs.
    """
    manifest, files = _find_manifest(build)
    for name, (nbytes, digest) in files.items():
        path = build.parent / name
        if not path.is_file():
            raise ValidationError(f"{path}: named by {manifest.name} but missing")
        if path.stat().st_size != nbytes:
            raise ValidationError(
                f"{path}: {path.stat().st_size:,} bytes, {manifest.name} says {nbytes:,}"
            )
        if _fingerprint(path)["sha256"] != digest:
            raise ValidationError(f"{path}: sha256 differs from {manifest.name}")
    known = {str(build.parent / name) for name in files}
    for found in sorted(build.rglob("*")) if build.is_dir() else []:
        if found.is_file() and str(found) not in known:
            raise ValidationError(f"{found}: not named by {manifest.name}")
    return manifest


def _find_manifest(build: Path) -> tuple[Path, dict[str, tuple[int, str]]]:
    if not build.exists():
        raise ValidationError(f"{build}: no such build")
    for path in sorted(build.parent.glob("*.manifest.json")):
        try:
            builds = json.loads(path.read_bytes())["builds"]
            for entry in builds.values():
                if entry["path"] == build.name:
                    files = entry["files"].items()
                    return path, {str(n): (f["bytes"], f["sha256"]) for n, f in files}
        except OSError as error:
            raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValidationError(f"{path}: not a readable manifest ({error})") from error
    raise ValidationError(f"{build}: no manifest beside it names this build")
