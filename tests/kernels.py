"""Kernels are compiled once: a process that needs one waits for the process that compiles it.

numba's cache alone does not do that. Workers that start without a cache compile the same kernels
at the same time, and two that write the same index keep the entry of one.
"""

import fcntl
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


def compile_once() -> None:
    """Make this process compile, or load, every cached kernel under a lock between processes."""
    compile_or_load: Any = Dispatcher.compile
    if compile_or_load.__module__ == __name__:
        return  # a second lock on a file would wait for the first for ever

    def locked(kernel: Any, signature: Any) -> Any:
        folder = kernel.stats.cache_path
        if folder is None:
            return compile_or_load(kernel, signature)
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{kernel.__module__}.{kernel.__qualname__}.lock"
        # numba's own lock first: a thread that waits for the file must hold up no other in it.
        with global_compiler_lock, path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return compile_or_load(kernel, signature)

    Dispatcher.compile = locked  # type: ignore[method-assign,assignment,unused-ignore]
