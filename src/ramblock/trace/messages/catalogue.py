# SPDX-License-Identifier: Apache-2.0
"""
Finding the messages of the catalogue, whatever stands around them.

A log of megabytes has few of them. So each mark is looked for in the whole text at once, and a
pattern is tried in the lines that have its mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from ramblock.trace.messages import conversions, kernel, mapping, others, start
from ramblock.trace.messages.entry import Entry

__all__ = ["ENTRIES", "Told", "compiled", "find_failure", "find_messages", "text_of"]

#: All that are known, each once.
ENTRIES: tuple[Entry, ...] = (
    *mapping.ENTRIES,
    *conversions.ENTRIES,
    *start.ENTRIES,
    *kernel.ENTRIES,
    *others.ENTRIES,
)
_BY_MARK: dict[bytes, list[Entry]] = {}
for _entry in ENTRIES:
    _BY_MARK.setdefault(_entry.mark.encode(), []).append(_entry)
# Those that tell an audit of a failure.
_FAILURES = tuple((entry.mark.encode(), entry) for entry in ENTRIES if entry.about)
_FAILURE_MARKS = re.compile(b"|".join(sorted({re.escape(mark) for mark, _ in _FAILURES})))


class Told(NamedTuple):
    """A message in a text."""

    entry: Entry
    line: bytes
    number: int
    """Of the line in the text, from 0."""
    match: re.Match[bytes]
    """In the line."""


@cache
def compiled(entry: Entry) -> re.Pattern[bytes]:
    """Return an entry's pattern; it is compiled when a line first has its mark."""
    return re.compile(entry.words.encode())


def find_messages(text: bytes) -> Iterator[Told]:
    """Yield the messages in lines of text, in no order; what repeats in a line counts once."""
    for mark, entries in _BY_MARK.items():
        number = counted = 0
        place = text.find(mark)
        while place >= 0:
            start = text.rfind(b"\n", 0, place) + 1
            end = text.find(b"\n", place)
            line = text[start:] if end < 0 else text[start:end]
            number += text.count(b"\n", counted, start)
            counted = start
            for entry in entries:
                match = compiled(entry).search(line)
                if match is not None:
                    yield Told(entry, line, number, match)
            place = -1 if end < 0 else text.find(mark, end)


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
