"""One pass over a checkpoint: read a tensor, quantize it once, hand it to every writer."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.calibrated import calibrated_units
from lfmq.converter.calibration import Calibration
from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.manifest import write_manifest
from lfmq.converter.nearest import nearest_units
from lfmq.converter.plan import bits_per_weight, token_bytes
from lfmq.converter.recipe import Recipe
from lfmq.converter.statistics import Statistics
from lfmq.formats.build import BuildLayout, Format
from lfmq.formats.writer import BuildWriter
from lfmq.quant.errors import CheckpointError, PlanError, UnsupportedError
from lfmq.quant.types import Plan, Weight

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build."""

    format: str
    path: Path
    nbytes: int
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq convert --json``."""
        return {
            "format": self.format,
            "path": str(self.path),
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True, slots=True)
class PlannedBuild:
    """What a build would be; ``refused`` says why a format cannot hold the plan."""

    format: str
    nbytes: int = 0
    bits_per_weight: float = 0.0
    bytes_per_token: int = 0
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq plan --json``."""
        if self.refused is not None:
            return {"format": self.format, "refused": self.refused}
        return {
            "format": self.format,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "bytes_per_token": self.bytes_per_token,
        }


def plan_layouts(
    checkpoint: Checkpoint, plan: Plan, formats: Mapping[str, Format]
) -> dict[str, BuildLayout]:
    """Check the plan against every format and lay out each build; reads no weight.

    Raises:
        CheckpointError: the tokenizer has ids beyond the embedding.
        UnsupportedError: a format cannot hold the plan.
    """
    rows, vocabulary = plan.geometry.vocab_size, checkpoint.vocabulary
    if vocabulary is not None and vocabulary.size > rows:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'}: token {vocabulary.last!r} has id "
            f"{vocabulary.size - 1}, the model's vocabulary has {rows} rows; the tokenizer "
            "belongs to another checkpoint"
        )
    for module in formats.values():
        module.check(plan, checkpoint.assets)
    return {name: f.layout(plan, checkpoint.assets) for name, f in formats.items()}


def plan_builds(
    checkpoint: Checkpoint, plan: Plan, formats: Mapping[str, Format]
) -> tuple[PlannedBuild, ...]:
    """The size of each build, or why its format refuses; reads no weight."""
    builds = []
    for name, module in formats.items():
        try:
            layout = plan_layouts(checkpoint, plan, {name: module})[name]
        except UnsupportedError as error:
            builds.append(PlannedBuild(name, refused=str(error)))
            continue
        bits = bits_per_weight(plan, layout.nbytes)
        builds.append(PlannedBuild(name, layout.nbytes, bits, token_bytes(plan, layout)))
    return tuple(builds)


def convert(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    formats: Mapping[str, Format],
    output: Path,
    *,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    force: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> tuple[Build, ...]:
    """Quantize every tensor once and write one build for each format, and their manifest.

    Args:
        checkpoint: what to convert.
        recipe: its text goes into the manifest.
        plan: the resolved recipe.
        formats: the containers by name.
        output: folder for the builds; created when missing.
        calibration: quantize from what these tokens show; round to nearest when None.
        statistics: without calibration, what an error in each column of a weight costs.
        force: replace builds that exist.
        threads: tensors quantized at the same time; the bytes do not depend on it.
        progress: called with weights done and weights in all.

    Raises:
        UnsupportedError: a format cannot hold the plan; nothing was written.
        PlanError: the output exists or cannot be written.
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
    """
    layouts = plan_layouts(checkpoint, plan, formats)
    stem = f"{checkpoint.assets.name}-{plan.recipe}"
    targets = {name: output / f"{stem}{formats[name].SUFFIX}" for name in formats}
    for target in targets.values():
        if target.exists() and not force:
            raise PlanError(f"{target}: already exists; give --force to replace it")
    with ExitStack() as stack:
        writers = [
            stack.enter_context(BuildWriter(targets[name], layouts[name], force=force))
            for name in formats
        ]
        weights = sum(e.size for e in plan.entries)

        def write(weights: Mapping[str, Weight]) -> None:
            for writer in writers:
                writer.write(weights)

        if calibration is None:
            importance = statistics.importance if statistics else None
            units = nearest_units(checkpoint, plan, write, threads, importance)
        else:
            units = calibrated_units(checkpoint, plan, calibration, write, threads)
        for unit in units:
            if progress is not None:
                progress(sum(e.size for e in unit), weights)
        for writer in writers:
            writer.finish()
        manifest = output / f"{stem}.manifest.json"
        places = {w.layout.format: (w.target, w.part) for w in writers}
        part = write_manifest(
            manifest,
            checkpoint,
            plan,
            recipe,
            places,
            text_sha256=calibration.windows.text_sha256 if calibration else None,
        )
        stack.callback(part.unlink, missing_ok=True)
        for writer in writers:  # nothing gets its name before everything is whole
            writer.commit()
        part.replace(manifest)
    return tuple(
        Build(name, targets[name], lay.nbytes, bits_per_weight(plan, lay.nbytes))
        for name, lay in layouts.items()
    )
