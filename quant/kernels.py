"""How kernels are compiled, where compiled code is kept, and the word to the user about it.

numba compiles a kernel when it is first called, which takes seconds, and keeps the code beside the
source or in the user's cache. Where neither can be written (a read-only install, no home) it
would raise; here a folder for temporary files takes the code, or nothing does.

A :func:`kernel` is called from Python: numba is imported at its first call. An :func:`inner`
function is called by kernels. Neither may close over another: numba then finds no cached code.
"""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

# No reordered sums, no fused multiply-add; a division by 0 gives Inf as numpy's does.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_LOCK = Lock()

Function = Callable[..., Any]


def inner(function: Function) -> Function:
    """Compile a function that kernels call."""
    return _compile(function)


def inlined(function: Function) -> Function:
    """The same for what a loop calls so often that a call would count."""
    return _compile(function, forceinline=True)


def kernel(function: Function) -> Function:
    """A compiled function that Python calls; numba is imported when it is first called."""
    return _Kernel(function)


class _Kernel:
    """The function, and what it was compiled to once it was called."""

    def __init__(self, function: Function) -> None:
        self.__doc__ = function.__doc__
        self._function = function
        self._compiled: Function | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run it, compiled for the types of the arguments."""
        if self._compiled is None:
            with _LOCK:
                self._compiled = self._compiled or _compile(self._function)
        return self._compiled(*arguments)


class _Notice:
    """What is called once, before the first kernel is compiled."""

    def __init__(self) -> None:
        self.call: Callable[[], None] | None = None
        self.listens = False


_NOTICE = _Notice()


def on_first_compile(call: Callable[[], None]) -> None:
    """Have a function called once, when a kernel is compiled that no cache has."""
    _NOTICE.call = call


def _compile(function: Function, **more: Any) -> Function:
    import numba

    _listen()
    try:
        compiled: Function = numba.njit(cache=True, **_OPTIONS, **more)(function)
    except RuntimeError:  # numba found no folder that can be written
        folder = _temporary_folder()
        if folder is None:
            found: Function = numba.njit(**_OPTIONS, **more)(function)
            return found
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            compiled = numba.njit(cache=True, **_OPTIONS, **more)(function)
        finally:
            config.CACHE_DIR = before
    return compiled


def _temporary_folder() -> Path | None:
    """A folder that only this user can write, as code is loaded from it; None without one."""
    owner = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"lfmq-kernels-{owner}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return None
    private = not stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == owner
    return folder if stat.S_ISDIR(found.st_mode) and private else None


def _listen() -> None:
    """Hear of numba's compiling once the library's first function is declared."""
    if _NOTICE.listens:
        return
    from numba.core import event

    register: Any = event.register

    class Compiling(event.Listener):
        def on_start(self, _: object) -> None:
            call, _NOTICE.call = _NOTICE.call, None
            if call is not None:
                call()

        def on_end(self, _: object) -> None:
            pass

    register("numba:compile", Compiling())
    _NOTICE.listens = True
