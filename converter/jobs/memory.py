"""How much memory a conversion may use, and how much a unit of the plan needs."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from functools import cache

from lfmq.converter.jobs.execution import Execution
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.quant.errors import RecipeError
from lfmq.quant.types import SLAB, Scheme

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
_UNITS["GIB"] = 2**30
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
# Bytes for each weight in work: as stored and as float32 while it is read, then while it is packed
# for the format that takes most. tests/converter/test_memory.py measures it.
_READ = 6
_WORK = 16


def parse_bytes(text: str) -> int:
    """``2GB``, ``5800MiB`` or plain bytes.

    Raises:
        RecipeError: it is none of these, or nothing.
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise RecipeError(f"{text!r}: expected bytes (6.1GB, 5800MiB)")
    return int(float(found[1]) * unit)


def peak_resident() -> int:
    """Most memory this process held so far, bytes; the system counts kilobytes, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed() -> None:
    """Give freed memory back to the system, which glibc keeps in each thread's arena.

    malloc_trim(3); other C libraries lack it and keep less.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def group_bytes(unit: tuple[TensorPlan, ...]) -> int:
    """What a unit of the plan holds at most from its first byte read to its last written."""
    held = sum(_held(entry) for entry in unit)
    return held + _WORK * min(SLAB, max(entry.size for entry in unit))


def _held(entry: TensorPlan) -> int:
    """A weight between reading and writing: codes, scales and offsets; floats come whole."""
    if not isinstance(entry.storage, Scheme):
        return _READ * entry.size
    scheme = entry.storage
    held = entry.size + 4 * (entry.size // scheme.span)  # both float16
    if scheme.span == scheme.group:
        return held
    return held + 2 * entry.size // scheme.group  # both bytes of a sub-block


def largest_group(plan: Plan) -> tuple[TensorPlan, ...]:
    """The unit of the plan that needs most memory."""
    return max(plan.write_groups(), key=group_bytes)


def memory_headroom(plan: Plan, execution: Execution) -> int:
    """Bytes that units in work may hold, beside what the program itself takes.

    Tells the user when one unit alone needs more than all of it.
    """
    budget = execution.memory
    headroom = budget - peak_resident()
    largest = largest_group(plan)
    needed = group_bytes(largest) + budget - headroom
    if needed > budget:
        execution.tell(
            f"memory: {largest[0].name} alone takes up to {needed:,} bytes with the program "
            f"itself, more than the {budget:,} allowed; large tensors are converted one at a time"
        )
    return headroom
