"""Lets go of files' pages that are done with.

A conversion reads and writes more than many machines have memory. What it leaves in the page cache
drives out everybody else's files, and it takes ever new pages from the system, which cost a
virtual machine more than the read. With its own pages given back it goes on with those.
"""

import os
from collections import deque

RUN = 2**25  # bytes let go of at a time


def outgrows_memory(nbytes: int) -> bool:
    """Whether so many bytes of files would fill most of this machine's memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    return nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class PageTrail:
    """Runs of files that are done with, in order; each is let go of when ``keep`` bytes follow.

    A run that was written goes to the disk at once, so that it can be let go of later.
    """

    def __init__(self, keep: int, *, active: bool, written: bool = False) -> None:
        self._keep, self._active, self._written = keep // RUN, active, written
        self._runs: deque[tuple[int, int]] = deque()

    def passed(self, descriptor: int, start: int, stop: int) -> None:
        """Bytes of a file that stays open; whole runs of it are taken up when they end."""
        if not self._active:
            return
        for end in range((start // RUN + 1) * RUN, stop + 1, RUN):
            self._runs.append((descriptor, end - RUN))
            if self._written:
                _let_go(descriptor, end - RUN)
            while len(self._runs) > self._keep:
                _let_go(*self._runs.popleft())


def _let_go(descriptor: int, start: int) -> None:
    """Of clean pages; of others the writing begins (``mm/fadvise.c`` of Linux)."""
    os.posix_fadvise(descriptor, start, RUN, os.POSIX_FADV_DONTNEED)
