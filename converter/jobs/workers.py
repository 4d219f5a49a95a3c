"""Where work runs: threads of this process, or processes of a Ray cluster.

Both give results in the order of the work and compute each piece alike, so that bytes do not
depend on which it was. On a cluster every machine sees the checkpoint and the output folder under
the same paths.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from lfmq.converter.jobs.batches import steady_torch
from lfmq.quant.errors import ClusterError

T = TypeVar("T")
R = TypeVar("R")

# A task is run again when its worker dies; one that kills every worker it gets must end.
_RETRIES = 8
# Seconds to wait for the cluster's address to answer.
_PATIENCE = 10


class Workers(Protocol):
    """Something that runs functions.

    Attributes:
        count: pieces of work at the same time.
        remote: they run in other processes, which get copies of what a function refers to.
    """

    count: int
    remote: bool

    def submit(self, function: Callable[[T], R], item: T) -> "Future[R]":
        """Run ``function(item)`` some time."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items; few more than ``count`` are ever held."""


def _in_order(workers: Workers, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The map of all workers."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        if len(waiting) > workers.count:
            yield waiting.popleft().result()
        waiting.append(workers.submit(function, item))
    while waiting:
        yield waiting.popleft().result()


class _Threads:
    remote = False

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def submit(self, function: Callable[[T], R], item: T) -> "Future[R]":
        """See :class:`Workers`."""
        return self._pool.submit(function, item)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See :class:`Workers`."""
        return _in_order(self, function, items)


@contextmanager
def open_workers(threads: int, cluster: str | None = None) -> Iterator[Workers]:
    """Workers for the time of a conversion; after an error nothing more is begun.

    Args:
        threads: of this process; without meaning on a cluster, whose size counts.
        cluster: address of a running Ray cluster (``HOST:PORT``, or ``auto``).

    Raises:
        ClusterError: Ray is not installed, or the cluster cannot be reached.
    """
    if cluster is not None:
        with _ray_workers(cluster) as remote:
            yield remote
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield _Threads(pool, threads)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _ray_workers(address: str) -> Iterator[Workers]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--cluster needs Ray: pip install 'lfmq[ray]'") from error
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray itself tries for minutes
        try:
            socket.create_connection((host, int(port)), _PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(f"--cluster {address}: cannot be reached ({error})") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ClusterError(f"--cluster {address}: cannot be reached ({reason})") from error
    try:
        yield _Ray(ray)
    finally:
        ray.shutdown()


class _Ray:
    remote = True

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(max_retries=_RETRIES)(_run_cached)
        self._sent: tuple[Any, Any] = (None, None)  # the last function and its copy

    def submit(self, function: Callable[[T], R], item: T) -> "Future[R]":
        """See :class:`Workers`."""
        if self._sent[0] is not function:
            self._sent = (function, self._ray.put(function))
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        found = self._task.remote([self._sent[1]], item).future()
        found.add_done_callback(partial(_settle, future))
        return future

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See :class:`Workers`."""
        return _in_order(self, function, items)


def _settle(future: "Future[R]", found: "Future[R]") -> None:
    """Hand over a result, or the error as the worker raised it."""
    error = found.exception()
    if error is None:
        future.set_result(found.result())
        return
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        future.set_exception(cause)
    else:
        reason = str(error).strip().split("\n")[0]
        future.set_exception(ClusterError(f"the cluster gave up on a piece of work ({reason})"))


_last: dict[str, Callable[[Any], Any]] = {}


def _run_cached(held: list[Any], item: Any) -> Any:
    """In a worker: ``held`` is a reference to the function, which comes once to each process."""
    import ray

    (reference,) = held
    key = reference.hex()
    if key not in _last:
        _last.clear()
        _last[key] = ray.get(reference)
    with steady_torch():
        return _last[key](item)
