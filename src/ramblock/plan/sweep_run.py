# SPDX-License-Identifier: Apache-2.0
"""
Running a sweep: on the cores of this machine, or on a Dask cluster.

Either can be interrupted and keeps its rows.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import islice

import msgspec

from ramblock.errors import RamblockError, UsageError
from ramblock.plan.sweep import Point, Sweep, Value

__all__ = ["Swept", "run_on_cluster", "run_sweep"]

_CHUNK = 50
_CONNECT_SECONDS = 10

Table = list[dict[str, Value]]
Progress = Callable[[int], None]


class Swept(msgspec.Struct):
    """The outcome of a sweep."""

    rows: Table
    """In the order of the guests; those that were not reached are missing."""
    guests: int
    """How many were planned for."""
    complete: bool


def _chunks(sweep: Sweep) -> Iterator[tuple[int, list[Point]]]:
    points = sweep.points()
    first = 0
    while chunk := list(islice(points, _CHUNK)):
        yield first, chunk
        first += len(chunk)


def _plan(sweep: Sweep, first: int, points: Sequence[Point]) -> tuple[int, int, Table]:
    """Plan for one chunk; in another process."""
    return first, len(points), sweep.rows(first, points)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_sweep(sweep: Sweep, jobs: int, progress: Progress) -> Swept:
    """
    Plan for all guests, on *jobs* processes. Ctrl-C ends it early.

    :param progress: Called with the number of guests since the last call.
    :raises UsageError: A value makes no sense, or two do not go together.
    """
    sweep.check()
    collected = _Collected(len(sweep), progress)
    pool = ProcessPoolExecutor(jobs, initializer=_leave_interrupts_to_parent)
    futures: list[Future[tuple[int, int, Table]]] = []
    try:
        for first, points in _chunks(sweep):
            futures.append(pool.submit(_plan, sweep, first, points))
        for future in as_completed(futures):
            collected.take(*future.result())
    except KeyboardInterrupt:
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        # Done while the others were waited for.
        if future.done() and not future.cancelled():
            collected.take(*future.result())
    return collected.result()


def run_on_cluster(sweep: Sweep, address: str, progress: Progress) -> Swept:
    """
    Do the same on the workers of a cluster, where ramblock has to be installed.

    :param address: Of the scheduler, as ``tcp://10.0.0.1:8786``.
    :raises UsageError: The extra ``dask`` is not installed, or a value makes no sense.
    :raises RamblockError: The scheduler does not answer, or a worker was lost too often.
    """
    try:
        from distributed import Client
        from distributed import as_completed as completed_on_cluster
    except ImportError:
        raise UsageError(
            f"--scheduler {address} needs Dask", expected="pip install 'ramblock[dask]'"
        ) from None
    sweep.check()
    collected = _Collected(len(sweep), progress)
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise RamblockError(f"the scheduler at {address} does not answer: {error}") from error
    with client:
        futures = [client.submit(_plan, sweep, first, points) for first, points in _chunks(sweep)]
        try:
            for future in completed_on_cluster(futures):
                collected.take(*future.result())
        except KeyboardInterrupt:
            client.cancel(futures)
    return collected.result()


class _Collected:
    """Chunks, as they come."""

    def __init__(self, guests: int, progress: Progress) -> None:
        self._wanted = guests
        self._progress = progress
        self._chunks: dict[int, Table] = {}
        self._guests = 0

    def take(self, first: int, guests: int, rows: Table) -> None:
        """Take one, unless it was taken."""
        if first in self._chunks:
            return
        self._chunks[first] = rows
        self._guests += guests
        self._progress(guests)

    def result(self) -> Swept:
        """Put them in order."""
        rows = [each for first in sorted(self._chunks) for each in self._chunks[first]]
        return Swept(rows, self._guests, self._guests == self._wanted)
