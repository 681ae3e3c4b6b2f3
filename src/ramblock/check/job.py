# SPDX-License-Identifier: Apache-2.0
"""Audits of files: one by one, several at once, or several merged into one stream."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import repeat

import msgspec

from ramblock.check.input import open_input
from ramblock.check.readers import ReaderOptions, Recording
from ramblock.errors import UsageError
from ramblock.trace.audit import DEFAULT_GRACE, Audit
from ramblock.trace.events import Block, Event
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult

__all__ = ["CheckOptions", "check_file", "check_files", "check_merged"]


class CheckOptions(msgspec.Struct, frozen=True):
    """How to audit; the same for every file. It can be sent to another process."""

    grace: int = DEFAULT_GRACE
    """Nanoseconds."""
    unmap: str | None = None
    """``exact``, ``whole`` or ``cut``; None: the trace's own."""
    layout: tuple[Block, ...] = ()
    """Places of blocks that the traces do not tell."""
    reader: ReaderOptions = ReaderOptions()


def check_file(
    path: str,
    options: CheckOptions | None = None,
    observer: AuditObserver | None = None,
    progress: Callable[[int], None] | None = None,
) -> AuditResult:
    """
    Audit one recording.

    :param path: ``-`` is standard input.
    :param progress: Called with the number of events since the last call.
    :return: Findings in the part that could be read; ``error`` says why that is not all.
    """
    options = options or CheckOptions()
    audit = _make_audit(options, observer)
    with open_input(path) as stream:
        recording = Recording(path, stream, options.reader)
        for events in recording.batches():
            audit.feed(events)
            if progress is not None:
                progress(len(events))
    return _complete(audit.finish(), [recording])


def check_files(paths: Sequence[str], options: CheckOptions, jobs: int) -> Iterator[AuditResult]:
    """
    Audit recordings that have nothing to do with each other, in processes of their own.

    In the order of *paths*.
    """
    if jobs == 1 or len(paths) == 1:
        for path in paths:
            yield check_file(path, options)
        return
    with ProcessPoolExecutor(min(jobs, len(paths))) as pool:
        yield from pool.map(check_file, paths, repeat(options))


def check_merged(
    paths: Sequence[str],
    options: CheckOptions,
    offsets: Sequence[int],
    observer: AuditObserver | None = None,
    progress: Callable[[int], None] | None = None,
) -> AuditResult:
    """
    Audit recordings of one system as one: their events are merged by time.

    :param offsets: Nanoseconds to add to the times of each, where their clocks differ.
    :raises UsageError: One of them has no times.
    """
    audit = _make_audit(options, observer)
    with ExitStack() as stack:
        recordings = [
            Recording(
                path,
                stack.enter_context(open_input(path)),
                msgspec.structs.replace(options.reader, offset=offset),
            )
            for path, offset in zip(paths, offsets, strict=True)
        ]
        merged = heapq.merge(*(_one_by_one(each) for each in recordings), key=_time_of)
        audit.feed(_counted(merged, progress))
    return _complete(audit.finish(), recordings)


def _one_by_one(recording: Recording) -> Iterator[Event]:
    for events in recording.batches():
        yield from events


def _time_of(event: Event) -> int:
    if event.time is None:
        raise UsageError(f"{event.origin} has no time, so it cannot be merged", expected="times")
    return event.time


def _counted(events: Iterator[Event], progress: Callable[[int], None] | None) -> Iterator[Event]:
    for number, event in enumerate(events):
        if progress is not None and not number % 10_000:
            progress(10_000)
        yield event


def _make_audit(options: CheckOptions, observer: AuditObserver | None) -> Audit:
    audit = Audit(grace=options.grace, unmap=options.unmap, observer=observer)
    if options.layout:
        audit.place(options.layout)
    return audit


def _complete(result: AuditResult, recordings: Sequence[Recording]) -> AuditResult:
    """Add the readers' part."""
    result.sources = [recording.path for recording in recordings]
    for recording in recordings:
        if recording.error is not None and result.error is None:
            result.error = str(recording.error)
        reader = recording.reader
        if reader is None:
            continue
        for name, times in reader.counts.by_name.items():
            result.by_event[name] = result.by_event.get(name, 0) + times
        result.unknown_lines += reader.counts.unknown
        result.unknown_examples += [
            f"{recording.path}:{line}: {text}" for line, text in reader.counts.examples
        ]
        result.limits += getattr(reader, "needs", {}).values()
    return result
