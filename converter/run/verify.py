"""A build's bytes held against the manifest beside it.

A manifest is a file that came with a build: what it names is looked for in the build alone, and a
build is intact only if each of its files was hashed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lfmq.converter.run.manifest import Segments
from lfmq.converter.run.open_build import open_build
from lfmq.formats.registry import build_files
from lfmq.formats.writing.journal import digest_of
from lfmq.formats.writing.writer import read_run
from lfmq.quant.errors import ValidationError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = re.compile(r"(\d{1,15}) (\d{1,15}) ([0-9a-f]{16}) (.+)", re.S)
_LARGEST = 2**28  # bytes of a manifest; that of LFM2-24B-A2B has 3 MB
_REMEDY = "get it with the build once more, or convert again"


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a build, as the manifest says."""

    nbytes: int
    sha256: str
    segments: Segments


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What a manifest says of one build: its files by their path from the manifest."""

    path: Path
    files: Mapping[str, _File]
    inputs: Mapping[str, str]


def verify_build(build: Path) -> Path:
    """Compare a build with its manifest, found beside it, and check all that the build holds.

    Returns:
        The manifest.

    Raises:
        ValidationError: no manifest names the build, the manifest does not name each of its files
            and no other, the first file that differs and the first tensor in it, or what the
            build holds and no reader knows.
    """
    if not build.exists():
        raise ValidationError(f"{build}: no such build")
    manifest = _find_manifest(build)
    if manifest is None:
        raise ValidationError(f"{build}: no manifest beside it names this build")
    for path in build_files(build):
        if path.relative_to(build.parent).as_posix() not in manifest.files:
            raise ValidationError(f"{path}: not named by {manifest.path.name}")
    for name, file in manifest.files.items():
        _check_file(build, name, file, manifest.path)
    open_build(build)
    return manifest.path


def inputs_of(build: Path) -> dict[str, str] | None:
    """The sha256 of each input of a build by name; None without a manifest that names the build.

    Raises:
        ValidationError: a manifest beside it cannot be read.
    """
    manifest = _find_manifest(build)
    return None if manifest is None else dict(manifest.inputs)


def _check_file(build: Path, name: str, file: _File, manifest: Path) -> None:
    path = build.parent / name
    if not path.is_file():
        raise ValidationError(f"{path}: named by {manifest.name} but missing")
    if path.resolve() != build.resolve() / PurePosixPath(name).relative_to(build.name):
        raise ValidationError(
            f"{path}: a link to {str(path.resolve())[:100]}; a build is verified where its files "
            "are its own, copy them"
        )
    try:
        size = path.stat().st_size
        wrong = f"{size:,} bytes, {manifest.name} says {file.nbytes:,}"
        if size == file.nbytes:
            wrong = f"sha256 differs from {manifest.name}"
            with path.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == file.sha256:
                    return
        raise ValidationError(f"{path}: {wrong}{_first_difference(path, file.segments)}")
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _first_difference(path: Path, segments: Segments) -> str:
    """The first tensor that is not as it was written, in words; empty without any tensor."""
    if not segments:
        return ""
    with path.open("rb") as file:
        for offset, length, expected, name in segments:
            if digest_of(read_run(file.fileno(), offset, length)) != expected:
                return f"; the first tensor that differs is {name[:100]}, at byte {offset:,}"
    return "; no tensor differs, what lies before, between or after them does"


# ---- reading


def _find_manifest(build: Path) -> _Manifest | None:
    """The first manifest beside a build that names it."""
    for path in sorted(build.absolute().parent.glob("*.manifest.json")):
        shown = build.parent / path.name
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError(f"{path.stat().st_size:,} bytes")
            document = json.loads(path.read_bytes())
            builds = document["builds"].values()
            for entry in builds:
                if entry["path"] == build.name:
                    files = {name: _file(build, name, f) for name, f in entry["files"].items()}
                    if not files:
                        raise ValueError(f"it names no file of {build.name}")
                    return _Manifest(shown, files, _inputs(document.get("inputs", {})))
        except OSError as error:
            raise ValidationError(f"{shown}: cannot be read ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValidationError(
                f"{shown}: not a readable manifest ({_short(error)}); {_REMEDY}"
            ) from error
    return None


def _file(build: Path, name: str, fields: dict[str, Any]) -> _File:
    """An entry of ``files``, which has to be a file of the build."""
    inside = PurePosixPath(name)
    plain = inside.as_posix() == name and ".." not in inside.parts and "\\" not in name
    if not plain or inside.parts[:1] != (build.name,) or "\0" in name:
        raise ValueError(f"it names {name!r:.80}, which is no file of {build.name!r:.80}")
    nbytes, digest = fields["bytes"], fields["sha256"]
    if type(nbytes) is not int or not 0 <= nbytes < 2**53 or not _SHA256.fullmatch(digest):
        raise ValueError(f"bytes or sha256 of {name!r:.80}")
    return _File(nbytes, digest, _segments(name, fields.get("pieces", []), nbytes))


def _segments(name: str, lines: list[str], nbytes: int) -> Segments:
    """Pieces of a file, all of them inside it."""
    found: Segments = []
    for line in lines:
        words = _PIECE.fullmatch(line)
        if words is None or int(words[1]) + int(words[2]) > nbytes:
            raise ValueError(f"a piece of {name!r:.80} is {line!r:.80}")
        found.append((int(words[1]), int(words[2]), words[3], words[4]))
    return found


def _inputs(inputs: dict[str, Any]) -> dict[str, str]:
    found = {name: fields["sha256"] for name, fields in inputs.items()}
    for name, digest in found.items():
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"sha256 of {name!r:.80} among the inputs")
    return found


def _short(error: Exception) -> str:
    text = str(error) if type(error) is ValueError else repr(error)
    return text if len(text) <= 180 else f"{text[:180]}..."
