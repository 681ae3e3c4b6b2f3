# SPDX-License-Identifier: Apache-2.0
"""The mappings of one target, as far as the trace tells."""

from __future__ import annotations

import msgspec

from ramblock.trace.conversions import ActiveConversion
from ramblock.trace.events import Map, Origin, Source
from ramblock.trace.join import MapRun
from ramblock.trace.ranges import RangeMap
from ramblock.trace.result import TargetSummary

__all__ = ["Mapping", "Reason", "TargetState", "UnmapRule", "bisects", "is_exact"]

UnmapRule = str
"""``exact``, ``whole`` or ``cut``: see :class:`~ramblock.trace.events.Layout`."""


class Reason(msgspec.Struct, eq=False, gc=False):
    """Why pages should be mapped, or should not: an event, and its conversion."""

    since: int
    born: int
    """The event's number, in the order of the audit."""
    source: Source
    line: int
    conversion: ActiveConversion | None
    """None: nothing excuses that pages and mappings do not agree."""
    note: str = ""


class Mapping(msgspec.Struct, eq=False, gc=False):
    """The mappings of one map call, or of a run of calls of the same size."""

    start: int
    end: int
    source: Source
    line: int
    born: int
    since: int
    key: int | None = None
    """The physical address of the start."""
    stride: int = 0
    """Bytes of each mapping of a run; 0: it is one mapping."""
    step: int = 0
    """Lines from one call of a run to the next."""
    excuse: ActiveConversion | None = None
    """The plugging that it is a part of, which the trace has not yet told as done."""

    @classmethod
    def of(cls, event: Map, born: int, since: int) -> Mapping:
        """Make that of an event: its number, and its time."""
        start, end = event.start, event.end
        if isinstance(event, MapRun):
            stride, step = (end - start) // event.count, event.step
        else:
            stride = step = 0
        return cls(start, end, event.source, event.line, born, since, event.key, stride, step)

    def origin(self, address: int) -> Origin:
        """Name the call that mapped an address."""
        line = self.line
        if self.stride:
            line += (address - self.start) // self.stride * self.step
        return Origin(self.source.name, line)

    def cuts(self, address: int) -> bool:
        """Whether a mapping lies on both sides of an address."""
        if not self.start < address < self.end:
            return False
        return not self.stride or bool((address - self.start) % self.stride)

    def is_exactly(self, start: int, end: int, size: int) -> bool:
        """Whether a range of it is a mapping; or, in steps of *size*, each of them is."""
        if not self.stride:
            return self.start == start and self.end == end and size == end - start
        return size == self.stride and not (self.cuts(start) or self.cuts(end))

    def is_copy(self, event: Map) -> bool:
        """Whether an event maps the same physical addresses to the same places."""
        return (
            event.key is not None
            and self.key is not None
            and event.key - event.start == self.key - self.start
        )


class TargetState:
    """
    One target: its mappings, and its part of the reasons.

    :param label: Its name in findings.
    :param complete: Whether the trace has it from the beginning: a mapping that is not in it did
        not exist.
    :param born: The number of the event that it is known from.
    """

    def __init__(self, label: str, rule: UnmapRule | None, born: int, *, complete: bool) -> None:
        self.label = label
        self.rule = rule
        self.complete = complete
        #: Whether the trace says when it goes; others are gone when they map nothing any more.
        self.declared = False
        #: Targets of this name that the trace does not tell apart.
        self.members = 1
        #: The event from which on it maps this guest's pages; None: it is not expected to (the
        #: kernel maps for its own drivers too).
        self.expected_from = born if complete else None
        self.mappings: RangeMap[Mapping] = RangeMap()
        #: Mapped once more: type1 maps everything for each domain of its container, and each of
        #: several members does. A page that is here is in ``mappings`` too.
        self.copies: list[RangeMap[Mapping]] = []
        #: Still mapped, though an unmap was to remove it.
        self.refused: RangeMap[Reason] = RangeMap()
        #: Mapped, and not refused; kept from the first refusal on.
        self._quiet: RangeMap[Mapping] | None = None
        #: Given back to the host since it was mapped; where nothing is mapped it means nothing.
        self.freed: RangeMap[Reason] = RangeMap()
        #: Whether there was ever any of it.
        self.has_freed = False
        #: Unmapped while it was shared.
        self.gone: RangeMap[Reason] = RangeMap()
        #: Where a map failed. A VMM that goes on all the same unmaps there later, and that is no
        #: mistake of its own.
        self.failed: RangeMap[Origin] = RangeMap()
        self.maps = 0
        self.unmaps = 0
        #: Unmaps whose result the trace does not tell; those of them that named more or less than
        #: one mapping; the mappings that these covered.
        self.untold = 0
        self.untold_inexact = 0
        self.untold_mappings = 0

    def summary(self) -> TargetSummary:
        """Sum up its present mappings."""
        entries = mapped = 0
        before: Mapping | None = None
        for start, end, mapping in self.mappings.items():
            mapped += end - start
            if mapping.stride:
                entries += -(-(end - start) // mapping.stride)
            else:
                entries += mapping is not before
            before = mapping
        return TargetSummary(self.label, self.maps, self.unmaps, mapped, entries)

    @property
    def has_refused(self) -> bool:
        """Whether any unmap was refused so far."""
        return self._quiet is not None

    # -- mapping

    def add(self, mapping: Mapping, start: int, end: int) -> None:
        """Map a part of what a call mapped, in which nothing was mapped."""
        self.mappings.set(start, end, mapping)
        if self.has_freed:
            self.freed.set(start, end, None)  # this is other memory
        if self._quiet is not None:
            self._quiet.set(start, end, mapping)

    def add_copy(self, mapping: Mapping, start: int, end: int) -> bool:
        """Note a range that is mapped once more; False: by more members than there are."""
        for copy in self.copies:
            if not copy.some(start, end, 1):
                copy.set(start, end, mapping)
                return True
        followed = _MOST_COPIES if mapping.key is not None else min(self.members - 1, _MOST_COPIES)
        if len(self.copies) >= followed:
            return False
        self.copies.append(RangeMap())
        self.copies[-1].set(start, end, mapping)
        return True

    def free(self, start: int, end: int, reason: Reason) -> None:
        """Note that memory was given back to the host, which may be mapped here."""
        self.has_freed = True
        for low, high in self.freed.gaps(start, end):
            self.freed.set(low, high, reason)

    # -- unmapping

    def kept_in(self, start: int, end: int) -> RangeMap[Mapping] | None:
        """Return the mappings that an unmap meets: among the copies first; None: there are none."""
        for mappings in (*reversed(self.copies), self.mappings):
            if mappings.some(start, end, 1):
                return mappings
        return None

    def remove(self, start: int, end: int) -> None:
        """Unmap a range of what no copy maps."""
        self.mappings.set(start, end, None)
        if self._quiet is not None:
            self._quiet.set(start, end, None)
            self.refused.set(start, end, None)

    def remove_copy(self, copy: RangeMap[Mapping], start: int, end: int) -> None:
        """Unmap a range of one of the copies."""
        copy.set(start, end, None)
        if not copy:
            self.copies.remove(copy)

    def refuse(self, start: int, end: int, reason: Reason) -> None:
        """Note that an unmap of this range did not remove what was mapped there."""
        quiet = self._quiet
        if quiet is None:
            quiet = self._quiet = RangeMap()
            for piece_start, piece_end, mapping in self.mappings.items():
                quiet.set(piece_start, piece_end, mapping)
        for piece_start, piece_end, _ in quiet.pieces(start, end):
            self.refused.set(piece_start, piece_end, reason)
        quiet.set(start, end, None)


#: Domains of one container, or vfio-user devices, that are followed.
_MOST_COPIES = 64


def bisects(mappings: RangeMap[Mapping], start: int, end: int) -> bool:
    """Whether a mapping reaches out of a range."""
    first, last = mappings.get(start), mappings.get(end - 1)
    return (first is not None and first.cuts(start)) or (last is not None and last.cuts(end))


def is_exact(mappings: RangeMap[Mapping], start: int, end: int, size: int) -> bool:
    """Whether a range is mapped by calls of so many bytes each, and no more than it."""
    pieces = mappings.some(start, end, 2)
    if len(pieces) != 1 or pieces[0][:2] != (start, end):
        return False
    return pieces[0][2].is_exactly(start, end, size)
