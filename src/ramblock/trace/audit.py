# SPDX-License-Identifier: Apache-2.0
"""
Finds out whether a device ever reached a page that was private.

Theory of operation. The audit follows two things through the trace: the state of guest pages
(private, shared, or unknown until the trace tells) and each target's mappings. Wherever they
disagree a *window* opens, and closes when they agree again:

    private and mapped         stale: a device reaches pages no longer shared
    shared and not mapped      missing: a device's DMA faults
    unplugged and mapped       a device reaches memory that virtio-mem took back
    mapped, and an unmap of it was refused or did not go through

No VMM changes both at once, so each conversion opens a window of its own; how it is judged is in
:mod:`~ramblock.trace.ledger`. When a conversion is over is told by the trace, or guessed
(:class:`~ramblock.trace.windows.Conversions`).

It is one pass. It keeps runs: of page states, mappings, and open windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Block,
    Conversion,
    ConversionEnd,
    Detach,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Remark,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.guest_events import GuestEvents
from ramblock.trace.ledger import Ledger
from ramblock.trace.limits import find_limits
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult
from ramblock.trace.target_events import TargetEvents
from ramblock.trace.unmaps import Unmaps

__all__ = ["DEFAULT_GRACE", "Audit"]

#: Nanoseconds after its last step at which a conversion is taken for over, where the trace does not
#: tell.
DEFAULT_GRACE = 10_000_000


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
        self._ledger = ledger = Ledger(grace, unmap, observer)
        guest, targets = GuestEvents(ledger), TargetEvents(ledger)
        self._began: int | None = None
        self._events = 0
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Layout: guest.layout,
            Conversion: guest.conversion,
            ConversionEnd: guest.conversion_end,
            VcpuEntry: guest.vcpu_entry,
            Attributes: guest.attributes,
            StateChange: guest.state_change,
            PlugRequest: guest.plug_request,
            Plug: guest.plug,
            Discard: guest.discard,
            Attach: targets.attach,
            Detach: targets.detach,
            Map: targets.map,
            Unmap: Unmaps(ledger).apply,
            Access: targets.access,
            Remark: targets.remark,
        }

    def place(self, blocks: Iterable[Block]) -> None:
        """Tell where blocks are; the trace may tell more."""
        for block in blocks:
            self._ledger.places.place(block)

    def feed(self, events: Iterable[Event]) -> None:
        """
        Take events, in the order of their times.

        One that is out of order counts as simultaneous with the one before it.
        """
        ledger, handlers = self._ledger, self._handlers
        expire = ledger.conversions.expire
        count = 0
        for event in events:
            count += 1
            time = event.time
            if time is None:
                # Without times the order is all there is, and the grace of a conversion is the time
                # until another begins.
                ledger.now += 1
            else:
                if time > ledger.now:
                    ledger.now = time
                if self._began is None:
                    self._began, ledger.timed = time, True
                expire(ledger.now)
            handlers[type(event)](event)
        self._events += count

    def finish(self) -> AuditResult:
        """
        Judge the windows still open, and sum up. The audit takes no events after it.

        A window whose conversion may still be going on where the trace ends is not held against
        anybody.
        """
        ledger = self._ledger
        ledger.conversions.end_all_quiet(ledger.now)
        if not ledger.timed:
            for conversion in ledger.conversions.active:
                conversion.over = True
        unfinished = 0
        for target in ledger.targets.values():
            for windows in target.windows:
                for start, end, window in windows.items():
                    if window.conversion is not None and not window.conversion.over:
                        unfinished += 1
                    else:
                        ledger.still_open(target, start, end, window)
        ledger.evidence.unfinished = unfinished
        ledger.evidence.guessed_ends = ledger.conversions.guessed
        targets = [target.summary() for target in ledger.targets.values()]
        return AuditResult(
            sources=[],
            events=self._events,
            began=self._began,
            ended=ledger.now if ledger.timed else None,
            counts=ledger.log.counts,
            findings=ledger.log.worst(),
            transitional=ledger.transitional,
            not_yet_mapped=ledger.not_yet_mapped,
            conversions=ledger.evidence.conversions,
            targets=ledger.evidence.gone + targets,
            limits=find_limits(ledger.evidence, ledger.targets, timed=ledger.timed),
            by_event={},
        )
