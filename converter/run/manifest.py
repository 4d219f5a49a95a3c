"""The manifest beside the builds: hashes of every input and output, the plan and versions."""

import hashlib
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
from lfmq.formats.writing.journal import digest_of
from lfmq.formats.writing.writer import read_run
from lfmq.quant.errors import PlanError, ValidationError
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_pieces(lines: list[str]) -> Segments:
    words = (line.split(" ", 3) for line in lines)
    return [(int(w[0]), int(w[1]), w[2], w[3]) for w in words]


def verify_build(build: Path) -> Path:
    """Compare a build with its manifest, found beside it.

    Returns:
        The manifest.

    Raises:
        ValidationError: no manifest names the build, or the first file that differs, and the
            first tensor in it.
    """
    manifest, files = _find_manifest(build)
    for name, (nbytes, digest, segments) in files.items():
        path = build.parent / name
        if not path.is_file():
            raise ValidationError(f"{path}: named by {manifest.name} but missing")
        if path.stat().st_size != nbytes:
            raise ValidationError(
                f"{path}: {path.stat().st_size:,} bytes, {manifest.name} says {nbytes:,}"
                f"{_first_difference(path, segments)}"
            )
        if _sha256(path) != digest:
            raise ValidationError(
                f"{path}: sha256 differs from {manifest.name}{_first_difference(path, segments)}"
            )
    known = {str(build.parent / name) for name in files}
    for found in sorted(build.rglob("*")) if build.is_dir() else []:
        if found.is_file() and str(found) not in known:
            raise ValidationError(f"{found}: not named by {manifest.name}")
    return manifest


def _first_difference(path: Path, segments: Segments) -> str:
    """The first tensor that is not as it was written, in words; empty without any tensor."""
    if not segments:
        return ""
    with path.open("rb") as file:
        for offset, length, expected, name in segments:
            if digest_of(read_run(file.fileno(), offset, length)) != expected:
                return f"; the first tensor that differs is {name}, at byte {offset:,}"
    return "; no tensor differs, what lies before, between or after them does"


def _find_manifest(build: Path) -> tuple[Path, dict[str, tuple[int, str, Segments]]]:
    if not build.exists():
        raise ValidationError(f"{build}: no such build")
    for path in sorted(build.parent.glob("*.manifest.json")):
        try:
            builds = json.loads(path.read_bytes())["builds"]
            for entry in builds.values():
                if entry["path"] == build.name:
                    files = entry["files"].items()
                    return path, {
                        str(n): (f["bytes"], f["sha256"], _parse_pieces(f.get("pieces", [])))
                        for n, f in files
                    }
        except OSError as error:
            raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValidationError(f"{path}: not a readable manifest ({error})") from error
    raise ValidationError(f"{build}: no manifest beside it names this build")
