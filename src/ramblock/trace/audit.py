# SPDX-License-Identifier: Apache-2.0
"""
Finds out whether a device ever reached a page that was private.

Theory of operation. The audit follows two things through the trace: the state of guest pages (private, shared, or unknown until the
trace tells) and what each target maps. Wherever they disagree a *window* opens, and closes when they agree again:

    private and mapped         stale: a device reaches what is no longer shared
    shared and not mapped      missing: a device's DMA faults
    unplugged and mapped       a device reaches what virtio-mem took back
    mapped, and an unmap of it was refused or did not go through

No VMM changes both at once, so each conversion opens a window of its own. A window that is closed while its conversion is going on is
normal (missing) or *transitional* (stale: QEMU sets the attribute first and unmaps then); one that outlives its conversion, or has none,
is a failure. When a conversion is over is told by the trace, or guessed (:class:`~ramblock.trace.windows.Conversions`).

It is one pass. What is kept is runs: of page states, mappings, and open windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

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
    Origin,
    Plug,
    PlugRequest,
    Remark,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.limits import Evidence, find_limits
from ramblock.trace.mappings import Mapping, TargetState, Unmapping
from ramblock.trace.observer import AuditObserver
from ramblock.trace.places import Places
from ramblock.trace.ranges import RangeMap
from ramblock.trace.result import AuditResult, FindingLog, Lengths, TargetSummary
from ramblock.trace.windows import ActiveConversion, Conversions, Window, WindowMap

__all__ = ["DEFAULT_GRACE", "Audit"]

#: Nanoseconds after its last step at which a conversion is taken for over, where the trace does not tell.
DEFAULT_GRACE = 10_000_000

_PRIVATE: Literal["private"] = "private"
_SHARED: Literal["shared"] = "shared"


class Audit:
    """
    One audit of one stream of events.

    :param grace: Nanoseconds; see :data:`DEFAULT_GRACE`.
    :param unmap: What an unmap has to name, where the trace does not tell: ``exact`` one whole mapping, ``whole`` mappings, ``cut`` any
        range. With ``exact``, an unmap whose result the trace does not tell is taken for refused where it names anything else.
    :param observer: Sees everything go by.
    """

    def __init__(
        self,
        *,
        grace: int = DEFAULT_GRACE,
        unmap: str | None = None,
        observer: AuditObserver | None = None,
    ) -> None:
        self._unmap_rule = unmap
        self._observer = observer
        self._conversions = Conversions(grace)
        self._states: RangeMap[Literal["private", "shared"]] = RangeMap()
        self._plugged: RangeMap[Literal["in", "out"]] = RangeMap()
        self._places = Places()
        self._targets: dict[str, TargetState] = {}
        self._log = FindingLog()
        self._transitional = Lengths()
        self._not_yet_mapped = Lengths()
        self._evidence = Evidence()
        self._sources: dict[str, None] = {}
        self._now = 0
        self._began: int | None = None
        self._timed = False
        self._events = 0
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Layout: self._layout,
            Conversion: self._conversion,
            ConversionEnd: self._conversion_end,
            VcpuEntry: self._vcpu_entry,
            Attributes: self._attributes,
            StateChange: self._state_change,
            Map: self._map,
            Unmap: self._unmap,
            Discard: self._discard,
            Access: self._access,
            Attach: self._attach,
            Detach: self._detach,
            PlugRequest: self._plug_request,
            Plug: self._plug,
            Remark: self._remark,
        }

    def place(self, blocks: Iterable[Block]) -> None:
        """Tell where blocks are; the trace may tell more."""
        for block in blocks:
            self._places.place(block)

    def feed(self, events: Iterable[Event]) -> None:
        """Take events, in the order of their times. One that is out of order counts as simultaneous with the one before it."""
        handlers = self._handlers
        expire = self._conversions.expire
        count = 0
        for event in events:
            count += 1
            time = event.time
            if time is None:
                # Without times the order is all there is, and the grace of a conversion is the time until another begins.
                self._now += 1
            else:
                if time > self._now:
                    self._now = time
                if self._began is None:
                    self._began, self._timed = time, True
                expire(self._now)
            handlers[type(event)](event)
        self._events += count

    # What is told about the guest.

    def _layout(self, event: Layout) -> None:
        self._places.note(event)
        self._note_source(event.source)
        if event.ends:
            self._conversions.ending.add(event.source.name)
        if event.unmap is not None and self._unmap_rule is None:
            self._unmap_rule = event.unmap
        for name in event.targets:
            self._target(name, complete=True).declared = True

    def _conversion(self, event: Conversion) -> None:
        self._evidence.conversions += 1
        if event.time is None:
            self._end_conversions_without_times(event)
        self._conversions.step(event.start, event.end, self._now, event.source, event.vcpu)

    def _end_conversions_without_times(self, event: Conversion) -> None:
        for conversion in self._conversions.active:
            if conversion.source is event.source:
                conversion.over = True
        self._conversions.active.clear()

    def _conversion_end(self, event: ConversionEnd) -> None:
        self._evidence.conversions += 1
        self._conversions.end_of(event.source)
        if self._observer is not None:
            self._observer.converted(event)

    def _vcpu_entry(self, event: VcpuEntry) -> None:
        conversions = self._conversions
        if event.vcpu not in conversions.entering:
            conversions.entering.add(event.vcpu)
        if conversions.active:
            conversions.entry(event.vcpu)

    def _attributes(self, event: Attributes) -> None:
        self._evidence.attributes += 1
        self._set_state(event, event.start, event.end, private=event.private, vcpu=event.vcpu)

    def _state_change(self, event: StateChange) -> None:
        if self._evidence.attributes:
            return  # they say the same, with guest addresses
        self._evidence.state_changes += 1
        places = self._places.of_block(event.block, event.start, event.end)
        if not places:
            self._evidence.unplaced_states += 1
        for start, end in places:
            self._set_state(event, start, end, private=event.private, vcpu=None)

    def _set_state(
        self,
        event: Attributes | StateChange,
        start: int,
        end: int,
        *,
        private: bool,
        vcpu: str | None,
    ) -> None:
        conversion = self._conversions.step(start, end, self._now, event.source, vcpu)
        conversion.asked = True
        self._states.set(start, end, _PRIVATE if private else _SHARED)
        if self._observer is not None:
            self._observer.page_state(self._now, start, end, private=private)
        for target in self._targets.values():
            if private:
                for piece_start, piece_end, mapping in target.mappings.pieces(start, end):
                    self._open_stale(event, target, piece_start, piece_end, mapping, conversion)
                if target.missing:
                    self._close(target, target.missing, start, end, event)
            else:
                if target.stale:
                    self._close(target, target.stale, start, end, event)
                for gap_start, gap_end in target.mappings.gaps(start, end):
                    self._open_missing(event, target, gap_start, gap_end, conversion)

    def _plug_request(self, event: PlugRequest) -> None:
        # QEMU maps before it answers that memory is plugged, which takes long where there is much to map.
        self._conversions.step(event.start, event.end, self._now, event.source).held = True

    def _plug(self, event: Plug) -> None:
        asked = self._conversions.find(event.start, event.end)
        if asked is not None:
            asked.held = False
        if not event.done:
            return
        self._evidence.plugs += 1
        self._plugged.set(event.start, event.end, "in" if event.plugged else "out")
        conversion = self._conversions.step(event.start, event.end, self._now, event.source)
        for target in self._targets.values():
            if event.plugged:
                self._close(target, target.unplugged, event.start, event.end, event)
                for start, end in target.mappings.gaps(event.start, event.end):
                    for piece_start, piece_end, state in self._states.pieces(start, end):
                        if state is _SHARED:
                            self._open_missing(event, target, piece_start, piece_end, conversion)
            else:
                self._close(target, target.missing, event.start, event.end, event)
                for start, end, mapping in target.mappings.pieces(event.start, event.end):
                    self._open_unplugged(event, target, start, end, mapping, conversion)

    def _discard(self, event: Discard) -> None:
        if not event.done or not event.shared:
            return
        self._evidence.discards += 1
        if event.host is None:
            places = [(event.start, event.end)]
        else:
            places = self._places.of_host(event.start, event.end)
            if not places:
                self._evidence.unplaced_discards += 1
        for start, end in places:
            for target in self._targets.values():
                for piece_start, piece_end, mapping in target.mappings.pieces(start, end):
                    self._broken(FindingKind.FREED, event, target, piece_start, piece_end, mapping)

    # What is told about targets.

    def _target(self, name: str, *, complete: bool = False) -> TargetState:
        target = self._targets.get(name)
        if target is None:
            target = self._targets[name] = TargetState(name, self._unmap_rule, complete=complete)
        return target

    def _attach(self, event: Attach) -> None:
        # The kernel's word for a device that joins may come at any time; the others come first.
        self._target(event.target, complete=event.device is None)

    def _detach(self, event: Detach) -> None:
        target = self._targets.get(event.target)
        if target is None:
            return
        for windows in (target.stale, target.refused, target.unplugged, target.missing):
            for start, end, window in windows.items():
                self._judge(target, start, end, window, event)
            windows.clear()
        self._evidence.gone.append(self._summary(target))
        if self._observer is not None:
            for start, end, _ in target.mappings.items():
                self._observer.unmapped(self._now, target.name, start, end)
        del self._targets[event.target]

    def _map(self, event: Map) -> None:
        self._evidence.maps += 1
        if not event.done or event.end <= event.start:
            self._evidence.failed_maps += 1
            return
        start, end = event.start, event.end
        target = self._targets.get(event.target) or self._target(event.target)
        target.maps += 1
        mapping = Mapping(start, end, event.source, event.line, event.key)
        there = target.mappings.pieces(start, end)
        if there and self._is_copy(event, target, there):
            return
        for piece_start, piece_end, old in there:
            self._broken(FindingKind.DOUBLE_MAP, event, target, piece_start, piece_end, old)
        target.mappings.set(start, end, mapping)
        if event.host is not None:
            self._places.note_host(start, end, event.host)
        if self._observer is not None:
            self._observer.mapped(self._now, target.name, start, end)
        if target.missing:
            self._close(target, target.missing, start, end, event)
        self._look_at_mapped_pages(event, target, mapping)

    def _look_at_mapped_pages(self, event: Map, target: TargetState, mapping: Mapping) -> None:
        start, end = event.start, event.end
        known = 0
        for piece_start, piece_end, state in self._states.pieces(start, end):
            known += piece_end - piece_start
            if state is _PRIVATE:
                # No conversion excuses this: to-shared makes pages shared before it maps them.
                self._open_stale(event, target, piece_start, piece_end, mapping, None)
        self._evidence.stateless_bytes += end - start - known
        if known:
            target.expected = True
        if self._conversions.active:
            conversion = self._conversions.find(start, end)
            if conversion is not None:
                conversion.last = self._now
        if self._plugged:
            for piece_start, piece_end, plug in self._plugged.pieces(start, end):
                if plug == "out":
                    # QEMU maps before it answers the guest that the memory is plugged.
                    plugging = self._conversions.step(start, end, self._now, event.source)
                    self._open_unplugged(event, target, piece_start, piece_end, mapping, plugging)

    @staticmethod
    def _is_copy(event: Map, target: TargetState, there: list[tuple[int, int, Mapping]]) -> bool:
        """Whether this is what another domain of the same container gets: the same again."""
        start, end, old = there[0]
        if event.key is None or old.key != event.key or (start, end) != (event.start, event.end):
            return False
        if (old.start, old.end) != (start, end):
            return False
        old.copies += 1
        return True

    def _unmap(self, event: Unmap) -> None:
        self._evidence.unmaps += 1
        target = self._targets.get(event.target) or self._target(event.target)
        target.unmaps += 1
        start, end = event.start, event.end
        if end <= start:
            return
        met = target.meet(start, end)
        if not met.pieces:
            self._unmap_of_nothing(event, target)
            return
        if self._is_refused(event, target, met):
            return
        pieces = met.pieces
        if event.unmapped is not None and event.unmapped < met.mapped_bytes:
            pieces = self._short_unmap(event, target, met)
            if not pieces:
                return
        end = pieces[-1][1]
        gone = target.remove(start, end, pieces)
        if self._observer is not None and gone:
            self._observer.unmapped(self._now, target.name, start, end)
        self._close_unmapped(event, target, gone)
        if not target.declared and not target.mappings:
            self._note_emptied(target)

    def _note_emptied(self, target: TargetState) -> None:
        """Take a target that maps nothing any more for gone: at its end everything is unmapped, and that is no conversion."""
        if target.missing:
            self._evidence.emptied.add(target.name)
            target.missing.clear()
        target.expected = False

    def _close_unmapped(
        self, event: Unmap, target: TargetState, gone: list[tuple[int, int]]
    ) -> None:
        for start, end in gone:
            for windows in (target.stale, target.refused, target.unplugged):
                if windows:
                    self._close(target, windows, start, end, event)
            for piece_start, piece_end, state in self._states.pieces(start, end):
                if state is _SHARED:
                    conversion = self._conversions.step(
                        piece_start, piece_end, self._now, event.source
                    )
                    self._open_missing(event, target, piece_start, piece_end, conversion)
                elif self._conversions.active:
                    conversion_of = self._conversions.find(piece_start, piece_end)
                    if conversion_of is not None:
                        conversion_of.last = self._now

    def _unmap_of_nothing(self, event: Unmap, target: TargetState) -> None:
        if event.unmapped and not target.complete:
            self._evidence.mapped_before += event.unmapped
        elif event.done:
            note = ""
            if event.unmapped:
                note = (
                    f"{event.unmapped} bytes were unmapped that the trace does not show as mapped"
                )
            self._broken(
                FindingKind.UNMAP_OF_NOTHING, event, target, event.start, event.end, None, note
            )

    def _is_refused(self, event: Unmap, target: TargetState, met: Unmapping) -> bool:
        """Apply the target's rule; open windows over what stays mapped."""
        note = ""
        untold = event.unmapped is None
        if not event.done:
            note = "the unmap failed"
        elif met.bisects and target.rule in ("whole", "exact"):
            self._broken(FindingKind.BISECTING_UNMAP, event, target, event.start, event.end, None)
            note = "the unmap names part of a mapping" if untold else ""
        elif target.rule == "exact" and not met.exact:
            self._broken(FindingKind.INEXACT_UNMAP, event, target, event.start, event.end, None)
            note = "the unmap names no mapping exactly" if untold else ""
        elif untold:
            target.untold += 1
            if not met.exact:
                target.untold_inexact += 1
                target.untold_mappings += len(met.pieces)
        for start, end, mapping in met.pieces if note else ():
            window = self._window(FindingKind.STALE, event, None, mapping)
            window.note = note
            target.refused.open(start, end, window)
        return bool(note)

    def _short_unmap(
        self, event: Unmap, target: TargetState, met: Unmapping
    ) -> list[tuple[int, int, Mapping]]:
        """Say that fewer bytes went than there were; return what did, which is the first: the kernel unmaps upwards."""
        assert event.unmapped is not None
        left = event.unmapped
        gone = []
        for start, end, mapping in met.pieces:
            size = min(left, end - start)
            if size:
                gone.append((start, start + size, mapping))
            if size < end - start:
                note = f"{event.unmapped} of {met.mapped_bytes} bytes were unmapped"
                self._broken(
                    FindingKind.SHORT_UNMAP, event, target, start + size, end, mapping, note
                )
                window = self._window(FindingKind.STALE, event, None, mapping)
                window.note = "an unmap came short of it"
                target.refused.open(start + size, end, window)
            left -= size
        return gone

    def _access(self, event: Access) -> None:
        if event.refused:
            target = self._target(event.target)
            target.faults += 1
        if self._observer is not None:
            self._observer.accessed(event)

    def _remark(self, event: Remark) -> None:
        if event.lost:
            self._evidence.lost.append(f"{Origin(event.source.name, event.line)}: {event.text}")
            return
        if event.target is None or event.start is None or event.end is None:
            self._note_report(event)
            return
        target = self._target(event.target)
        if not event.stale:
            self._note_report(event)
            return
        pieces = target.mappings.pieces(event.start, event.end)
        mapping = pieces[0][2] if pieces else None
        window = self._window(FindingKind.STALE, event, None, mapping)
        window.note = event.text
        target.refused.open(event.start, event.end, window)

    def _note_report(self, event: Remark) -> None:
        self._found(
            Finding(
                kind=FindingKind.REPORTED,
                target=event.target,
                start=event.start or 0,
                end=event.end or event.start or 0,
                since=self._time(self._now),
                until=self._time(self._now),
                opened=event.origin,
                note=f"{event.rule}: {event.text}" if event.text else event.rule,
            )
        )

    # Windows.

    def _window(
        self,
        kind: FindingKind,
        event: Event,
        conversion: ActiveConversion | None,
        mapping: Mapping | None,
    ) -> Window:
        window = Window(kind, self._now, event.source, event.line, conversion)
        if mapping is not None:
            window.mapped = (mapping.source, mapping.line)
        return window

    def _open_stale(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping,
        conversion: ActiveConversion | None,
    ) -> None:
        window = self._window(FindingKind.STALE, event, conversion, mapping)
        if conversion is None:
            window.note = "mapped while private"
        target.stale.open(start, end, window)

    def _open_unplugged(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping,
        conversion: ActiveConversion,
    ) -> None:
        window = self._window(FindingKind.UNPLUGGED, event, conversion, mapping)
        target.unplugged.open(start, end, window)

    def _open_missing(
        self,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        conversion: ActiveConversion,
    ) -> None:
        if not target.expected:
            return
        window = self._window(FindingKind.MISSING, event, conversion, None)
        if not self._plugged:
            target.missing.open(start, end, window)
            return
        position = start
        for out_start, out_end, plug in self._plugged.pieces(start, end):
            if plug == "out":
                if out_start > position:
                    target.missing.open(position, out_start, window)
                position = out_end
        if position < end:
            target.missing.open(position, end, window)

    def _close(
        self, target: TargetState, windows: WindowMap, start: int, end: int, event: Event
    ) -> None:
        for piece_start, piece_end, window in windows.take(start, end):
            self._judge(target, piece_start, piece_end, window, event)

    def _judge(
        self, target: TargetState, start: int, end: int, window: Window, event: Event
    ) -> None:
        """Say what a window was, now that it is closed."""
        length = self._now - window.since
        kind = window.kind
        if window.conversion is not None and not window.conversion.over:
            if kind is not FindingKind.STALE:
                if kind is FindingKind.MISSING:
                    self._not_yet_mapped.add(length)
                return
            kind = FindingKind.TRANSITIONAL
            self._transitional.add(length)
        if length == 0 and self._timed:
            kind = FindingKind.INSTANT
        self._found(self._finding(kind, target, start, end, window, event.origin))

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
            until=None if closed is None else self._time(self._now),
            opened=Origin(window.source.name, window.line),
            closed=closed,
            mapped=None
            if window.mapped is None
            else Origin(window.mapped[0].name, window.mapped[1]),
            open=closed is None,
            note=window.note,
        )

    def _broken(
        self,
        kind: FindingKind,
        event: Event,
        target: TargetState,
        start: int,
        end: int,
        mapping: Mapping | None,
        note: str = "",
    ) -> None:
        self._found(
            Finding(
                kind=kind,
                target=target.name,
                start=start,
                end=end,
                since=self._time(self._now),
                until=self._time(self._now),
                opened=event.origin,
                mapped=None if mapping is None else Origin(mapping.source.name, mapping.line),
                note=note,
            )
        )

    def _found(self, finding: Finding) -> None:
        self._log.add(finding)
        if self._observer is not None:
            self._observer.found(finding)

    def _time(self, time: int) -> int | None:
        return time if self._timed else None

    def _note_source(self, source: Source) -> None:
        self._sources[source.name] = None

    # The end.

    def finish(self) -> AuditResult:
        """
        Judge what is still open, and sum up. The audit takes no events after it.

        A window whose conversion may still be going on where the trace ends is not held against anybody.
        """
        self._conversions.end_all_quiet(self._now)
        if not self._timed:
            for conversion in self._conversions.active:
                conversion.over = True
        unfinished = 0
        for target in self._targets.values():
            for windows in (target.stale, target.refused, target.unplugged, target.missing):
                for start, end, window in windows.items():
                    if window.conversion is not None and not window.conversion.over:
                        unfinished += 1
                    else:
                        self._found(self._finding(window.kind, target, start, end, window, None))
        self._evidence.unfinished = unfinished
        self._evidence.guessed_ends = self._conversions.guessed
        targets = [self._summary(target) for target in self._targets.values()]
        return AuditResult(
            sources=list(self._sources),
            events=self._events,
            began=self._began,
            ended=self._now if self._timed else None,
            counts=self._log.counts,
            findings=self._log.worst(),
            transitional=self._transitional,
            not_yet_mapped=self._not_yet_mapped,
            conversions=self._evidence.conversions,
            targets=self._evidence.gone + targets,
            limits=find_limits(self._evidence, self._targets, timed=self._timed),
            by_event={},
        )

    @staticmethod
    def _summary(target: TargetState) -> TargetSummary:
        entries = mapped = 0
        before: Mapping | None = None
        for start, end, mapping in target.mappings.items():
            mapped += end - start
            entries += mapping is not before
            before = mapping
        return TargetSummary(
            target.name, target.maps, target.unmaps, target.faults, mapped, entries
        )
