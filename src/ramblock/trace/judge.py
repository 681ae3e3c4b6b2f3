# SPDX-License-Identifier: Apache-2.0
"""
Judges windows: times in which pages of a target were in a state in which they should not stay.

A window that closes while its conversion is going on is normal (missing) or *transitional* (stale:
QEMU sets the attribute first and unmaps then; freed: QEMU's virtio-mem gives memory back first and
unmaps then). One that outlives its conversion, or has none, is a failure.
"""

from __future__ import annotations

from collections import deque

from ramblock.trace.conversions import ActiveConversion
from ramblock.trace.events import Event, Origin, Remark, Unmap
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.limits import Evidence
from ramblock.trace.mappings import Mapping, Reason, TargetState
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import FindingLog, Lengths

__all__ = ["Judge"]

_RECENT = 256
_OWN = "ramblock"
#: Formats of QEMU.
_LOGS = frozenset({"qemu", "simpletrace"})


class Judge:
    """The clock of one audit, and its findings; shared by all guests."""

    def __init__(self, observer: AuditObserver | None) -> None:
        self.observer = observer
        self.evidence = Evidence()
        self.log = FindingLog()
        self.transitional = Lengths()
        self.not_yet_mapped = Lengths()
        #: Nanoseconds; where the trace has no times, the number of the event.
        self.now = 0
        #: The number of the event, in any case.
        self.number = 0
        self.timed = False
        #: The newest unmaps, each with its time: one of them may explain a fault.
        self.recent: deque[tuple[int, Unmap]] = deque(maxlen=_RECENT)

    def window(
        self,
        kind: FindingKind,
        target: TargetState,
        start: int,
        end: int,
        reason: Reason,
        mapping: Mapping | None,
        event: Event | None,
        rest: int = 0,
    ) -> None:
        """
        Judge a window over ``[start, end)``.

        :param mapping: That of the first byte, if there is one.
        :param event: It closed the window; None: it is open where the trace ends.
        :param rest: Not 0: it stands for many windows in this range, of so many bytes.
        """
        since, conversion, note = reason.since, reason.conversion, reason.note
        source, line = reason.source, reason.line
        if mapping is not None and mapping.born > reason.born:
            # To-shared makes pages shared, or plugs them, before it maps them: no conversion
            # excuses this, but QEMU's plugging, which is told when it is done.
            conversion = mapping.excuse if kind is FindingKind.UNPLUGGED else None
            if kind is FindingKind.STALE and not note:
                note = "mapped while private"
            origin = mapping.origin(start)
            line, source = origin.line, mapping.source
            since = mapping.since
        if event is None and kind is FindingKind.STALE and _stopped(conversion):
            note = note or "the log ends in this conversion: the guest stopped, or the log is cut"
        elif conversion is not None and not conversion.over:
            self._inside(kind, target, start, end, since, source.name, line, mapping, event, note)
            return
        length = self.now - since
        if length == 0 and self.timed and event is not None:
            kind = FindingKind.INSTANT
        if rest:
            text = f"{rest:,} bytes of this range, in many parts"
            note = f"{note}; {text}" if note else text
        self.found(
            Finding(
                kind=kind,
                target=target.label,
                start=start,
                end=end,
                since=self._time(since),
                until=None if event is None else self._time(self.now),
                opened=Origin(source.name, line),
                closed=None if event is None else event.origin,
                mapped=None if mapping is None else mapping.origin(start),
                open=event is None,
                note=note,
                grace=conversion is not None and (conversion.guessed or not conversion.over),
            )
        )

    def _inside(
        self,
        kind: FindingKind,
        target: TargetState,
        start: int,
        end: int,
        since: int,
        name: str,
        line: int,
        mapping: Mapping | None,
        event: Event | None,
        note: str,
    ) -> None:
        """Count a window that is inside of its own conversion."""
        if event is None:
            self.evidence.unfinished += 1
            return
        length = self.now - since
        if kind is FindingKind.MISSING:
            self.not_yet_mapped.add(length)
            return
        if kind not in (FindingKind.STALE, FindingKind.FREED):
            return
        self.transitional.add(length)
        kind = FindingKind.INSTANT if length == 0 and self.timed else FindingKind.TRANSITIONAL
        if self.observer is None and not self.log.keeps(kind, length):
            self.log.count(kind, end - start)
            return
        self.found(
            Finding(
                kind=kind,
                target=target.label,
                start=start,
                end=end,
                since=self._time(since),
                until=self._time(self.now),
                opened=Origin(name, line),
                closed=event.origin,
                mapped=None if mapping is None else mapping.origin(start),
                note=note,
            )
        )

    def broken(
        self,
        kind: FindingKind,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping | None = None,
        note: str = "",
    ) -> None:
        """Note a broken rule."""
        self.found(
            Finding(
                kind=kind,
                target=target.label,
                start=start,
                end=end,
                since=self._time(self.now),
                until=self._time(self.now),
                opened=event.origin,
                mapped=None if mapping is None else mapping.origin(start),
                note=note,
            )
        )

    def report(self, event: Remark) -> None:
        """Note a report of the trace itself."""
        start = event.start or 0
        # A probe that saw a mapping stay says so in other words.
        kind = FindingKind.BROKEN_RULE if event.source.format == _OWN else FindingKind.REPORTED
        self.found(
            Finding(
                kind=kind,
                target=event.target,
                start=start,
                end=event.end or start,
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

    def reason(self, event: Event, conversion: ActiveConversion | None, note: str = "") -> Reason:
        """Make the reason that an event is."""
        return Reason(self.now, self.number, event.source, event.line, conversion, note)

    def _time(self, time: int) -> int | None:
        return time if self.timed else None


def _stopped(conversion: ActiveConversion | None) -> bool:
    """
    Whether a log ends in a conversion.

    QEMU writes each line at once, and the steps of a conversion follow each other in microseconds.
    The kernel's buffers end anywhere.
    """
    return (
        conversion is not None
        and conversion.told
        and not conversion.over
        and conversion.source.format in _LOGS
    )
