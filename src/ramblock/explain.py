# SPDX-License-Identifier: Apache-2.0
"""
The known messages in a log, however it came here.

A log is bytes of a stranger. Its lines may have any length, and nothing of it is kept but the
beginning of one message for each entry of the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from ramblock.errors import TraceError
from ramblock.trace.messages.catalogue import find_messages, text_of
from ramblock.trace.messages.entry import Entry
from ramblock.trace.readers.base import MAX_NAME, shorten
from ramblock.trace.readers.heads import unescaped, without_colours

__all__ = ["Explanation", "Known", "explain"]

# The end of a longer line is not waited for. A message and the next piece overlap by more than the
# longest message has.
_PIECE, _OVERLAP = 1 << 16, 1 << 10


class Known(msgspec.Struct):
    """A message that was found."""

    entry: Entry
    text: str
    """As it stood in the first line that has it."""
    first: int
    """That line, from 1."""
    place: int
    """Where it begins in that line, or in its piece."""
    lines: int = 1
    """Lines that have it."""
    last: int = 0


class Explanation(msgspec.Struct):
    """All that was found."""

    known: list[Known]
    """In the order of their first lines."""
    lines: int = 0
    """Lines that were read."""
    error: TraceError | None = None
    """Why the rest of the log could not be read."""


def explain(chunks: Iterable[bytes]) -> Explanation:
    """
    Find the messages in a log.

    An error of the input ends the reading; the result has it, and what was found before.

    :param chunks: Its bytes, in any pieces.
    """
    found: dict[str, Known] = {}
    result = Explanation([])
    try:
        for number, text in _pieces(chunks):
            _look(number, text, found)
            result.lines = number + text.count(b"\n") - text.endswith(b"\n")
    except TraceError as error:
        result.error = error
    result.known = sorted(found.values(), key=lambda known: (known.first, known.place))
    return result


def _look(first: int, text: bytes, found: dict[str, Known]) -> None:
    text = unescaped(text) if b"\\" in text else without_colours(text)
    for entry, line, number, match in find_messages(text):
        number += first
        known = found.get(entry.name)
        if known is None:
            said = shorten(text_of(line, match, MAX_NAME))
            found[entry.name] = Known(entry, said, number, match.start(), last=number)
        elif known.last != number:
            known.lines += 1
            known.last = number


def _pieces(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines, with the number of the first; a long one in several pieces."""
    number, tail = 1, b""
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            text = tail + chunk[:end]
            yield number, text
            number += text.count(b"\n")
            tail = chunk[end:]
        else:
            tail += chunk
        if len(tail) > _PIECE:
            yield number, tail
            tail = tail[-_OVERLAP:]
    if tail:
        yield number, tail
