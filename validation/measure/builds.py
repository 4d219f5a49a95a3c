"""A build on disk, opened and ready for an engine."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.model.forward import Model
from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.build import Reader
from lfmq.formats.registry import FORMATS, build_nbytes, detect_format
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.child_process import NATIVE, load_engine, native_version
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
        facts: what it says otherwise than the checkpoint.
    """

    path: Path
    format: str
    reader: Reader
    native: bool
    engine: str
    engine_version: str
    facts: tuple[Fact, ...] = ()

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
        }


def open_builds(
    paths: tuple[Path, ...], engines: tuple[Engine, ...], checkpoint: Checkpoint
) -> list[EngineBuild]:
    """Every build in every engine; what cannot run is refused before anything does.

    Raises:
        ValidationError: a build cannot be read or is of another model, or a runtime is missing.
    """
    return [
        _open(path, reader, format, engine, facts)
        for path in paths
        for format, reader in [_read(path, checkpoint)]
        for facts in [differing_facts(path, format, reader.config, checkpoint)]
        for engine in dict.fromkeys(engines)
    ]


def _read(path: Path, checkpoint: Checkpoint) -> tuple[str, Reader]:
    format = detect_format(path)
    reader = FORMATS[format].open_reader(path)
    for key in _COMPARABLE:
        found, wanted = getattr(reader.config, key), getattr(checkpoint.config, key)
        if found != wanted:
            raise ValidationError(
                f"{path}: {key} is {found}, the checkpoint's is {wanted}; it is a build of "
                "another model"
            )
    return format, reader


def _open(
    path: Path, reader: Reader, format: str, engine: Engine, facts: tuple[Fact, ...]
) -> EngineBuild:
    if engine == "read":
        own = f"lfmq {version('lfmq')}, torch {version('torch')}"
        return EngineBuild(path, format, reader, False, "read", own, facts)
    name = load_engine(NATIVE[format]).NAME
    return EngineBuild(path, format, reader, True, name, native_version(format), facts)
