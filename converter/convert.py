"""One pass over a checkpoint: read a tensor, quantize it once, hand it to every writer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.manifest import write_manifest
from lfmq.converter.plan import bits_per_weight, token_bytes
from lfmq.converter.recipe import Recipe
from lfmq.formats.build import BuildLayout, Format
from lfmq.formats.writer import BuildWriter
from lfmq.quant.errors import CheckpointError, PlanError, UnsupportedError
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Entry, Plan, Weight

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
        UnsupportedError: a format cannot hold the plan.
    """
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
        for unit in _quantized_units(checkpoint, plan, writers, threads):
            if progress is not None:
                progress(sum(e.size for e in unit), sum(e.size for e in plan.entries))
        for writer in writers:
            writer.commit()
    builds = tuple(
        Build(name, targets[name], lay.nbytes, bits_per_weight(plan, lay.nbytes))
        for name, lay in layouts.items()
    )
    write_manifest(output / f"{stem}.manifest.json", checkpoint, plan, recipe, targets)
    return builds


def _quantized_units(
    checkpoint: Checkpoint, plan: Plan, writers: Iterable[BuildWriter], threads: int
) -> Iterator[tuple[Entry, ...]]:
    """Run the units on a pool, at most two waiting for each thread, yielding each when done."""
    waiting: dict[Future[None], tuple[Entry, ...]] = {}
    with ThreadPoolExecutor(threads) as pool:
        try:
            for unit in plan.units():
                if len(waiting) >= 2 * threads:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from _finish(waiting, done)
                waiting[pool.submit(_convert_unit, checkpoint, unit, writers)] = unit
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _finish(waiting, done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _finish(
    waiting: dict[Future[None], tuple[Entry, ...]], done: Iterable[Future[None]]
) -> Iterator[tuple[Entry, ...]]:
    for future in done:
        unit = waiting.pop(future)
        future.result()
        yield unit


def _convert_unit(
    checkpoint: Checkpoint, unit: tuple[Entry, ...], writers: Iterable[BuildWriter]
) -> None:
    weights = {entry.name: _quantize_entry(checkpoint, entry) for entry in unit}
    for writer in writers:
        writer.write(weights)


def _quantize_entry(checkpoint: Checkpoint, entry: Entry) -> Weight:
    values = checkpoint.read(entry.name)
    if entry.scheme is None:
        if not (abs(values) < float("inf")).all():
            raise _not_finite(checkpoint, entry)
        return values
    try:
        return quantize(values, entry.scheme)
    except ValueError as error:
        raise _not_finite(checkpoint, entry) from error


def _not_finite(checkpoint: Checkpoint, entry: Entry) -> CheckpointError:
    path = checkpoint.stored[entry.name].path
    return CheckpointError(
        f"{path}: {entry.name} holds a NaN, an Inf or a value beyond float16; "
        "the checkpoint is damaged, fetch it again"
    )
