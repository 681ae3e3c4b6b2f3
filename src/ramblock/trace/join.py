# SPDX-License-Identifier: Apache-2.0
"""
Joins map and unmap events that continue each other: VMMs make them page by page.

The 512 maps of one 2 MiB conversion become one event, which stands for as many calls. Nothing else
may stand between them, they are of the same size, and their lines lie at equal distances, so that
the line of each can be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        self.unmaps = unmaps
        self._last: Map | Unmap | None = None

    def feed(self, events: Iterable[Event]) -> Iterator[Event]:
        """Take events; yield those that are complete."""
        last = self._last
        unmaps = self.unmaps
        for event in events:
            kind = type(event)
            if kind is Map or (kind is Unmap and unmaps):
                assert isinstance(event, Map | Unmap)
                if last is not None:
                    if last.end == event.start and isinstance(last, kind):
                        joined = _join(last, event)
                        if joined is not None:
                            last = joined
                            continue
                    yield last
                last = event
                continue
            if last is not None:
                yield last
                last = None
            yield event
        self._last = last

    def finish(self) -> Iterator[Event]:
        """Yield the event that was waiting for more."""
        if self._last is not None:
            yield self._last
            self._last = None


def _join(last: Map | Unmap, event: Map | Unmap) -> MapRun | UnmapRun | None:
    """Make a run of two, or a longer one of a run and its next; None: they are two steps."""
    size = event.end - event.start
    if isinstance(last, MapRun | UnmapRun):
        count, step, time = last.count, last.step, last.until
        line = last.line + step * count
        if event.line != line or size * count != last.end - last.start:
            return None
    else:
        count, step, time = 1, event.line - last.line, last.time
        if not 0 < step <= _MOST_LINES or size != last.end - last.start:
            return None
    if (
        last.target != event.target
        or last.source is not event.source
        or not (last.done and event.done)
        or size <= 0
    ):
        return None
    if event.time is None or time is None:
        if event.time is not time:
            return None
    elif not 0 <= event.time - time <= _CLOSE:
        return None
    if isinstance(last, Map):
        assert isinstance(event, Map)
        move = event.start - last.start
        if not (_continue(last.key, event.key, move) and _continue(last.host, event.host, move)):
            return None
        if isinstance(last, MapRun):
            run: MapRun | UnmapRun = last
        else:
            run = MapRun(
                last.time,
                last.source,
                last.line,
                last.target,
                last.start,
                last.end,
                last.writable,
                key=last.key,
                host=last.host,
            )
    else:
        assert isinstance(event, Unmap)
        if last.unmapped is None or event.unmapped is None:
            if last.unmapped is not event.unmapped:
                return None
        elif last.unmapped != last.end - last.start or event.unmapped != size:
            return None
        if isinstance(last, UnmapRun):
            run = last
        else:
            run = UnmapRun(
                last.time,
                last.source,
                last.line,
                last.target,
                last.start,
                last.end,
                last.unmapped,
            )
        if run.unmapped is not None:
            run.unmapped += size
    run.end = event.end
    run.count = count + 1
    run.step = step
    run.until = event.time
    return run


def _continue(last: int | None, value: int | None, move: int) -> bool:
    if last is None or value is None:
        return last is value
    return value - last == move
