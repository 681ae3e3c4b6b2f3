# SPDX-License-Identifier: Apache-2.0
"""
Faults: accesses that the IOMMU refused, and the unmap or conversion that took the page away.

A device that faults does it thousands of times, so those of one device and page are one finding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from ramblock.trace.events import Access, Origin
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.guest_audit import GuestAudit
from ramblock.trace.join import UnmapRun
from ramblock.trace.judge import Judge
from ramblock.units import PAGE_SIZE

__all__ = ["Faults"]

#: Pairs of device and page that are kept; beyond, the faults are only counted.
_MOST = 1000


class _Storm(msgspec.Struct):
    """Faults of one device in one page."""

    first: Access
    began: int
    last: int
    count: int
    unmapped: tuple[int, Origin] | None


class _Cause(NamedTuple):
    time: int
    origin: Origin
    word: str


class Faults:
    """The faults of one audit, of all guests: the kernel tells them from interrupts."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._storms: dict[tuple[str, int], _Storm] = {}

    def take(self, event: Access) -> None:
        """Note that a device touched memory, or tried to."""
        judge = self._judge
        if judge.observer is not None:
            judge.observer.accessed(event)
        if not event.refused:
            return
        judge.evidence.faults += 1
        # Intel's driver prints no PCI domain, others do.
        device = (event.device or event.target)[-len("00:00.0") :]
        key = device, event.start // PAGE_SIZE
        storm = self._storms.get(key)
        if storm is not None:
            storm.count += 1
            storm.last = judge.now
        elif len(self._storms) < _MOST:
            self._storms[key] = _Storm(event, judge.now, judge.now, 1, self._unmapped(event.start))

    def _unmapped(self, address: int) -> tuple[int, Origin] | None:
        """Find the newest unmap of an address."""
        for start, end, time, unmap in reversed(self._judge.recent):
            if start <= address < end and unmap.done:
                line = unmap.line
                if isinstance(unmap, UnmapRun):
                    size = (unmap.end - unmap.start) // unmap.count
                    line += (address - unmap.start) // size * unmap.step
                return time, Origin(unmap.source.name, line)
        return None

    def finish(self, guests: Iterable[GuestAudit]) -> None:
        """Note a finding for each device and page."""
        guests = [*guests]
        for storm in self._storms.values():
            event = storm.first
            causes = [
                _Cause(reason.since, Origin(reason.source.name, reason.line), word)
                for guest in guests
                if (found := guest.why_not_mapped(event.start)) is not None
                for reason, word in (found,)
                if reason.since <= storm.began
            ]
            if storm.unmapped is not None:
                causes.append(_Cause(*storm.unmapped, "unmapped"))
            self._judge.found(self._finding(storm, max(causes, default=None)))

    def _finding(self, storm: _Storm, cause: _Cause | None) -> Finding:
        event, timed = storm.first, self._judge.timed
        note = ""
        if cause is not None:
            before = f" {(storm.began - cause.time) / 1e6:.3f} ms before" if timed else " before"
            note = f"{cause.word}{before}, at {cause.origin}"
        page = event.start // PAGE_SIZE * PAGE_SIZE
        return Finding(
            kind=FindingKind.FAULT,
            target=event.target,
            start=page,
            end=page + PAGE_SIZE,
            since=storm.began if timed else None,
            until=storm.last if timed else None,
            opened=event.origin,
            note=note,
            device=event.device,
            count=storm.count,
        )
