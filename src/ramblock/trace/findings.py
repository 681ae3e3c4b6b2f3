# SPDX-License-Identifier: Apache-2.0
"""The findings of an audit: broken rules, and windows in which a page was in a wrong state."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ramblock.trace.events import Origin

__all__ = ["FAILURES", "MEANINGS", "Finding", "FindingKind"]


class FindingKind(StrEnum):
    """Worst first."""

    STALE = "stale"
    FREED = "freed while mapped"
    UNPLUGGED = "unplugged while mapped"
    SHORT_UNMAP = "short unmap"
    MISSING = "missing"
    REPORTED = "reported"
    FAULT = "fault"
    BROKEN_RULE = "broken rule"
    BISECTING_UNMAP = "bisecting unmap"
    INEXACT_UNMAP = "inexact unmap"
    DOUBLE_MAP = "double map"
    UNMAP_OF_NOTHING = "unmap of nothing"
    TRANSITIONAL = "transitional"
    INSTANT = "instant"


#: The meaning of each for somebody who has to act on it.
MEANINGS: dict[FindingKind, str] = {
    FindingKind.STALE: "a device could reach pages that were private,"
    " or that an unmap was to take from it",
    FindingKind.FREED: "the host took memory back that a device could still reach",
    FindingKind.UNPLUGGED: "a device could reach memory"
    " that the guest had given back through virtio-mem",
    FindingKind.SHORT_UNMAP: "fewer bytes were unmapped than were mapped there;"
    " the rest may still be reachable",
    FindingKind.MISSING: "the guest shared pages that a device could not reach: its DMA faults",
    FindingKind.BISECTING_UNMAP: "an unmap names part of a mapping, and the target cannot cut",
    FindingKind.INEXACT_UNMAP: "an unmap does not name exactly one mapping,"
    " and the target insists on that",
    FindingKind.DOUBLE_MAP: "a range was mapped that was mapped already",
    FindingKind.UNMAP_OF_NOTHING: "an unmap of a range in which nothing was mapped",
    FindingKind.REPORTED: "the program that wrote the trace says that something failed",
    FindingKind.BROKEN_RULE: "a rule of the protocol was broken,"
    " as the program that wrote the trace saw it (ramblock probe: docs/probe)",
    FindingKind.FAULT: "the IOMMU refused a device's access",
    FindingKind.TRANSITIONAL: "private (or freed) and still mapped"
    " while their own conversion was going on (attribute first, then unmap)",
    FindingKind.INSTANT: "opened and closed at the same time stamp:"
    " shorter than the trace's clock can show",
}

#: Kinds that make an audit fail. ``--strict`` adds the others, which are notes: rules of a
#: protocol, windows that close by themselves, and the IOMMU's own work.
FAILURES = frozenset(
    {
        FindingKind.STALE,
        FindingKind.FREED,
        FindingKind.UNPLUGGED,
        FindingKind.SHORT_UNMAP,
        FindingKind.MISSING,
        FindingKind.REPORTED,
    }
)


class Finding(msgspec.Struct, kw_only=True, frozen=True):
    """
    One window or broken rule.

    A window is open from ``since`` to ``until``; a broken rule has ``until == since``.
    """

    kind: FindingKind
    target: str | None
    start: int
    """Guest address in bytes, inclusive."""
    end: int
    """Exclusive."""
    since: int | None
    """Nanoseconds; None where the trace has no times."""
    until: int | None
    """None: no times, or (``open``) still so at the end of the trace."""
    opened: Origin
    closed: Origin | None = None
    mapped: Origin | None = None
    """Where the mapping was made, if there is one."""
    open: bool = False
    """Still so at the end of the trace."""
    note: str = ""
    """A remark on this one."""
    device: str | None = None
    """The device of a fault."""
    count: int = 1
    """Of like events that it stands for: faults of one device in one page."""
    grace: bool = False
    """Its conversion's end was guessed: with a longer ``--grace`` it may be none."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def duration(self) -> int | None:
        """Nanoseconds; None where not known or still open."""
        return None if self.since is None or self.until is None else self.until - self.since
