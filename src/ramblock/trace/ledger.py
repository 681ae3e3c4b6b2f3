# SPDX-License-Identifier: Apache-2.0
"""
The audit's state at one moment, and the windows it opens and judges.

A window that is closed while its conversion is going on is normal (missing) or *transitional*
(stale: QEMU sets the attribute first and unmaps then; freed: QEMU's virtio-mem gives memory back
first and unmaps then); one that outlives its conversion, or has none, is a failure.
"""

from __future__ import annotations

from typing import Literal

from ramblock.trace.events import Event, Origin, Remark
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.limits import Evidence
from ramblock.trace.mappings import Mapping, TargetState
from ramblock.trace.observer import AuditObserver
from ramblock.trace.places import Places
from ramblock.trace.ranges import RangeMap
from ramblock.trace.result import FindingLog, Lengths
from ramblock.trace.windows import ActiveConversion, Conversions, Window, WindowMap

__all__ = ["PRIVATE", "SHARED", "Ledger", "PageState"]

PageState = Literal["private", "shared"]
PRIVATE: PageState = "private"
SHARED: PageState = "shared"


class Ledger:
    """
    The state of one audit: pages, targets, conversions, findings.

    :param grace: Nanoseconds; see :data:`~ramblock.trace.audit.DEFAULT_GRACE`.
    :param unmap_rule: The rule for an unmap, where the trace does not tell.
    :param observer: Sees everything go by.
    """

    def __init__(self, grace: int, unmap_rule: str | None, observer: AuditObserver | None) -> None:
        self.unmap_rule = unmap_rule
        self.observer = observer
        self.conversions = Conversions(grace)
        self.states: RangeMap[PageState] = RangeMap()
        self.plugged: RangeMap[Literal["in", "out"]] = RangeMap()
        self.places = Places()
        self.targets: dict[str, TargetState] = {}
        self.evidence = Evidence()
        self.log = FindingLog()
        self.transitional = Lengths()
        self.not_yet_mapped = Lengths()
        #: Nanoseconds; where the trace has no times, the number of the event.
        self.now = 0
        self.timed = False

    def target(self, name: str, *, complete: bool = False) -> TargetState:
        """
        Return a target, a new one if it was not seen before.

        *complete*: the trace has it from its beginning.
        """
        target = self.targets.get(name)
        if target is None:
            target = self.targets[name] = TargetState(name, self.unmap_rule, complete=complete)
        return target

    def window(
        self,
        kind: FindingKind,
        event: Event,
        conversion: ActiveConversion | None,
        mapping: Mapping | None,
    ) -> Window:
        """Make a window that opens now; mapped by *mapping*, if that is known."""
        window = Window(kind, self.now, event.source, event.line, conversion)
        if mapping is not None:
            window.mapped = (mapping.source, mapping.line)
        return window

    def open_stale(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping,
        conversion: ActiveConversion | None,
    ) -> None:
        """Open a window: private and mapped."""
        window = self.window(FindingKind.STALE, event, conversion, mapping)
        if conversion is None:
            window.note = "mapped while private"
        target.stale.open(start, end, window)

    def open_unplugged(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping,
        conversion: ActiveConversion,
    ) -> None:
        """Open a window: unplugged and mapped."""
        window = self.window(FindingKind.UNPLUGGED, event, conversion, mapping)
        target.unplugged.open(start, end, window)

    def open_freed(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping,
        conversion: ActiveConversion,
    ) -> None:
        """Open a window: given back to the host, and mapped."""
        window = self.window(FindingKind.FREED, event, conversion, mapping)
        window.note = "given back to the host before it was unmapped"
        target.freed.open(start, end, window)

    def open_missing(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        conversion: ActiveConversion,
    ) -> None:
        """
        Open a window: shared, and not mapped by a target that should.

        Unplugged memory is not expected.
        """
        if not target.expected:
            return
        window = self.window(FindingKind.MISSING, event, conversion, None)
        if not self.plugged:
            target.missing.open(start, end, window)
            return
        position = start
        for out_start, out_end, plug in self.plugged.pieces(start, end):
            if plug == "out":
                if out_start > position:
                    target.missing.open(position, out_start, window)
                position = out_end
        if position < end:
            target.missing.open(position, end, window)

    def close(
        self, target: TargetState, windows: WindowMap, start: int, end: int, event: Event
    ) -> None:
        """Close the windows in a range, and judge them."""
        for piece_start, piece_end, window in windows.take(start, end):
            self.judge(target, piece_start, piece_end, window, event)

    def judge(
        self, target: TargetState, start: int, end: int, window: Window, event: Event
    ) -> None:
        """Judge a window that has closed."""
        length = self.now - window.since
        kind = window.kind
        if window.conversion is not None and not window.conversion.over:
            if kind not in (FindingKind.STALE, FindingKind.FREED):
                if kind is FindingKind.MISSING:
                    self.not_yet_mapped.add(length)
                return
            kind = FindingKind.TRANSITIONAL
            self.transitional.add(length)
        if length == 0 and self.timed:
            kind = FindingKind.INSTANT
        self.found(self._finding(kind, target, start, end, window, event.origin))

    def still_open(self, target: TargetState, start: int, end: int, window: Window) -> None:
        """Note a window that is open where the trace ends."""
        self.found(self._finding(window.kind, target, start, end, window, None))

    def broken(
        self,
        kind: FindingKind,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping | None,
        note: str = "",
    ) -> None:
        """Note a broken rule."""
        self.found(
            Finding(
                kind=kind,
                target=target.name,
                start=start,
                end=end,
                since=self._time(self.now),
                until=self._time(self.now),
                opened=event.origin,
                mapped=None if mapping is None else Origin(mapping.source.name, mapping.line),
                note=note,
            )
        )

    def report(self, event: Remark) -> None:
        """Note a report of the trace itself."""
        self.found(
            Finding(
                kind=FindingKind.REPORTED,
                target=event.target,
                start=event.start or 0,
                end=event.end or event.start or 0,
                since=self._time(self.now),
                until=self._time(self.now),
                opened=event.origin,
                note=f"{event.rule}: {event.text}" if event.text else event.rule,
            )
        )

    def found(self, finding: Finding) -> None:
        """Note a finding."""
        self.log.add(finding)
        if self.observer is not None:
            self.observer.found(finding)

    def _finding(
        self,
        kind: FindingKind,
        target: TargetState,
        start: int,
        end: int,
        window: Window,
        closed: Origin | None,
    ) -> Finding:
        return Finding(
            kind=kind,
            target=target.name,
            start=start,
            end=end,
            since=self._time(window.since),
            until=None if closed is None else self._time(self.now),
            opened=Origin(window.source.name, window.line),
            closed=closed,
            mapped=None
            if window.mapped is None
            else Origin(window.mapped[0].name, window.mapped[1]),
            open=closed is None,
            note=window.note,
        )

    def _time(self, time: int) -> int | None:
        return time if self.timed else None
