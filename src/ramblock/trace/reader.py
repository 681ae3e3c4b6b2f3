# SPDX-License-Identifier: Apache-2.0
"""What every reader of traces has."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ramblock.trace.events import Event, Source

__all__ = ["MAX_LINE", "ReadCounts", "TraceReader"]

#: Bytes of a line; a longer one is not kept.
MAX_LINE = 1 << 20


class ReadCounts(msgspec.Struct):
    """What a reader has seen."""

    lines: int = 0
    events: int = 0
    unknown: int = 0
    examples: list[tuple[int, str]] = []
    by_name: dict[str, int] = {}

    def note_unknown(self, line: int, raw: bytes) -> None:
        """Count a line that is not understood."""
        self.unknown += 1
        if len(self.examples) < 5:
            self.examples.append((line, raw[:120].decode(errors="backslashreplace")))


class TraceReader(Protocol):
    """Bytes in, events out."""

    source: Source
    counts: ReadCounts

    def feed(self, data: bytes) -> list[Event]:
        """Take bytes in any chunking; return the events that are complete."""

    def finish(self) -> list[Event]:
        """Take the end of the input."""
