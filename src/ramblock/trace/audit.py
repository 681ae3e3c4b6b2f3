# SPDX-License-Identifier: Apache-2.0
"""
Finds out whether a device ever reached a page that was private.

Theory of operation. The audit follows two things through the trace: the state of guest pages
(private, shared, or unknown until the trace tells) and each target's mappings. Wherever they
disagree a *window* opens, and closes when they agree again:

    private and mapped         stale: a device reaches pages no longer shared
    shared and not mapped      missing: a device's DMA faults
    unplugged and mapped       a device reaches memory that virtio-mem took back
    freed and mapped           a device reaches memory that the host took back
    mapped, and an unmap of it was refused or did not go through

No VMM changes both at once, so each conversion opens a window of its own; how it is judged is in
:mod:`~ramblock.trace.judge`, when a conversion is over in :mod:`~ramblock.trace.conversions`.

States and mappings belong to a guest (:mod:`~ramblock.trace.guest_audit`). Here events find theirs:
by the process that the trace names; a source that names none is of the one guest that there is.

It is one pass. It keeps runs: of page states, and of mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Block,
    Conversion,
    ConversionEnd,
    Detach,
    DeviceMemory,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Region,
    Remark,
    Reset,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
    Viommu,
)
from ramblock.trace.faults import Faults
from ramblock.trace.guest_audit import GuestAudit
from ramblock.trace.join import Joiner, MapRun, UnmapRun
from ramblock.trace.judge import Judge
from ramblock.trace.limits import MOST_NAMES, find_limits, why_not_judged
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult

__all__ = ["DEFAULT_GRACE", "Audit"]

_Handlers: TypeAlias = dict[type[Any], Callable[[Any], None]]

#: Nanoseconds after its last step at which a conversion is taken for over, where the trace does not
#: tell.
DEFAULT_GRACE = 10_000_000

#: Guests that are kept apart; those beyond are not followed.
_MOST_GUESTS = 256


class Audit:
    """
    One audit of one stream of events.

    :param grace: Nanoseconds; see :data:`DEFAULT_GRACE`.
    :param unmap: The rule for an unmap, where the trace does not tell: ``exact`` one whole mapping,
        ``whole`` mappings, ``cut`` any range. With ``exact``, an unmap whose result the trace does
        not tell is taken for refused where it names anything else.
    :param observer: Sees everything go by.
    """

    def __init__(
        self,
        *,
        grace: int = DEFAULT_GRACE,
        unmap: str | None = None,
        observer: AuditObserver | None = None,
    ) -> None:
        self._grace = grace
        self._unmap = unmap
        self._judge = Judge(observer)
        self._faults = Faults(self._judge)
        self._joiner = Joiner(unmaps=unmap is None)
        self._layout: list[Block] = []
        #: By process; None: the trace does not name it; a source: the trace does not, and it has a
        #: guest of its own.
        self._guests: dict[str | Source | None, GuestAudit] = {}
        self._of_source: dict[Source, tuple[GuestAudit, _Handlers]] = {}
        self._began: int | None = None

    def place(self, blocks: Iterable[Block]) -> None:
        """Tell where blocks are; the trace may tell more."""
        self._layout += blocks

    def feed(self, events: Iterable[Event]) -> None:
        """
        Take events, in the order of their times.

        One that is out of order counts as simultaneous with the one before it.
        """
        self._take(self._joiner.feed(events))

    def _take(self, events: Iterable[Event]) -> None:
        judge, of_source = self._judge, self._of_source
        number = before = judge.number
        for event in events:
            number += 1
            judge.number = number
            time = event.time
            known = of_source.get(event.source)
            if known is None or (type(event) is Layout and self._is_another(event, known[0])):
                known = self._meet(event)
            guest, handlers = known
            if time is None:
                # Without times the order is all there is, and the grace of a conversion is the time
                # until another begins.
                judge.now += 1
            else:
                if time > judge.now:
                    judge.now = time
                if self._began is None:
                    self._began, judge.timed = time, True
                guest.conversions.expire(judge.now)
            handlers[type(event)](event)
        judge.evidence.events += number - before

    def _is_another(self, event: Event, guest: GuestAudit) -> bool:
        """Whether an event of a source without a process is of another guest than this one."""
        if event.source.guest is not None:
            return False
        if isinstance(event, Reset):  # its first words: a guest starts
            return guest.places.is_told_by_another(event.source)
        return (
            isinstance(event, Layout)
            and not event.removed
            and any(guest.places.is_taken(block, event.source) for block in event.blocks)
        )

    def _meet(self, event: Event) -> tuple[GuestAudit, _Handlers]:
        """Find the guest of a source."""
        source = event.source
        key: str | Source | None = source.guest
        guest = self._guests.get(key)
        if guest is None and len(self._guests) == 1 and (key is None or None in self._guests):
            # The only guest there is. Either its process is known now, or this source names none.
            ((before, guest),) = self._guests.items()
            if before is None:
                self._guests = {key: guest}
        if guest is not None and self._is_another(event, guest):
            key, guest = source, None
        if guest is None:
            if len(self._guests) >= _MOST_GUESTS:
                self._judge.evidence.not_compared = True
                guest = next(iter(self._guests.values()))
            else:
                guest = self._new_guest(source)
                self._guests[key] = guest
        known = self._of_source[source] = guest, self._handlers(guest)
        return known

    def _new_guest(self, source: Source) -> GuestAudit:
        suffix = f" of {source.guest or source.name}" if self._guests else ""
        guest = GuestAudit(self._judge, self._grace, self._unmap, suffix)
        for block in self._layout:
            guest.places.place(block)
        return guest

    def _handlers(self, guest: GuestAudit) -> _Handlers:
        return {
            Layout: guest.layout,
            Reset: guest.reset,
            Viommu: guest.viommu,
            DeviceMemory: guest.device_memory,
            Conversion: guest.conversion,
            ConversionEnd: guest.conversion_end,
            VcpuEntry: guest.vcpu_entry,
            Attributes: guest.attributes,
            StateChange: guest.state_change,
            PlugRequest: guest.plug_request,
            Plug: guest.plug,
            Discard: guest.discard,
            Attach: guest.attach,
            Detach: guest.detach,
            Map: guest.map,
            MapRun: guest.map_run,
            Unmap: guest.unmap,
            UnmapRun: guest.unmap_run,
            Region: guest.region,
            Remark: guest.remark,
            Access: self._faults.take,
        }

    def finish(self) -> AuditResult:
        """
        Judge the windows still open, and sum up. The audit takes no events after it.

        A window whose conversion may still be going on where the trace ends is not held against
        anybody.
        """
        self._take(self._joiner.finish())
        judge, guests = self._judge, [*dict.fromkeys(self._guests.values())]
        evidence = judge.evidence
        for guest in guests:
            guest.finish()
        self._faults.finish(guests)
        targets = [target for guest in guests for target in guest.targets.values()]
        evidence.more_targets += len(targets[MOST_NAMES:])
        return AuditResult(
            sources=[],
            events=evidence.events,
            began=self._began,
            ended=judge.now if judge.timed else None,
            counts=judge.log.counts,
            findings=judge.log.worst(),
            transitional=judge.transitional,
            not_yet_mapped=judge.not_yet_mapped,
            conversions=evidence.conversions,
            targets=[*evidence.gone, *(target.summary() for target in targets[:MOST_NAMES])],
            limits=find_limits(evidence, targets, timed=judge.timed),
            cannot_tell=why_not_judged(
                evidence,
                followed=any(guest.maps and guest.states for guest in guests),
                left=sum(target.mappings.covered(0, 1 << 64) for target in targets)
                > evidence.device_memory,
            ),
            judged_bytes=evidence.judged_bytes,
        )
