"""One pass over a checkpoint: read a tensor, quantize it once, hand it to every build."""

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.fingerprints import Fingerprints
from lfmq.converter.jobs.execution import Amount, Execution, Step
from lfmq.converter.jobs.lock import lock_folder
from lfmq.converter.jobs.memory import memory_headroom
from lfmq.converter.jobs.statefile import StateFile
from lfmq.converter.plan.plan import bits_per_weight
from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.quantize.layerwise import calibrated_groups
from lfmq.converter.quantize.rtn import NotFiniteError, nearest_groups
from lfmq.converter.quantize.settings import Calibrated, Calibration
from lfmq.converter.run.build_set import BuildSet
from lfmq.converter.run.planned import plan_layouts
from lfmq.converter.run.resume_key import check_unchanged, depends_on
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.build import BuildLayout, Format
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.writing.page_cache import outgrows_memory
from lfmq.quant.errors import ValidationError

# Yields each unit when it is written to every build; returns what calibration found.
_Units = Generator[tuple[TensorPlan, ...], None, Calibrated | None]


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
class Conversion:
    """What a conversion made.

    Attributes:
        builds: one for each format.
        calibrated: what calibration found; None without one.
    """

    builds: tuple[Build, ...]
    calibrated: Calibrated | None = None


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
    execution: Execution = Execution(),
) -> Conversion:
    """Quantize every tensor once and write one build for each format, and their manifest.

    An interrupted run leaves what is written beside the final names; the next run with the same
    arguments resumes from there and ends with the same bytes.

    Args:
        checkpoint: what to convert.
        recipe: its text goes into the manifest.
        plan: the resolved recipe.
        formats: the containers by name.
        output: folder for the builds; created when missing.
        calibration: quantize from what these tokens show; round to nearest when None.
        statistics: without calibration, what an error in each column of a weight costs.
        force: replace builds that exist.
        execution: how it is run; of it only the device can change a byte, when calibrating.

    Raises:
        UnsupportedError: a format cannot hold the plan; nothing was written.
        PlanError: the output exists, cannot be written or is being written by another run.
        CheckpointError: a tensor cannot be read, or holds NaN or Inf, or a file changed.
        ValidationError: a hidden state of the calibration is not finite.
    """
    layouts = plan_layouts(checkpoint, plan, formats)
    used = statistics if calibration is None else None
    job = _Job(checkpoint, recipe, plan, calibration, used, execution)
    stem = f"{checkpoint.assets.name}-{plan.recipe}"
    targets = {output / f"{stem}{formats[n].SUFFIX}": layout for n, layout in layouts.items()}
    calibrated = _write_builds(job, output / stem, targets, force=force)
    builds = (
        Build(layout.format, target, layout.nbytes, bits_per_weight(plan, layout.nbytes))
        for target, layout in targets.items()
    )
    return Conversion(tuple(builds), calibrated)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is converted, from what, and how; the arguments of :func:`convert`."""

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    calibration: Calibration | None
    statistics: Statistics | None
    execution: Execution


def _write_builds(
    job: _Job, stem: Path, targets: Mapping[Path, BuildLayout], *, force: bool
) -> Calibrated | None:
    """Write all builds and their manifest; what calibration found."""
    checkpoint, plan = job.checkpoint, job.plan
    depends = depends_on(
        checkpoint, job.recipe, plan, job.calibration, job.statistics, job.execution.device
    )
    drop = _drops_page_cache(checkpoint, targets.values())
    state = StateFile(stem.with_name(f"{stem.name}.resume"), json.dumps(depends))
    with (
        lock_folder(stem.parent),
        BuildSet(
            targets,
            depends=depends,
            force=force,
            threads=job.execution.threads,
            drop_page_cache=drop,
        ) as builds,
        Fingerprints(checkpoint, drop_page_cache=drop) as inputs,
    ):
        for line in builds.lines(len(plan.write_groups())):
            job.execution.tell(line)
        try:
            calibrated = _run(_units(job, builds, state), _amounts(job, builds), inputs, job)
        except (NotFiniteError, ValidationError):  # the next run cannot get past it either
            builds.discard()
            state.remove()
            raise
        hashes = inputs.finish()
        check_unchanged(checkpoint, depends)
        text = job.calibration.windows.text_sha256 if job.calibration else None
        manifest = stem.with_name(f"{stem.name}.manifest.json")
        assets = checkpoint.assets
        builds.publish(manifest, assets.name, hashes, plan, job.recipe, text, assets.metadata)
        state.remove()
    return calibrated


def _drops_page_cache(checkpoint: Checkpoint, layouts: Iterable[BuildLayout]) -> bool:
    """Whether checkpoint and builds together are more than the system can cache."""
    return outgrows_memory(
        sum(path.stat().st_size for path in checkpoint.weight_files)
        + sum(layout.nbytes for layout in layouts)
    )


def _units(job: _Job, builds: BuildSet, state: StateFile) -> _Units:
    """Every unit calibrated, or rounded to nearest.

    On a cluster its machines write rounded units into the builds themselves.
    """
    if job.calibration is not None:
        return (
            yield from calibrated_groups(
                job.checkpoint,
                job.plan,
                job.calibration,
                builds.write,
                state=state,
                finished=builds.finished,
                execution=job.execution,
            )
        )
    remote = job.execution.cluster is not None
    yield from nearest_groups(
        job.checkpoint,
        job.plan,
        builds.fillers() if remote else builds.write,
        importance=job.statistics.importance if job.statistics else None,
        finished=builds.finished,
        headroom=memory_headroom(job.plan, job.execution),
        record=builds.record if remote else None,
        execution=job.execution,
    )
    return None


def _amounts(job: _Job, builds: BuildSet) -> dict[str, Amount]:
    """What each unit has to do, by its first tensor."""
    return {
        unit[0].name: Amount(
            0 if unit[0].layer is None else unit[0].layer + 1,
            sum(e.size for e in unit),
            sum(job.checkpoint.stored[e.name].nbytes for e in unit),
            builds.nbytes_of(e.name for e in unit),
        )
        for unit in job.plan.write_groups()
    }


def _run(
    units: _Units, amounts: Mapping[str, Amount], inputs: Fingerprints, job: _Job
) -> Calibrated | None:
    """Have every unit written; whatever stops it, no thread writes after."""
    total = Amount(
        max(a.layers for a in amounts.values()),
        sum(a.weights for a in amounts.values()),
        sum(a.read for a in amounts.values()),
        sum(a.written for a in amounts.values()),
    )
    with closing(units):
        while True:
            try:
                unit = next(units)
            except StopIteration as end:
                found: Calibrated | None = end.value
                return found
            done = amounts[unit[0].name]
            inputs.advance(done.read)
            job.execution.report(Step("quantizing", "byte", done.read, total.read, (done, total)))
