"""What passes over the layers share: batches of a fixed size and arithmetic.

Work is cut into batches of fixed size and sums are taken in order, so that results do not depend
on the number of threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Tokens of a batch; batches are the unit of parallel work outside the experts.
BATCH_TOKENS = 4096


def batches(windows: int, sequence: int) -> list[slice]:
    """Slices of whole windows with at most ``BATCH_TOKENS`` tokens each, at least one window."""
    step = max(1, BATCH_TOKENS // sequence)
    return [slice(i, i + step) for i in range(0, windows, step)]


@contextmanager
def steady_torch() -> Iterator[None]:
    """One thread in each torch operation, so that its sums do not depend on a number of cores.

    Products of float32 matrices go through oneDNN (precision "medium"), twice as fast as the
    default library on AMD's processors. Where a processor multiplies bfloat16 matrices it may
    round the factors to that; sums are float32 everywhere.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads in each torch operation, for the time of a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
