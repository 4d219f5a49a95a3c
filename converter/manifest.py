"""The manifest beside the builds: hashes of every input and output, the plan and versions."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.recipe import Recipe
from lfmq.quant.errors import PlanError, ValidationError
from lfmq.quant.types import Entry, Plan, Scheme

_LIBRARIES = ("gguf", "numba", "numpy", "onnx", "torch")


def write_manifest(
    path: Path, checkpoint: Checkpoint, plan: Plan, recipe: Recipe, builds: Mapping[str, Path]
) -> None:
    """Write the manifest; it holds no time and no host, so equal runs give equal bytes.

    Raises:
        PlanError: it cannot be written.
    """
    folder = checkpoint.folder
    inputs = [*checkpoint.weight_files, folder / "config.json"]
    inputs += [folder / name for name in sorted(checkpoint.assets.files)]
    document = {
        "lfmq": version("lfmq"),
        "versions": {name: version(name) for name in _LIBRARIES},
        "checkpoint": checkpoint.assets.name,
        "inputs": {p.name: _fingerprint(p) for p in inputs},
        "recipe": {"name": recipe.name, "text": recipe.text},
        "text_sha256": None,
        "plan": {e.name: _storage(e) for e in plan.entries},
        "builds": {name: _build(target) for name, target in sorted(builds.items())},
    }
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PlanError(f"{path}: cannot be written ({error.strerror})") from error


def _storage(entry: Entry) -> Any:
    return asdict(entry.storage) if isinstance(entry.storage, Scheme) else entry.storage


def _build(target: Path) -> dict[str, Any]:
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    return {
        "path": target.name,
        "files": {str(p.relative_to(target.parent)): _fingerprint(p) for p in files},
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
    for name, expected in files.items():
        path = build.parent / name
        if not path.is_file():
            raise ValidationError(f"{path}: named by {manifest.name} but missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValidationError(
                f"{path}: {path.stat().st_size:,} bytes, {manifest.name} says "
                f"{expected['bytes']:,}"
            )
        if _fingerprint(path)["sha256"] != expected["sha256"]:
            raise ValidationError(f"{path}: sha256 differs from {manifest.name}")
    known = {str(build.parent / name) for name in files}
    for found in sorted(build.rglob("*")) if build.is_dir() else []:
        if found.is_file() and str(found) not in known:
            raise ValidationError(f"{found}: not named by {manifest.name}")
    return manifest


def _find_manifest(build: Path) -> tuple[Path, dict[str, Any]]:
    if not build.exists():
        raise ValidationError(f"{build}: no such build")
    for path in sorted(build.parent.glob("*.manifest.json")):
        try:
            builds = json.loads(path.read_bytes())["builds"]
            for entry in builds.values():
                if entry["path"] == build.name:
                    return path, dict(entry["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValidationError(f"{path}: not a readable manifest ({error})") from error
    raise ValidationError(f"{build}: no manifest beside it names this build")
