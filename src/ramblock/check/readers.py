# SPDX-License-Identifier: Apache-2.0
"""Which reader a recording gets, and its events as they come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import msgspec

from ramblock.check.input import STDIN, read_chunks
from ramblock.errors import TraceError
from ramblock.trace.events import Event, Source
from ramblock.trace.readers.base import TraceReader
from ramblock.trace.readers.detect import HEAD, TEXT, Beginning, begin, format_of, not_known
from ramblock.trace.readers.registry import make_reader

__all__ = ["ReaderOptions", "Recording"]


class ReaderOptions(msgspec.Struct, frozen=True):
    """Facts that a trace does not tell of itself."""

    format: str | None = None
    """One of :func:`~ramblock.trace.readers.registry.names`; None: found out from the content."""
    virtio_mem_block_size: int | None = None
    """Bytes; QEMU's traces count in blocks."""
    offset: int = 0
    """Nanoseconds to add to its times."""


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
        error = None
        try:
            for chunk in chunks:
                head += chunk
                if len(head) >= HEAD:
                    break
        except TraceError as caught:  # the part before it is good
            error = caught
        reader, beginning = self._make_reader(head)
        self.reader = reader
        is_known = beginning.format is not None
        if beginning.taken:
            yield self._shifted([*beginning.events])
        for chunk in chain((head[beginning.taken :],), () if error is not None else chunks):
            events = reader.feed(chunk)
            if not is_known and reader.recognized:
                reader.name_format(format_of(reader.counts.by_name))
                is_known = True
            yield self._shifted(events)
        if error is not None:
            raise error
        yield self._shifted(reader.finish())
        if not is_known and not reader.recognized:
            raise self._named(not_known(head))

    def _make_reader(self, head: bytes) -> tuple[TraceReader, Beginning]:
        """Return the reader, and the part that it has had."""
        name, block = self._options.format, self._options.virtio_mem_block_size
        source = Source(self._name, name or TEXT)
        reader = make_reader(name or TEXT, source, virtio_mem_block_size=block)
        if name is not None:
            return reader, Beginning(name)
        try:
            beginning = begin(head[:HEAD], reader)
        except TraceError as error:
            raise self._named(error) from error
        name = beginning.format
        if name is not None:
            if not beginning.taken:
                source.format = name
                reader = make_reader(name, source, virtio_mem_block_size=block)
            reader.name_format(name)
        return reader, beginning

    @property
    def _name(self) -> str:
        return "<stdin>" if self.path == STDIN else self.path

    def _named(self, error: TraceError) -> TraceError:
        return TraceError(f"{self._name}: {error}", path=self._name, line=error.line)

    def _shifted(self, events: list[Event]) -> list[Event]:
        offset = self._options.offset
        if offset:
            for event in events:
                if event.time is not None:
                    event.time += offset
        return events
