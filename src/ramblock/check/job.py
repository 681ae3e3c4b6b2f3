# SPDX-License-Identifier: Apache-2.0
"""Audits of files: one by one, several at once, or several merged into one stream."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec

from ramblock.check.input import open_input
from ramblock.check.readers import ReaderOptions, Recording
from ramblock.errors import TraceError, UsageError, describe_error
from ramblock.trace.audit import DEFAULT_GRACE, Audit
from ramblock.trace.events import Block, Event
from ramblock.trace.observer import AuditObserver
from ramblock.trace.readers.base import ReadCounts
from ramblock.trace.result import AuditResult

__all__ = [
    "CheckOptions", "check_file", "check_files", "check_merged", "check_one_of_several",
    "not_checked",
]  # fmt: skip

#: Lines that are named, of those that could not be read.
_UNREADABLE_NAMED = 5

_log = logging.getLogger(__name__)


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
    :return: Findings in the part that could be read; ``error`` says why that is not all, or why it
        is nothing.
    :raises UsageError: A package is missing that the file needs.
    """
    options = options or CheckOptions()
    audit = _make_audit(options, observer)
    try:
        with open_input(path) as stream:
            recording = Recording(path, stream, options.reader)
            for events in recording.batches():
                audit.feed(events)
                if progress is not None:
                    progress(len(events))
    except TraceError as error:
        return not_checked(path, str(error))
    return _complete(audit.finish(), [recording])


def check_files(paths: Sequence[str], options: CheckOptions, jobs: int) -> Iterator[AuditResult]:
    """
    Audit recordings that have nothing to do with each other, in processes of their own.

    In the order of *paths*, and each of them: one that cannot be audited has its error as a result.
    """
    if jobs == 1 or len(paths) == 1:
        for path in paths:
            yield check_one_of_several(path, options)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(min(jobs, len(paths))) as pool:
        futures = [pool.submit(check_one_of_several, path, options) for path in paths]
        for path, future in zip(paths, futures, strict=True):
            try:
                result = future.result()
            except BrokenProcessPool:
                # One process that dies takes the whole pool with it, and nobody tells which file it
                # had.
                result = _check_in_a_process(path, options)
            yield result


def _check_in_a_process(path: str, options: CheckOptions) -> AuditResult:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(check_one_of_several, path, options).result()
        except BrokenProcessPool:
            return not_checked(path, f"{path}: the process that audited it was killed")


def check_one_of_several(path: str, options: CheckOptions) -> AuditResult:
    """Audit one recording; whatever goes wrong with it is the result, and not the others' end."""
    try:
        return check_file(path, options)
    except UsageError as error:
        expected = "" if error.expected is None else f", expected {error.expected}"
        return not_checked(path, f"{error}{expected}")
    except Exception as error:
        _log.exception("the audit of %s failed", path)
        return not_checked(path, f"{path}: its audit failed: {describe_error(error)}")


def not_checked(path: str, error: str) -> AuditResult:
    """Return the result for a recording of which nothing was audited."""
    result = Audit().finish()
    result.sources, result.error = [path], error
    return result


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
    :raises TraceError: One of them cannot be opened. A part of a system is not judged.
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
        result.cannot_tell += _unreadable(recording.path, reader.counts)
    return result


def _unreadable(path: str, counts: ReadCounts) -> list[str]:
    """Name the lines whose event is known and not its text: what they told is not in the audit."""
    sentences = [
        f"{path}:{line} is a known event that cannot be read: {text}"
        for line, text in counts.unreadable[:_UNREADABLE_NAMED]
    ]
    more = counts.unreadable_lines - len(sentences)
    if more:
        sentences.append(f"and {more:,} more such lines in {path}")
    return sentences
