# SPDX-License-Identifier: Apache-2.0
"""The kinds of violations, and the log of those that a verifier has seen."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import NamedTuple

from ramblock.errors import describe_range
from ramblock.testing.marks import Marks, Stretches

__all__ = ["Violation", "ViolationKind", "ViolationLog"]

# A guest without coordination violates something with every second call; a report needs no more.
_RANGES_KEPT = 64
_LINES_KEPT = 1000
_PLACES_TOLD = 4


class ViolationKind(Enum):
    """What must never happen; worst first."""

    DEVICE_REACHED_PRIVATE = "a device reached a private page"
    PRIVATE_SEEN = "the host sees what the guest wrote to a private page"
    LOST_WRITE = "a device's write was never seen by the guest"
    LOST_DATA = "the guest does not find what it wrote"
    HOST_BLIND = "the host does not see what the guest wrote to a shared page"
    FREED = "a freed page is mapped"
    STALE = "stale mapping: a private page is mapped"
    MISSING = "missing mapping: a shared page is not mapped"
    DEVICE_FAULTED = "a device could not reach its own buffer"
    LOST_FREE = "a page in use was freed"
    DOUBLE = "a page is mapped twice"
    UNMAP_COUNT = "an unmap told a wrong number of bytes"
    SURVIVED = "memory of the old guest is there after a reset"
    STATE = "page states and attributes differ"


class Violation(NamedTuple):
    """A range in which something happened that must not."""

    kind: ViolationKind
    target: str
    gpa: int
    size: int


class ViolationLog:
    """What was wrong: as numbers, as ranges, and as a story. The caller locks."""

    def __init__(self) -> None:
        #: How often each kind happened.
        self.counts: Counter[ViolationKind] = Counter()
        #: A line for each, oldest first; the first thousand.
        self.story: list[str] = []
        self._marks: dict[tuple[ViolationKind, str], Marks] = {}

    def note(
        self,
        kind: ViolationKind,
        target: str,
        stretches: Stretches,
        call: str = "comparison",
        start: int = 0,
        size: int = 0,
    ) -> None:
        """
        Note one violation, in stretches of pages; without any there is none.

        :param call: What was going on, on the *size* bytes from *start*.
        """
        first = next(stretches, None)
        if first is None:
            return
        found = [first, *stretches]
        self.counts[kind] += 1
        marks = self._marks.setdefault((kind, target), Marks())
        for low, high in found:
            marks.put(1, low, high)
        if len(self.story) < _LINES_KEPT:
            during = f"{call} {describe_range(start, size)}" if size else call
            where = ", ".join(describe_range(low, high - low) for low, high in found[:_PLACES_TOLD])
            more = ", ..." if len(found) > _PLACES_TOLD else ""
            by = f" by {target}" if target else ""
            self.story.append(f"{during}: {kind.value}{by}: {where}{more}")

    def ranges(self) -> list[Violation]:
        """List what was found, as ranges: worst kind first, then largest first, so many of each."""
        by_kind: dict[ViolationKind, list[Violation]] = {kind: [] for kind in ViolationKind}
        for (kind, target), marks in self._marks.items():
            for start, end in marks.everywhere(1):
                by_kind[kind].append(Violation(kind, target, start, end - start))
        return [
            violation
            for found in by_kind.values()
            for violation in sorted(found, key=lambda item: (-item.size, item.gpa, item.target))[
                :_RANGES_KEPT
            ]
        ]
