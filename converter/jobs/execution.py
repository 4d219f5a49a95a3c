"""How work is run and whom it tells: one value that every pass over a model takes.

What a pass computes does not depend on it, with one exception: another device rounds the sums of
a calibration differently.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lfmq.quant.errors import ValidationError

Device = Literal["cpu", "cuda"]

# Bytes that a conversion without calibration text may hold.
DEFAULT_MEMORY = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Amount:
    """Work of a conversion: done in one step, or all there is.

    Attributes:
        layers: layers that were begun; of one step the number of its layer, from 1, or 0.
        weights: weights quantized.
        read: bytes of the checkpoint.
        written: bytes of all builds.
    """

    layers: int = 0
    weights: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work that has just ended.

    Attributes:
        phase: what is being done, for instance ``balancing`` or ``quantizing``.
        unit: what is counted: ``layer``, ``step``, ``answer`` or ``byte``.
        done: of this unit, in this step.
        total: of this unit, in the whole phase.
        amounts: of a conversion what this step did and all there is; zeros in other phases.
    """

    phase: str
    unit: str
    done: int
    total: int
    amounts: tuple[Amount, Amount] = (Amount(), Amount())


Progress = Callable[[Step], None]
Notice = Callable[[str], None]


def available_threads() -> int:
    """Cores that this process may use; 1 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@dataclass(frozen=True, slots=True)
class Execution:
    """How work is run, and whom it tells.

    Attributes:
        threads: pieces of work at the same time; default: all cores.
        device: where matrices are multiplied, ``cpu`` or ``cuda``.
        cluster: address of a running Ray cluster (``HOST:PORT``, or ``auto``) that does the work
            of ``calibrate`` and ``convert``; every machine sees all folders under the same paths.
        memory: bytes the process may hold while it rounds to nearest. A tensor that needs more is
            converted on its own, and a notice says so.
        progress: called after each step with what was done.
        notice: called with a line for the user: a warning, or that an earlier run is resumed.

    Raises:
        ValidationError: the device is not there.
    """

    threads: int = field(default_factory=available_threads)
    device: Device = "cpu"
    cluster: str | None = None
    memory: int = DEFAULT_MEMORY
    progress: Progress | None = None
    notice: Notice | None = None

    def __post_init__(self) -> None:
        if self.device == "cpu":
            return
        import torch  # only here: planning and inspecting start without it

        if not torch.cuda.is_available():
            raise ValidationError("--device cuda: torch finds no CUDA device; use --device cpu")

    def tell(self, line: str) -> None:
        """Hand a line to whoever listens."""
        if self.notice is not None:
            self.notice(line)

    def report(self, step: Step) -> None:
        """Hand a step to whoever listens."""
        if self.progress is not None:
            self.progress(step)

    def counter(self, phase: str, unit: str = "layer") -> Callable[[int, int], None]:
        """A function of the units just done and those of the whole phase, which reports them."""
        return lambda done, total: self.report(Step(phase, unit, done, total))
