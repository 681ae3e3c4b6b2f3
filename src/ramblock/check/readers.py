# SPDX-License-Identifier: Apache-2.0
"""Which reader a recording gets, and its events as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import msgspec

from ramblock.check.input import STDIN, read_chunks
from ramblock.errors import TraceError
from ramblock.trace.bpftrace import BpftraceReader
from ramblock.trace.detect import detect
from ramblock.trace.events import Event, Source
from ramblock.trace.ftrace import FtraceReader
from ramblock.trace.own import OwnReader
from ramblock.trace.qemu import QemuReader
from ramblock.trace.reader import TraceReader
from ramblock.trace.simpletrace import SimpletraceReader

__all__ = ["FORMATS", "ReaderOptions", "Recording"]

_HEAD = 1 << 16


class ReaderOptions(msgspec.Struct, frozen=True):
    """Facts that a trace does not tell of itself."""

    format: str | None = None
    """None: found out from the first bytes."""
    virtio_mem_block_size: int | None = None
    """Bytes; QEMU's traces count in blocks."""
    offset: int = 0
    """Nanoseconds to add to its times."""


_MAKE: dict[str, Callable[[Source, ReaderOptions], TraceReader]] = {
    "ramblock": lambda source, _: OwnReader(source),
    "qemu": lambda source, options: QemuReader(
        source, virtio_mem_block_size=options.virtio_mem_block_size
    ),
    "simpletrace": lambda source, options: SimpletraceReader(
        source, virtio_mem_block_size=options.virtio_mem_block_size
    ),
    "ftrace": lambda source, _: FtraceReader(source),
    "perf": lambda source, _: FtraceReader(source),
    "bpftrace": lambda source, _: BpftraceReader(source),
}

#: Names for ``--format``.
FORMATS = tuple(_MAKE)


class Recording:
    """
    One recording that is being read.

    :param path: As it was given; ``-`` is standard input.
    """

    def __init__(self, path: str, stream: object, options: ReaderOptions) -> None:
        self.path = path
        self._stream = stream
        self._options = options
        #: None until the format is known.
        self.reader: TraceReader | None = None
        #: Why reading ended early.
        self.error: TraceError | None = None

    def batches(self) -> Iterator[list[Event]]:
        """
        Yield events in lists, in the order of the file.

        An error that ends the reading early is in :attr:`error`.
        """
        try:
            yield from self._batches()
        except TraceError as error:
            self.error = error

    def _batches(self) -> Iterator[list[Event]]:
        chunks = read_chunks(self._stream, self.path)  # type: ignore[arg-type]
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= _HEAD:
                break
        self.reader = reader = self._make_reader(head)
        offset = self._options.offset
        for chunk in chain((head,), chunks):
            events = reader.feed(chunk)
            if offset:
                _shift(events, offset)
            yield events
        events = reader.finish()
        if offset:
            _shift(events, offset)
        yield events

    def _make_reader(self, head: bytes) -> TraceReader:
        name = "<stdin>" if self.path == STDIN else self.path
        format_name = self._options.format
        if format_name is None:
            try:
                format_name = detect(head)
            except TraceError as error:
                raise TraceError(f"{name}: {error}", path=name, line=error.line) from error
        return _MAKE[format_name](Source(name, format_name), self._options)


def _shift(events: list[Event], offset: int) -> None:
    for event in events:
        if event.time is not None:
            event.time += offset
