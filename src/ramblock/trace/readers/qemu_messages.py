# SPDX-License-Identifier: Apache-2.0
"""
QEMU's words for failures: one remark for one failure.

QEMU reports a failure as a message, not as a trace event; often several functions do, each with a
part of it. The catalogue of messages says what each is about (:mod:`ramblock.trace.messages`);
:class:`Failures` ties it to the event that failed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ramblock.trace.events import ConversionEnd, Event, Remark
from ramblock.trace.messages.catalogue import text_of
from ramblock.trace.messages.entry import Entry
from ramblock.trace.readers.base import MAX_NAME, shorten
from ramblock.trace.readers.qemu_meaning import At, QemuMeaning

__all__ = ["Failures"]


_RULES = {
    "map": "map failed",
    "unmap": "unmap failed",
    "discard": "discard failed",
    "conversion": "conversion failed",
    "slot": "slot failed",
}
#: The parts of one failure: a message of the first kind may be followed by one of the others.
_FOLLOWS = {
    "map": {"map", "conversion"},
    "unmap": {"unmap"},
    "conversion": {"conversion"},
    "slot": {"slot"},
}


class _Told(NamedTuple):
    """A failure that is being told."""

    about: str
    remark: Remark
    placed: bool
    """Whether QEMU itself named the range."""


class Failures:
    """
    Remarks on one guest's failures.

    A failure is kept until something else is told, since its next message may say more of it.
    """

    def __init__(self) -> None:
        self._told: _Told | None = None
        self._ends: ConversionEnd | None = None

    def flush(self, found: list[Event]) -> None:
        """Something else happened: append what is kept."""
        if self._told is not None:
            found.append(self._told.remark)
            self._told = None
        if self._ends is not None:
            found.append(self._ends)
            self._ends = None

    def tell(
        self,
        message: Entry,
        match: re.Match[bytes],
        line: bytes,
        at: At,
        meaning: QemuMeaning,
        found: list[Event],
    ) -> None:
        """Note a message; what was told before and is another failure is appended."""
        about = message.about
        if about == "call":
            about = _newest(meaning)
        start = end = None
        if message.place == "range":
            start = int(match[1], 16)
            end = start + int(match[2], 16)
            if end > 1 << 64:
                start = end = None
        placed = start is not None
        told = self._told
        if told is not None:
            same = about in _FOLLOWS.get(told.about, ()) and not (
                about == told.about and placed and told.placed and start != told.remark.start
            )
            if not same:
                self.flush(found)
                told = None
        if about == "conversion":
            self._end_conversion(at, meaning, start, end)
        if told is not None and (told.placed or not placed or about != told.about):
            return  # it was told better before
        time, source, number, _ = at
        remark = Remark(
            time,
            source,
            number,
            _RULES[about],
            f"QEMU says: {shorten(text_of(line, match, MAX_NAME))}",
            *_place(about, start, end, meaning),
            stale=about == "unmap",
        )
        self._told = _Told(about, remark, placed)

    def _end_conversion(
        self, at: At, meaning: QemuMeaning, start: int | None, end: int | None
    ) -> None:
        newest = meaning.conversion
        if newest is None:
            return
        if start is not None and start != newest.start:
            return
        self._ends = ConversionEnd(
            *at[:3],
            newest.start,
            newest.end,
            newest.private,
            newest.time,
            "failed",
        )


def _newest(meaning: QemuMeaning) -> str:
    """Say whether the newest call was a map or an unmap."""
    if meaning.unmap is None:
        return "map"
    return "map" if meaning.map is not None and meaning.map.line > meaning.unmap.line else "unmap"


def _place(
    about: str, start: int | None, end: int | None, meaning: QemuMeaning
) -> tuple[str | None, int | None, int | None]:
    """Return target, start and end of what failed: as told, or of the newest of its kind."""
    if about in ("map", "unmap"):
        newest = meaning.map if about == "map" else meaning.unmap
        other = meaning.unmap if about == "map" else meaning.map
        call = newest or other
        target = None if call is None else call.target
        if start is None and newest is not None:
            return target, newest.start, newest.end
        return target, start, end
    if start is None and about == "discard" and meaning.discard is not None:
        return None, meaning.discard.start, meaning.discard.end
    if start is None and about == "conversion" and meaning.conversion is not None:
        return None, meaning.conversion.start, meaning.conversion.end
    return None, start, end
