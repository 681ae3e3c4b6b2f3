# SPDX-License-Identifier: Apache-2.0
"""Finding the messages of the catalogue in lines, whatever stands around them."""

from __future__ import annotations

import re
from functools import cache

from ramblock.trace.messages import conversions, kernel, mapping, others, start
from ramblock.trace.messages.entry import Entry

__all__ = ["ENTRIES", "compiled", "find_failure", "find_messages", "text_of"]

#: All that are known, each once.
ENTRIES: tuple[Entry, ...] = (
    *mapping.ENTRIES,
    *conversions.ENTRIES,
    *start.ENTRIES,
    *kernel.ENTRIES,
    *others.ENTRIES,
)
_MARKED = tuple((entry.mark.encode(), entry) for entry in ENTRIES)
# Those that tell an audit of a failure.
_FAILURES = tuple((mark, entry) for mark, entry in _MARKED if entry.about)
_FAILURE_MARKS = re.compile(b"|".join(sorted({re.escape(mark) for mark, _ in _FAILURES})))


@cache
def compiled(entry: Entry) -> re.Pattern[bytes]:
    """Return an entry's pattern; it is compiled when a line first has its mark."""
    return re.compile(entry.words.encode())


def find_messages(line: bytes) -> list[tuple[Entry, re.Match[bytes]]]:
    """Find the messages in a line, in their order there; one that repeats counts once."""
    found = []
    for mark, entry in _MARKED:
        if mark in line:
            match = compiled(entry).search(line)
            if match is not None:
                found.append((entry, match))
    return sorted(found, key=lambda each: each[1].start())


def find_failure(line: bytes) -> tuple[Entry, re.Match[bytes]] | None:
    """Find the message in a line that tells an audit of a failure."""
    if _FAILURE_MARKS.search(line) is None:
        return None
    for mark, entry in _FAILURES:
        if mark in line:
            match = compiled(entry).search(line)
            if match is not None:
                return entry, match
    return None


def text_of(line: bytes, match: re.Match[bytes], most: int) -> bytes:
    """
    Return a message as it stands in its line, without what a logger wrote behind it.

    :param most: Bytes that are kept.
    """
    text = line[match.start() : match.start() + most].split(b"\\n")[0].rstrip(b'\r" \\')
    return text.split(b'" ')[0]
