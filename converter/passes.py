"""What passes over the layers share: batches of a fixed size and single-threaded arithmetic.

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
def single_threaded_torch() -> Iterator[None]:
    """One thread in each torch operation, so that its sums do not depend on a number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
