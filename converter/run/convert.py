"""One pass over a checkpoint: read a tensor, quantize it once, hand it to every writer."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.fingerprints import Fingerprints
from lfmq.converter.jobs.lock import lock_folder
from lfmq.converter.jobs.memory import (
    DEFAULT,
    largest_unit,
    parse_bytes,
    peak_resident,
    unit_bytes,
)
from lfmq.converter.jobs.statefile import StateFile
from lfmq.converter.plan.plan import bits_per_weight, token_bytes
from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.quantize.layerwise import calibrated_units
from lfmq.converter.quantize.rtn import NotFiniteError, Write, nearest_units
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.manifest import Made, write_manifest
from lfmq.converter.run.resume_key import check_unchanged, depends_on
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.build import BuildLayout, Format
from lfmq.formats.plan import Entry, Plan
from lfmq.formats.registry import check_plan
from lfmq.formats.writing.page_cache import outgrows_memory
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import CheckpointError, PlanError, UnsupportedError, ValidationError
from lfmq.quant.types import Weight

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Amount:
    """How far a conversion came, or all there is to do.

    Attributes:
        layers: layers that were begun; of one unit the number of its layer, from 1, or 0.
        weights: quantized.
        read: bytes of the checkpoint.
        written: bytes of all builds.
    """

    layers: int = 0
    weights: int = 0
    read: int = 0
    written: int = 0


Progress = Callable[[Amount, Amount], None]


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
    rows, vocabulary = plan.config.vocab_size, checkpoint.vocabulary
    if vocabulary is not None and vocabulary.size > rows:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'}: token {vocabulary.last!r} has id "
            f"{vocabulary.size - 1}, the model's vocabulary has {rows} rows; the tokenizer "
            "belongs to another checkpoint"
        )
    for module in formats.values():
        check_plan(module, plan, checkpoint.assets)
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
    memory: int | None = None,
    device: str = "cpu",
    cluster: str | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> tuple[Build, ...]:
    """Quantize every tensor once and write one build for each format, and their manifest.

    A run that did not come to its end leaves what is written beside the final names; the next run
    of the same goes on from there and ends with the same bytes.

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
        memory: bytes the process may hold when it rounds to nearest, the default is 2 GB. A tensor
            that needs more is converted on its own, and a line says so; bytes do not depend on it.
        device: where matrices are multiplied when calibrating.
        cluster: address of a Ray cluster that does the work; every machine sees checkpoint and
            output under the same paths. The bytes do not depend on it.
        progress: called after each unit with what was done for it, and all there is to do.
        notice: called with a line for the user: that a run goes on, or why it starts over.

    Raises:
        UnsupportedError: a format cannot hold the plan; nothing was written.
        PlanError: the output exists, cannot be written or is being written by another run.
        CheckpointError: a tensor cannot be read, or holds NaN or Inf, or a file changed.
    """
    layouts = plan_layouts(checkpoint, plan, formats)
    stem = f"{checkpoint.assets.name}-{plan.recipe}"
    used = statistics if calibration is None else None
    depends = depends_on(checkpoint, recipe, plan, calibration, used, device)
    drop_page_cache = outgrows_memory(
        sum(path.stat().st_size for path in checkpoint.weight_files)
        + sum(layout.nbytes for layout in layouts.values())
    )
    with ExitStack() as stack:
        stack.enter_context(lock_folder(output))
        writers = [
            BuildWriter(
                output / f"{stem}{formats[name].SUFFIX}",
                layout,
                force=force,
                depends=depends,
                threads=threads,
                drop_page_cache=drop_page_cache,
            )
            for name, layout in layouts.items()
        ]
        for writer in writers:  # all targets are free before anything is written
            stack.enter_context(writer)
        finished = _finished(writers, len(plan.units()), notice)
        write = _write_to(writers)
        state = StateFile(output / f"{stem}.resume", json.dumps(depends))
        if calibration is None:
            importance = used.importance if used else None
            room = _memory_headroom(memory, plan, notice)
            units = nearest_units(
                checkpoint,
                plan,
                _Fillers(writers) if cluster else write,
                threads,
                importance,
                finished,
                room,
                cluster=cluster,
                record=partial(_record, writers) if cluster else None,
            )
        else:
            units = calibrated_units(
                checkpoint,
                plan,
                calibration,
                write,
                threads,
                device=device,
                cluster=cluster,
                state=state,
                finished=finished,
            )
        inputs = stack.enter_context(Fingerprints(checkpoint, drop_page_cache=drop_page_cache))

        def advance(step: Amount, total: Amount) -> None:
            inputs.advance(step.read)
            if progress is not None:
                progress(step, total)

        try:
            _run(units, _amounts(checkpoint, plan, writers), advance)
        except (NotFiniteError, ValidationError):  # the next run cannot get past it either
            for writer in writers:
                writer.discard()
            state.remove()
            raise
        hashes = inputs.finish()
        check_unchanged(checkpoint, depends)
        text_sha256 = calibration.windows.text_sha256 if calibration else None
        manifest = output / f"{stem}.manifest.json"
        _name(writers, manifest, hashes, checkpoint.assets.name, plan, recipe, text_sha256)
        state.remove()
    return tuple(
        Build(w.layout.format, w.target, nbytes, bits_per_weight(plan, nbytes))
        for w, nbytes in ((w, w.layout.nbytes) for w in writers)
    )


def _write_to(writers: list[BuildWriter]) -> Write:
    def write(weights: Mapping[str, Weight]) -> None:
        for writer in writers:
            writer.write(weights)

    return write


class _Fillers:
    """Fills in all builds, in another process."""

    def __init__(self, writers: list[BuildWriter]) -> None:
        self._fillers = [writer.filler for writer in writers]

    def __call__(self, weights: Mapping[str, Weight]) -> list[tuple[str, ...]]:
        return [filler.fill_alone(weights) for filler in self._fillers]


def _record(
    writers: list[BuildWriter], unit: tuple[Entry, ...], digests: list[tuple[str, ...]]
) -> None:
    for writer, found in zip(writers, digests, strict=True):
        writer.record(tuple(entry.name for entry in unit), found)


def _finished(writers: list[BuildWriter], units: int, notice: Notice | None) -> frozenset[str]:
    """Units that are in every build since an earlier run; tells what became of that run."""
    finished = frozenset.intersection(*(w.finished for w in writers))
    lines = [f"starting over: {w.started_over}" for w in writers if w.started_over]
    if finished:
        lines.append(f"going on: {len(finished)} of {units} units are finished")
    if damaged := max(w.rewritten for w in writers):
        lines.append(f"{damaged} units of the last run did not reach the disk, writing them again")
    for line in dict.fromkeys(lines):
        if notice is not None:
            notice(line)
    return finished


def _memory_headroom(memory: int | None, plan: Plan, notice: Notice | None) -> int:
    """Bytes that units in work may hold, beside what the program itself takes."""
    budget = parse_bytes(DEFAULT) if memory is None else memory
    room = budget - peak_resident()
    largest = largest_unit(plan)
    needed = unit_bytes(largest) + budget - room
    if needed > budget and notice is not None:
        notice(
            f"memory: {largest[0].name} alone takes up to {needed:,} bytes with the program "
            f"itself, more than the {budget:,} allowed; large tensors are converted one at a time"
        )
    return room


def _amounts(checkpoint: Checkpoint, plan: Plan, writers: list[BuildWriter]) -> dict[str, Amount]:
    """What each unit has to do, by its first tensor."""
    return {
        unit[0].name: Amount(
            0 if unit[0].layer is None else unit[0].layer + 1,
            sum(e.size for e in unit),
            sum(checkpoint.stored[e.name].nbytes for e in unit),
            sum(w.nbytes_of(e.name for e in unit) for w in writers),
        )
        for unit in plan.units()
    }


def _run(
    units: Iterator[tuple[Entry, ...]], amounts: Mapping[str, Amount], progress: Progress
) -> None:
    """Have every unit written; whatever stops it, no thread writes after."""
    total = Amount(
        max(a.layers for a in amounts.values()),
        sum(a.weights for a in amounts.values()),
        sum(a.read for a in amounts.values()),
        sum(a.written for a in amounts.values()),
    )

    def each() -> Generator[tuple[Entry, ...]]:
        yield from units

    with closing(each()) as found:
        for unit in found:
            progress(amounts[unit[0].name], total)


def _name(
    writers: list[BuildWriter],
    manifest: Path,
    inputs: Mapping[str, Any],
    checkpoint: str,
    plan: Plan,
    recipe: Recipe,
    text_sha256: str | None,
) -> None:
    """Give builds and manifest their names; nothing gets one before everything is whole."""
    for writer in writers:
        writer.finish()
    places = {w.layout.format: Made(w.target, w.part, w.hashes(), w.digests()) for w in writers}
    part = write_manifest(
        manifest, checkpoint, inputs, plan, recipe, places, text_sha256=text_sha256
    )
    try:
        for writer in writers:
            writer.commit()
        part.replace(manifest)
    except OSError as error:
        raise PlanError(f"{manifest}: cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)
