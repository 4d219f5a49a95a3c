"""Round to nearest: every unit of the plan on its own, in any order, from any thread."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint import Checkpoint
from lfmq.quant.errors import CheckpointError
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Entry, FloatType, Plan, Scheme, Weight

# What an error in each column of a weight costs, [K]; None counts all the same.
Importance = Callable[[Entry], NDArray[np.float32] | None]
# Hands a unit's finished weights to every writer.
Write = Callable[[Mapping[str, Weight]], None]

# Largest finite value of each float type; beyond it a cast gives Inf.
_LARGEST: dict[FloatType, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": (2 - 2**-7) * 2.0**127,
}


class NotFiniteError(CheckpointError):
    """Weights that no run can convert, the next one as little as this one."""


def nearest_units(
    checkpoint: Checkpoint,
    plan: Plan,
    write: Write,
    threads: int,
    importance: Importance | None = None,
    finished: frozenset[str] = frozenset(),
) -> Iterator[tuple[Entry, ...]]:
    """Quantize and write the plan's units on a pool, yielding each when it is done.

    At most two wait for each thread, which bounds memory. The codes depend on no other unit: those
    whose first tensor is in ``finished`` are not even read.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
    """
    waiting: dict[Future[None], tuple[Entry, ...]] = {}
    with ThreadPoolExecutor(threads) as pool:
        try:
            for unit in plan.units():
                if unit[0].name in finished:
                    yield unit
                    continue
                if len(waiting) >= 2 * threads:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from _finish(waiting, done)
                waiting[pool.submit(_convert_unit, checkpoint, unit, write, importance)] = unit
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
    checkpoint: Checkpoint,
    unit: tuple[Entry, ...],
    write: Write,
    importance: Importance | None,
) -> None:
    write({entry.name: quantize_entry(checkpoint, entry, importance) for entry in unit})


def quantize_entry(
    checkpoint: Checkpoint, entry: Entry, importance: Importance | None = None
) -> Weight:
    """Read a tensor and give it its storage: rounded to nearest, or floats.

    Raises:
        CheckpointError: it cannot be read, or holds a value its storage cannot.
    """
    values = checkpoint.read(entry.name)
    if not isinstance(entry.storage, Scheme):
        if not (abs(values) <= _LARGEST[entry.storage]).all():
            raise not_finite(checkpoint, entry.name, entry.storage)
        return values
    try:
        return quantize(values, entry.storage, importance(entry) if importance else None)
    except ValueError as error:
        raise not_finite(checkpoint, entry.name, "float16") from error


def not_finite(checkpoint: Checkpoint, name: str, dtype: str) -> NotFiniteError:
    """The error for a tensor with a value that its storage cannot hold."""
    path = checkpoint.stored[name].path
    return NotFiniteError(
        f"{path}: {name} holds a NaN, an Inf or a value beyond {dtype}; "
        "the checkpoint is damaged, fetch it again"
    )
