"""Round to nearest: every unit of the plan on its own, in any order, from any thread."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import group_bytes
from lfmq.converter.jobs.workers import open_workers
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.quant.errors import CheckpointError
from lfmq.quant.grid import LANES
from lfmq.quant.rtn import quantize
from lfmq.quant.types import (
    FloatType,
    Quantized,
    Scheme,
    Weight,
)

# Weights that are read and quantized at a time; they stay in the processor's cache.
SLAB = 2**19
_own = threading.local()

# What an error in each column of a weight costs, [K]; None counts all the same.
Importance = Callable[[TensorPlan], NDArray[np.float32] | None]
# Hands a unit's finished weights to every writer; may run in another process.
Write = Callable[[Mapping[str, Weight]], Any]
# Takes in this process what Write returned for a unit.
Record = Callable[[tuple[TensorPlan, ...], Any], None]

# Largest finite value of each float type; beyond it a cast gives Inf.
_LARGEST: dict[FloatType, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": (2 - 2**-7) * 2.0**127,
}


class NotFiniteError(CheckpointError):
    """Weights that no run can convert, the next one as little as this one."""


def nearest_groups(
    checkpoint: Checkpoint,
    plan: Plan,
    write: Write,
    *,
    importance: Importance | None = None,
    finished: frozenset[str] = frozenset(),
    headroom: int = 2**62,
    record: Record | None = None,
    execution: Execution = Execution(),
) -> Iterator[tuple[TensorPlan, ...]]:
    """Quantize and write the plan's units on a pool, yielding each when it is done.

    The codes depend on no other unit: those whose first tensor is in ``finished`` are not even
    read.

    Args:
        checkpoint: whose tensors are read.
        plan: the storage of each.
        write: takes a unit's finished weights, from any thread, on a cluster in any process.
        importance: what an error in each column of a weight costs.
        finished: first tensors of units that need no work.
        headroom: bytes the units in work may hold together, on a cluster in each process; a
            larger unit is converted alone.
        record: gets what ``write`` returned.
        execution: threads, that is units at the same time, or the cluster.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
    """
    waiting: dict[Future[Any], tuple[TensorPlan, ...]] = {}
    job = partial(_convert_unit, checkpoint, write, importance)
    with open_workers(execution.threads, execution.cluster) as workers:
        if workers.remote:
            headroom *= workers.count
        for unit in plan.write_groups():
            if unit[0].name in finished:
                yield unit
                continue
            while waiting and (
                len(waiting) >= 2 * workers.count
                or sum(map(group_bytes, waiting.values())) + group_bytes(unit) > headroom
            ):
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _finish(waiting, done, record)
            waiting[workers.submit(job, unit)] = unit
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            yield from _finish(waiting, done, record)


def _finish(
    waiting: dict[Future[Any], tuple[TensorPlan, ...]],
    done: Iterable[Future[Any]],
    record: Record | None,
) -> Iterator[tuple[TensorPlan, ...]]:
    for future in done:
        unit = waiting.pop(future)
        found = future.result()
        if record is not None:
            record(unit, found)
        yield unit


def _convert_unit(
    checkpoint: Checkpoint,
    write: Write,
    importance: Importance | None,
    unit: tuple[TensorPlan, ...],
) -> Any:
    return write({entry.name: quantize_entry(checkpoint, entry, importance) for entry in unit})


def quantize_entry(
    checkpoint: Checkpoint, entry: TensorPlan, importance: Importance | None = None
) -> Weight:
    """Read a tensor and give it its storage: rounded to nearest, or floats.

    Raises:
        CheckpointError: it cannot be read, or holds a value its storage cannot.
    """
    if not isinstance(entry.storage, Scheme):
        values = checkpoint.read(entry.name)
        largest = _LARGEST[entry.storage]
        if not (-largest <= values.min() and values.max() <= largest):  # a NaN is neither
            raise not_finite(checkpoint, entry.name, entry.storage)
        return values
    known = importance(entry) if importance else None
    try:
        return _quantize_slabs(checkpoint, entry, entry.storage, known)
    except ValueError as error:
        raise not_finite(checkpoint, entry.name, "float16") from error


def _quantize_slabs(
    checkpoint: Checkpoint,
    entry: TensorPlan,
    scheme: Scheme,
    importance: NDArray[np.float32] | None,
) -> Quantized:
    """Quantize a weight [N, K] some rows at a time; no row depends on another."""
    step = max(LANES, SLAB // entry.shape[-1] // LANES * LANES)
    row_bytes = checkpoint.stored[entry.name].nbytes // entry.shape[0]
    buffer = _buffer(step * row_bytes)
    whole: Quantized | None = None
    for start in range(0, entry.shape[0], step):
        values = checkpoint.read_rows(entry.name, start, start + step, buffer)
        found = quantize(values, scheme, importance)
        if whole is None:
            if len(values) == entry.shape[0]:
                return found
            whole = found.map(lambda a: np.empty((entry.shape[0], *a.shape[1:]), a.dtype))
        for into, part in zip(whole.arrays(), found.arrays(), strict=True):
            into[start : start + step] = part
    assert whole is not None
    return whole


def _buffer(nbytes: int) -> NDArray[np.uint8]:
    """Memory of this thread, used again by each weight: new memory costs more than reading."""
    found: NDArray[np.uint8] | None = getattr(_own, "buffer", None)
    if found is None or found.size < nbytes:
        found = _own.buffer = np.empty(nbytes, np.uint8)
    return found


def not_finite(checkpoint: Checkpoint, name: str, dtype: str) -> NotFiniteError:
    """The error for a tensor with a value that its storage cannot hold."""
    path = checkpoint.stored[name].path
    return NotFiniteError(
        f"{path}: {name} holds a NaN, an Inf or a value beyond {dtype}; "
        "the checkpoint is damaged, fetch it again"
    )
