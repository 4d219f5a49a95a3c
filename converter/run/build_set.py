"""The builds of one run, written side by side: every unit goes into each of them."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.run.manifest import Made, write_manifest
from lfmq.formats.build import BuildLayout
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.writing.filler import Filler
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import PlanError
from lfmq.quant.types import Weight


class BuildSet:
    """The writers of all builds, open for the time of a ``with`` block.

    All targets are free before anything is written. A block that ends in an error leaves what is
    written beside the final names, for the next run to resume from.
    """

    def __init__(
        self,
        targets: Mapping[Path, BuildLayout],
        *,
        depends: Mapping[str, str],
        force: bool,
        threads: int,
        drop_page_cache: bool,
    ) -> None:
        """Prepare the writers.

        Args:
            targets: the final name of each build, and its layout.
            depends: what the bytes depend on.
            force: replace builds that exist.
            threads: that finish a file.
            drop_page_cache: give written pages back to the system at once.

        Raises:
            PlanError: a build exists.
        """
        self._writers = [
            BuildWriter(
                target,
                layout,
                force=force,
                depends=dict(depends),
                threads=threads,
                drop_page_cache=drop_page_cache,
            )
            for target, layout in targets.items()
        ]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Open every build, or none."""
        with ExitStack() as opened:
            for writer in self._writers:
                opened.enter_context(writer)
            self._stack = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every build."""
        self._stack.__exit__(kind, error, traceback)

    @property
    def finished(self) -> frozenset[str]:
        """First tensors of the units that an earlier run has written to every build."""
        return frozenset.intersection(*(w.finished for w in self._writers))

    def lines(self, units: int) -> tuple[str, ...]:
        """What became of an earlier run, for the user; ``units`` is the number of all units."""
        lines = [f"starting over: {w.started_over}" for w in self._writers if w.started_over]
        if finished := self.finished:
            lines.append(f"going on: {len(finished)} of {units} units are finished")
        if damaged := max(w.rewritten for w in self._writers):
            lines.append(
                f"{damaged} units of the last run did not reach the disk, writing them again"
            )
        return tuple(dict.fromkeys(lines))

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Bytes of some tensors in all builds."""
        listed = tuple(names)
        return sum(w.nbytes_of(listed) for w in self._writers)

    def write(self, weights: Mapping[str, Weight]) -> None:
        """Write a unit to every build."""
        for writer in self._writers:
            writer.write(weights)

    def fillers(self) -> "Fillers":
        """What writes units in other processes."""
        return Fillers([writer.filler for writer in self._writers])

    def record(self, unit: tuple[TensorPlan, ...], digests: list[tuple[str, ...]]) -> None:
        """Note what :class:`Fillers` wrote of a unit."""
        for writer, found in zip(self._writers, digests, strict=True):
            writer.record(tuple(entry.name for entry in unit), found)

    def discard(self) -> None:
        """Remove what was written: no later run can use it."""
        for writer in self._writers:
            writer.discard()

    def publish(
        self,
        manifest: Path,
        checkpoint: str,
        inputs: Mapping[str, Any],
        plan: Plan,
        recipe: Recipe,
        text_sha256: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Give builds and manifest their names; nothing gets one before everything is whole.

        Args:
            manifest: its final name.
            checkpoint: its name.
            inputs: size and sha256 of the checkpoint's files.
            plan: the storage of every tensor.
            recipe: what the plan came from.
            text_sha256: of the calibration text, if any.
            metadata: key-values that the user added, if any.

        Raises:
            PlanError: a file cannot be written.
        """
        for writer in self._writers:
            writer.finish()
        made = {
            w.layout.format: Made(w.target, w.part, w.hashes(), w.digests()) for w in self._writers
        }
        part = write_manifest(
            manifest,
            checkpoint,
            inputs,
            plan,
            recipe,
            made,
            text_sha256=text_sha256,
            metadata=metadata,
        )
        try:
            for writer in self._writers:
                writer.commit()
            part.replace(manifest)
        except OSError as error:
            reason = error.strerror or error
            raise PlanError(f"{manifest}: cannot be written ({reason})") from error
        finally:
            part.unlink(missing_ok=True)


class Fillers:
    """Writes a unit to every build, in another process than the builds' own."""

    def __init__(self, fillers: list[Filler]) -> None:
        self._fillers = fillers

    def __call__(self, weights: Mapping[str, Weight]) -> list[tuple[str, ...]]:
        """Write a unit; the digests of what each build got."""
        return [filler.fill_alone(weights) for filler in self._fillers]
