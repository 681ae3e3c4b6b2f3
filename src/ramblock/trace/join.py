# SPDX-License-Identifier: Apache-2.0
"""
Joins map and unmap events that continue each other: VMMs make them page by page.

The 512 maps of one 2 MiB conversion become one event, which stands for as many calls. Nothing else
may stand between them, they are of the same size, and their lines lie at equal distances, so that
the line of each can be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ramblock.trace.events import Event, Map, Unmap

__all__ = ["Joiner", "MapRun", "UnmapRun", "calls_of"]

#: Nanoseconds between two calls of a run. It counts as one step, at the time of its last call.
_CLOSE = 1_000_000
#: Lines from one call to the next; other lines may stand between them.
_MOST_LINES = 16


class MapRun(Map):
    """Maps of the same size, one behind the other: the whole range, the first one's line."""

    count: int = 1
    step: int = 0
    """Lines from one call to the next."""
    until: int | None = None
    """The time of the last call."""


class UnmapRun(Unmap):
    """Unmaps of the same size, one behind the other."""

    count: int = 1
    step: int = 0
    until: int | None = None
    """See :class:`MapRun`."""


def calls_of(run: MapRun | UnmapRun) -> Iterator[Map | Unmap]:
    """Take a run apart again; all calls have the time of the last."""
    size = (run.end - run.start) // run.count
    for number in range(run.count):
        start = run.start + number * size
        at = run.until, run.source, run.line + number * run.step, run.target, start, start + size
        if isinstance(run, UnmapRun):
            yield Unmap(*at, None if run.unmapped is None else size)
        else:
            move = number * size
            key = None if run.key is None else run.key + move
            host = None if run.host is None else run.host + move
            yield Map(*at, run.writable, key=key, host=host)


class Joiner:
    """
    Joins events of one stream, in any chunking.

    :param unmaps: Whether unmaps are joined too: they are not where each has to name one mapping
        exactly.
    """

    def __init__(self, *, unmaps: bool) -> None:
        self._unmaps = unmaps
        #: The first event of a run, what the next has to be like, and how many there are.
        self._first: Map | Unmap | None = None
        self._end = self._size = self._line = self._step = 0
        self._time: int | None = None
        self._count = 1

    def feed(self, events: Iterable[Event]) -> Iterator[Event]:
        """Take events; yield those that are complete."""
        first, end, size, line = self._first, self._end, self._size, self._line
        step, time, count, unmaps = self._step, self._time, self._count, self._unmaps
        event: Any  # most events of a large trace come by here, so nothing else is asked of them
        for event in events:
            kind = type(event)
            if kind is Map or (kind is Unmap and unmaps):
                if (
                    first is not None
                    and event.start == end
                    and 0 < size == event.end - end
                    and (
                        event.line == line or (count == 1 and 0 < event.line - line <= _MOST_LINES)
                    )
                    and type(first) is kind
                    and _continues(first, event, time)
                ):
                    step = step or event.line - line
                    end, line, time = event.end, event.line + step, event.time
                    count += 1
                    continue
                if first is not None:
                    yield first if count == 1 else _run(first, end, count, step, time)
                first, end, line, time = event, event.end, event.line, event.time
                size = end - event.start
                step, count = 0, 1
                continue
            if first is not None:
                yield first if count == 1 else _run(first, end, count, step, time)
                first = None
            yield event
        self._first, self._end, self._size, self._line = first, end, size, line
        self._step, self._time, self._count = step, time, count

    def finish(self) -> Iterator[Event]:
        """Yield the event that was waiting for more."""
        first, self._first = self._first, None
        if first is not None:
            count = self._count
            yield first if count == 1 else _run(first, self._end, count, self._step, self._time)


def _continues(first: Any, event: Any, time: int | None) -> bool:
    """Whether an event of the same type that is the next in place and line is of the same run."""
    if event.target != first.target or event.source is not first.source:
        return False
    if not (first.done and event.done):
        return False
    now = event.time
    if now is None or time is None:
        if now is not time:
            return False
    elif not 0 <= now - time <= _CLOSE:
        return False
    if type(first) is Map:
        move = event.start - first.start
        key, host = event.key, event.host
        if key is None or first.key is None:
            if key is not first.key:
                return False
        elif key - first.key != move:
            return False
        if host is None or first.host is None:
            return host is first.host
        return bool(host - first.host == move)
    if first.unmapped is None or event.unmapped is None:
        return first.unmapped is event.unmapped
    size = first.end - first.start
    return bool(size > 0 and first.unmapped == size == event.unmapped)


def _run(
    first: Map | Unmap, end: int, count: int, step: int, until: int | None
) -> MapRun | UnmapRun:
    if isinstance(first, Map):
        return MapRun(
            first.time,
            first.source,
            first.line,
            first.target,
            first.start,
            end,
            first.writable,
            key=first.key,
            host=first.host,
            count=count,
            step=step,
            until=until,
        )
    return UnmapRun(
        first.time,
        first.source,
        first.line,
        first.target,
        first.start,
        end,
        None if first.unmapped is None else end - first.start,
        count=count,
        step=step,
        until=until,
    )
