"""A build on disk, opened and ready for an engine."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.model.forward import Model
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.run.open_build import open_build
from lfmq.formats.build import Reader
from lfmq.formats.registry import build_nbytes
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.child_process import NATIVE, load_engine, native_version
from lfmq.validation.engines.installed import build_warnings
from lfmq.validation.measure.identity import OPTION, why_other
from lfmq.validation.measure.metadata import Fact, differing_facts
from lfmq.validation.measure.runs import (
    Comparison,
    Progress,
    Reference,
    compare_model,
    compare_native,
)

Engine = Literal["read", "native"]

# What must agree for two runs to be compared position by position and expert by expert.
_COMPARABLE = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_dense_layers",
    "num_experts",
    "num_experts_per_tok",
)


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """A build and what runs it.

    Attributes:
        path: the build.
        format: its container.
        reader: gives its weights.
        native: run in the format's own runtime, not the reference forward.
        engine: the runtime's name, or ``read``.
        engine_version: of the runtime, or of lfmq and torch.
        facts: metadata that differs from the checkpoint's.
        warnings: known faults of the installed runtimes and of its tokenizer.
        other: why it is not a build of the checkpoint, where that was allowed; else empty.
    """

    path: Path
    format: str
    reader: Reader
    native: bool
    engine: str
    engine_version: str
    facts: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()
    other: str = ""

    @property
    def nbytes(self) -> int:
        """Size of all its files."""
        return build_nbytes(self.path)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all its files for each weight of the model."""
        return 8 * self.nbytes / sum(t.size for t in expected_tensors(self.reader.config))

    def model(self, device: str) -> Model:
        """Its weights for the reference forward."""
        return Model(self.reader.config, self.reader.read, device=device)

    def run(
        self, reference: Reference, *, threads: int, device: str, progress: Progress | None
    ) -> Comparison:
        """Run it on the reference's tokens and compare.

        Raises:
            ValidationError: it is damaged, or its runtime fails.
        """
        if self.native:
            return compare_native(
                reference, self.path, self.format, threads=threads, progress=progress
            )
        return compare_model(reference, self.model(device), progress=progress)

    def to_json(self) -> dict[str, Any]:
        """What names it in a report."""
        return {
            "path": str(self.path),
            "format": self.format,
            "engine": self.engine,
            "engine_version": self.engine_version,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "other_checkpoint": self.other or None,
        }


def open_builds(
    paths: tuple[Path, ...],
    engines: tuple[Engine, ...],
    checkpoint: Checkpoint,
    *,
    allow_other: bool = False,
) -> list[EngineBuild]:
    """Every build in every engine; what cannot run is refused before anything does.

    Args:
        paths: the builds.
        engines: each build is there once for each of them.
        checkpoint: what they are to be builds of.
        allow_other: take builds of other weights too, and say so of them.

    Raises:
        ValidationError: a build cannot be read or is of another model, or a runtime is missing.
    """
    chosen = tuple(dict.fromkeys(engines))
    return [
        build
        for path in paths
        for build in _open(path, chosen, checkpoint, allow_other=allow_other)
    ]


def _read(path: Path, checkpoint: Checkpoint) -> tuple[str, Reader]:
    format, reader = open_build(path)
    for key in _COMPARABLE:
        found, wanted = getattr(reader.config, key), getattr(checkpoint.config, key)
        if found != wanted:
            raise ValidationError(
                f"{path}: {key} is {found}, the checkpoint's is {wanted}; it is a build of "
                "another model"
            )
    return format, reader


def _open(
    path: Path, engines: tuple[Engine, ...], checkpoint: Checkpoint, *, allow_other: bool
) -> list[EngineBuild]:
    """One build in every engine."""
    format, reader = _read(path, checkpoint)
    other = why_other(path, reader, checkpoint)
    if other and not allow_other:
        raise ValidationError(
            f"{path}: not a build of this checkpoint: {other}; give the checkpoint it was made "
            f"of, or {OPTION} to measure it all the same"
        )
    facts = differing_facts(path, format, reader.config, checkpoint)
    warnings = build_warnings(path, format, checkpoint.assets)
    if other:
        warnings = (f"not a build of this checkpoint ({OPTION}): {other}", *warnings)
    return [
        EngineBuild(path, format, reader, native, *_engine(format, native), facts, warnings, other)
        for native in (engine == "native" for engine in engines)
    ]


def _engine(format: str, native: bool) -> tuple[str, str]:
    """Name and version of what runs it."""
    if native:
        return load_engine(NATIVE[format]).NAME, native_version(format)
    return "read", f"lfmq {version('lfmq')}, torch {version('torch')}"
