# SPDX-License-Identifier: Apache-2.0
"""
The audit of one guest: which of its pages may be mapped, which are, and where the two disagree.

Reasons why a page must not be mapped are kept for the guest, mappings for each target:

    private    its pages are the guest's alone       mapped all the same: stale
    unplugged  virtio-mem took it back               unplugged while mapped
    freed      the host took the memory back         freed while mapped (the target's)
    refused    an unmap did not go through           stale (the target's)

A window is where both are; nothing is kept of it. It is judged when one of the two goes, so that an
event costs what it changes, however many targets and runs there are. Likewise *missing*: shared,
and not mapped by a target that maps this guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ramblock.trace.conversions import ActiveConversion, Conversions
from ramblock.trace.events import (
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
    StateChange,
    Unmap,
    VcpuEntry,
    Viommu,
)
from ramblock.trace.findings import FindingKind
from ramblock.trace.join import MapRun, UnmapRun, calls_of
from ramblock.trace.judge import Judge
from ramblock.trace.mappings import Mapping, Reason, TargetState, bisects, is_exact
from ramblock.trace.places import Places
from ramblock.trace.ranges import Many, RangeMap

__all__ = ["GuestAudit"]

#: Windows that one event closes in one target and run, judged one by one; the rest is one finding.
#: So an event has a bounded price, whatever it is about.
_MOST = 256
#: Targets of a guest at one time that are followed.
_MOST_TARGETS = 64
#: Runs that are looked at to know of which kind all of them are.
_FEW = 8
_EVERYTHING = 1 << 64
#: Stands for whatever maps RAM regions, where the trace has no maps.
_REGIONS = "vfio"

_PAST = -1


class GuestAudit:
    """
    The pages and targets of one guest.

    :param suffix: Behind the names of its targets, where others may have the same.
    """

    def __init__(self, judge: Judge, grace: int, unmap_rule: str | None, suffix: str = "") -> None:
        self.places = Places()
        self.conversions = Conversions(grace)
        self.targets: dict[str, TargetState] = {}
        self._compared: list[TargetState] = []
        #: Stands for the targets beyond those that are followed; nothing is kept of it.
        self._others = TargetState("others", unmap_rule, 0, complete=False)
        #: Whether the trace has mappings of it, and page states.
        self.maps = self.states = False
        self._judge = judge
        self._evidence = judge.evidence
        self._unmap_rule = unmap_rule
        self._suffix = suffix
        self._private: RangeMap[Reason] = RangeMap()
        self._shared: RangeMap[Reason] = RangeMap()
        self._unplugged: RangeMap[Reason] = RangeMap()
        #: Reasons against mappings, of all targets; *unplugged* from its first on.
        self._bad: tuple[tuple[FindingKind, RangeMap[Reason]], ...]
        self._bad = ((FindingKind.STALE, self._private),)
        self._plugged: RangeMap[Reason] = RangeMap()
        #: Blocks of virtio-mem: nothing there is expected to be mapped that is not plugged.
        self._pluggable: RangeMap[bool] = RangeMap()
        #: The parts of each guest_memfd that the guest has had.
        self._seen: dict[int, RangeMap[bool]] = {}
        self._has_attributes = False
        self._viommu = False
        #: The trace has maps; without, they are taken to follow regions and page states.
        self._maps_are_told = False
        self._has_regions = False
        #: A state change whose block is not known, with the places where it may be.
        self._undecided: tuple[StateChange, list[list[tuple[int, int]]]] | None = None

    # -- places and resets

    def layout(self, event: Layout) -> None:
        """Note where blocks are, and which targets there will be."""
        self.places.note(event)
        if event.ends:
            self.conversions.ending.add(event.source.name)
        if event.unmap is not None and self._unmap_rule is None:
            self._unmap_rule = event.unmap
        for name in event.targets:
            self.target(name, complete=True).declared = True
        if not event.removed:
            for block in event.blocks:
                if block.guest_memfd is not None:
                    self._private_side(event, block, block.guest_memfd)

    def _private_side(self, event: Layout, block: Block, memfd: int) -> None:
        """Make private what the guest has not had of a guest_memfd."""
        seen = self._seen.get(memfd)
        if seen is None:
            seen = self._seen[memfd] = RangeMap()
        low, high = block.offset, block.offset + block.end - block.start
        for start, end in seen.gaps(low, high):
            move = block.start - block.offset
            self._become_private(event, start + move, end + move, None)
        seen.set(low, high, True)  # noqa: FBT003 - a value
        self.states = True

    def reset(self, event: Reset) -> None:
        """Note that the guest starts again: all of its confidential pages are private."""
        self._seen.clear()
        self.conversions.end_of(event.source)
        for start, end, _ in [*self._shared.items()]:
            conversion = self.conversions.step(start, end, self._judge.now, event.source)
            conversion.asked = True
            self._become_private(event, start, end, conversion)

    def device_memory(self, event: DeviceMemory) -> None:
        """Note that a device's own memory will be mapped."""
        self._evidence.device_memory += event.size

    def viommu(self, event: Viommu) -> None:
        """Note that IOVAs are not guest addresses: nothing can be compared any more."""
        del event
        if not self._viommu:
            self._viommu = self._evidence.viommu = True
            for reasons in (self._private, self._shared, self._unplugged):
                reasons.clear()
            for target in self.targets.values():
                target.freed.clear()

    # -- conversions and page states

    def conversion(self, event: Conversion) -> None:
        """Note that a conversion begins."""
        self._evidence.conversions += 1
        if event.time is None:
            self.conversions.end_of(event.source)
        self.conversions.begin(event.start, event.end, self._judge.now, event.source, event.vcpu)

    def conversion_end(self, event: ConversionEnd) -> None:
        """Note that a conversion is over."""
        if event.source.name in self.conversions.ending:
            self._evidence.conversions += 1
            self.conversions.end_of(event.source)
        else:
            conversion = self.conversions.find(event.start, event.end)
            if conversion is not None:
                if event.result != "done":
                    for start, end, private in conversion.before:
                        become = self._become_private if private else self._become_shared
                        become(event, start, end, conversion)
                if not conversion.over:
                    self.conversions.end(conversion)
        if self._judge.observer is not None:
            self._judge.observer.converted(event)

    def vcpu_entry(self, event: VcpuEntry) -> None:
        """Note that a vCPU goes on."""
        self.conversions.entry(event.vcpu)

    def attributes(self, event: Attributes) -> None:
        """Note that pages became private or shared."""
        self._evidence.attributes += 1
        self._has_attributes = True
        self._set_state(event, event.start, event.end, event.vcpu)

    def state_change(self, event: StateChange) -> None:
        """Note that page states of a block changed."""
        within = self.conversions.newest
        if within is not None and (within.over or not within.told):
            within = None
        possible = self.places.of_block(
            event.block, event.start, event.end, (within.start, within.end) if within else None
        )
        if len(possible) > 1:
            self._forget_undecided()
            self._undecided = event, possible
        else:
            self._change_states(event, possible[0] if possible else [])

    def _decide(self, start: int, end: int) -> None:
        """Place a state change that fits into several blocks: what is mapped next tells which."""
        assert self._undecided is not None
        event, possible = self._undecided
        places = [
            each for each in possible if any(low < end and start < high for low, high in each)
        ]
        if len(places) == 1:
            self._undecided = None
            self._change_states(event, places[0])
        else:
            self._forget_undecided()

    def _forget_undecided(self) -> None:
        if self._undecided is not None:
            self._undecided = None
            if not self._has_attributes:  # they say the same, with guest addresses
                self._evidence.state_changes += 1
                self._evidence.unplaced_states += 1

    def _change_states(self, event: StateChange, places: list[tuple[int, int]]) -> None:
        if self._has_regions and not self._maps_are_told:
            for start, end in places:
                self._follow(event, start, end, shared=not event.private)
        if self._has_attributes:
            return  # they say the same, with guest addresses
        self._evidence.state_changes += 1
        if not places:
            self._evidence.unplaced_states += 1
        for start, end in places:
            self._set_state(event, start, end, None)

    def _set_state(
        self, event: Attributes | StateChange, start: int, end: int, vcpu: str | None
    ) -> None:
        if self._viommu or end <= start:
            return
        self.states = True
        judge = self._judge
        conversion = self.conversions.step(start, end, judge.now, event.source, vcpu)
        conversion.asked = True
        if conversion.told:
            conversion.before = self._states_of(start, end)
        if judge.observer is not None:
            judge.observer.page_state(judge.now, start, end, private=event.private)
        if event.private:
            self._become_private(event, start, end, conversion)
        else:
            self._become_shared(event, start, end, conversion)

    def _states_of(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        return [
            (low, high, private)
            for reasons, private in ((self._private, True), (self._shared, False))
            for low, high, _ in reasons.some(start, end, _MOST)
        ]

    def _become_private(
        self, event: Event, start: int, end: int, conversion: ActiveConversion | None
    ) -> None:
        if self._viommu:
            return
        reason = self._judge.reason(event, conversion)
        self._count_judged(start, end)
        shared: Reason | Many | None = Many.MANY
        gaps = self._private.gaps(start, end)
        if gaps == [(start, end)]:  # all of it is in one state, most of the time
            shared = self._shared.single(start, end)
            if shared is None:
                self._private.set(start, end, reason)
                return
        for low, high in gaps:
            pieces = (
                [(low, high, shared)]
                if isinstance(shared, Reason)
                else self._shared.pieces(low, high)
            )
            for piece_start, piece_end, before in pieces:
                for target in self._compared:
                    self._no_longer_missing(target, piece_start, piece_end, before, event)
                    if target.gone:
                        target.gone.set(piece_start, piece_end, None)
            self._shared.set(low, high, None)
            self._private.set(low, high, reason)

    def _become_shared(
        self, event: Event, start: int, end: int, conversion: ActiveConversion | None
    ) -> None:
        reason = self._judge.reason(event, conversion)
        for low, high in self._shared.gaps(start, end):
            for piece_start, piece_end, before in self._private.pieces(low, high):
                for target in self._compared:
                    self._judge_mapped(
                        FindingKind.STALE, target, piece_start, piece_end, before, event
                    )
            self._private.set(low, high, None)
            self._shared.set(low, high, reason)
        self._count_judged(start, end)

    def _count_judged(self, start: int, end: int) -> None:
        most = 0
        for target in self._compared:
            covered = target.mappings.covered(start, end)
            if covered > most:
                most = covered
                if most == end - start:
                    break
        self._evidence.judged_bytes += most

    # -- virtio-mem, and memory that is given back

    def plug_request(self, event: PlugRequest) -> None:
        """Note that virtio-mem is asked for memory, or gets some back."""
        self._note_pluggable(event)
        if event.end <= event.start:
            return  # its size is not known
        # QEMU maps before it answers that memory is plugged, which takes long where there is much
        # to map.
        self.conversions.step(event.start, event.end, self._judge.now, event.source).held = True

    def _note_pluggable(self, event: PlugRequest | Plug) -> None:
        """Note that these pages' block is virtio-mem's: unplugged, but for what is told."""
        start, end = event.start, max(event.end, event.start + 1)
        if self._pluggable.covered(start, end) < end - start:
            self._pluggable.set(*self.places.around(start, end), True)  # noqa: FBT003 - a value

    def plug(self, event: Plug) -> None:
        """Note virtio-mem's answer."""
        asked = self.conversions.find(event.start, event.end)
        if asked is not None:
            asked.held = False
        if not event.done or event.end <= event.start or self._viommu:
            return
        self._note_pluggable(event)
        self.states = True  # what is unplugged must not be mapped either
        start, end = event.start, event.end
        conversion = self.conversions.step(start, end, self._judge.now, event.source)
        reason = self._judge.reason(event, conversion)
        if event.plugged:
            for piece_start, piece_end, before in self._unplugged.pieces(start, end):
                for target in self._compared:
                    self._judge_mapped(
                        FindingKind.UNPLUGGED, target, piece_start, piece_end, before, event
                    )
            self._unplugged.set(start, end, None)
            for gap_start, gap_end in self._plugged.gaps(start, end):
                self._plugged.set(gap_start, gap_end, reason)
            if self._has_regions and not self._maps_are_told:
                for low, high, _ in self._shared.some(start, end, _MOST):
                    self._follow(event, low, high, shared=True)
            return
        for target in self._compared:
            for low, high, before in self._shared.some(start, end, _MOST)[:_MOST]:
                self._no_longer_missing(target, low, high, before, event)
        self._plugged.set(start, end, None)
        if self._has_regions and not self._maps_are_told:
            self._follow(event, start, end, shared=False)
        if len(self._bad) == 1:
            self._bad = (*self._bad, (FindingKind.UNPLUGGED, self._unplugged))
        for gap_start, gap_end in self._unplugged.gaps(start, end):
            self._unplugged.set(gap_start, gap_end, reason)

    def discard(self, event: Discard) -> None:
        """Note that memory was given back to the host."""
        if not event.done or event.end <= event.start or self._viommu:
            return
        if event.host is None:
            places = [(event.start, event.end)]
        else:
            places = self.places.of_host(event.start, event.end)
        if event.shared:
            self._evidence.unplaced_discards += not places
        for start, end in places:
            conversion = self.conversions.find(start, end)
            if event.shared and any(
                target.mappings.some(start, end, 1) for target in self._compared
            ):
                # QEMU's virtio-mem gives memory back first and unmaps then; a pinned page stays the
                # device's until it is unmapped.
                if conversion is None or not conversion.held:
                    conversion = self.conversions.step(start, end, self._judge.now, event.source)
                note = "given back to the host before it was unmapped"
                reason = self._judge.reason(event, conversion, note)
                for target in self._compared:
                    target.free(start, end, reason)
            elif conversion is not None and conversion.asked:
                self.conversions.end_unless_told(conversion)  # the last step of a VMM

    # -- targets

    def target(self, name: str, *, complete: bool = False) -> TargetState:
        """
        Return a target, a new one if it was not seen before.

        *complete*: the trace has it from its beginning.
        """
        target = self.targets.get(name)
        if target is None:
            if len(self.targets) >= _MOST_TARGETS:
                self._evidence.not_compared = True
                return self._others
            target = self.targets[name] = TargetState(
                name + self._suffix, self._unmap_rule, self._judge.number, complete=complete
            )
            self._compared = [*self.targets.values()]
        return target

    def attach(self, event: Attach) -> None:
        """Note that a target is there, or one more of its name."""
        # The kernel's word for a device that joins may come at any time; the others come first.
        known = event.target in self.targets
        target = self.target(event.target, complete=event.device is None)
        if known and event.device is None and target.complete:
            target.members += 1
            self._evidence.alike.add(target.label)

    def detach(self, event: Detach) -> None:
        """Note that a target goes, and its mappings with it."""
        target = self.targets.pop(event.target, None)
        if target is None:
            return
        judge = self._judge
        for start, end, mapping in target.mappings.items():
            self._judge_piece(target, start, end, mapping, event)
            if judge.observer is not None:
                judge.observer.unmapped(judge.now, target.label, start, end)
        if target.expected_from is not None:
            for start, end, reason in self._shared.items():
                self._no_longer_missing(target, start, end, reason, event)
        self._compared = [*self.targets.values()]
        self._evidence.note_gone(target.summary())

    def map_run(self, event: MapRun) -> None:
        """Note that a target maps one range behind the other."""
        self._end_of_run(event)
        target = self.target(event.target)
        start, end = event.start, event.end
        there = target.mappings.single(start, end)
        if there is None or (
            isinstance(there, Mapping)
            and all(copy.single(start, end) is not Many.MANY for copy in target.copies)
        ):
            self.map(event, event.count)
            return
        for call in calls_of(event):
            assert isinstance(call, Map)
            self.map(call)

    def unmap_run(self, event: UnmapRun) -> None:
        """Note that a target unmaps one range behind the other."""
        self._end_of_run(event)
        start, end = event.start, event.end
        target = self.target(event.target)
        mappings = target.kept_in(start, end)
        if mappings is not None and (
            is_exact(mappings, start, end, (end - start) // event.count)
            # Neither a rule nor an unmap that is not told has to do with each mapping.
            or (
                target.rule is None
                and event.unmapped is not None
                and mappings.covered(start, end) == end - start
            )
        ):
            self.unmap(event, event.count)
            return
        for call in calls_of(event):
            assert isinstance(call, Unmap)
            self.unmap(call)

    def _end_of_run(self, event: MapRun | UnmapRun) -> None:
        self._evidence.events += event.count - 1
        if event.until is not None and event.until > self._judge.now:
            self._judge.now = event.until

    def map(self, event: Map, count: int = 1) -> None:
        """Note that a target maps, by so many calls of the same size."""
        evidence, judge = self._evidence, self._judge
        evidence.maps += count
        self.maps = True
        start, end = event.start, event.end
        if not self._maps_are_told and event.target != _REGIONS:
            self._maps_are_told = True
            self.targets.pop(_REGIONS, None)
            self._compared = [*self.targets.values()]
        if self._undecided is not None:
            self._decide(start, end)
        target = self.targets.get(event.target) or self.target(event.target)
        if target is self._others:
            return
        if not event.done or end <= start:
            evidence.failed_maps += 1
            if end > start:
                target.failed.set(start, end, event.origin)
            return
        target.maps += count
        mapping = Mapping.of(event, judge.number, judge.now)
        there = target.mappings.single(start, end) is not None
        if there and not self._map_again(event, target, mapping):
            return
        if event.host is not None:
            self.places.note_host(start, end, event.host)
        if judge.observer is not None:
            judge.observer.mapped(judge.now, target.label, start, end)
        # After a virtual IOMMU was seen, no state is known any more.
        shared = self._shared.single(start, end)
        if isinstance(shared, Reason) and not there and not self._pluggable and not target.gone:
            evidence.judged_bytes += end - start
            self._mapped_at_once(event, target, shared)
            target.add(mapping, start, end)
            return
        self._look_at_pages(event, target, mapping)
        if there:
            for gap_start, gap_end in target.mappings.gaps(start, end):
                target.add(mapping, gap_start, gap_end)
        else:
            target.add(mapping, start, end)

    def _mapped_at_once(self, event: Map, target: TargetState, reason: Reason) -> None:
        """Judge a map of pages that became shared together: nearly all are such."""
        judge, conversion = self._judge, reason.conversion
        if target.expected_from is None:
            target.expected_from = judge.number
        elif reason.born >= target.expected_from:
            if conversion is not None and not conversion.over:
                judge.not_yet_mapped.add(judge.now - reason.since)
            else:
                start, end = event.start, event.end
                judge.window(FindingKind.MISSING, target, start, end, reason, None, event)
        if conversion is not None:
            conversion.last = judge.now

    def _look_at_pages(self, event: Map, target: TargetState, mapping: Mapping) -> None:
        """Judge what a map ends, where its pages have different states."""
        start, end = event.start, event.end
        judge, evidence = self._judge, self._evidence
        shared = self._shared.some(start, end, _MOST)[:_MOST]
        known = self._shared.covered(start, end) + self._private.covered(start, end)
        evidence.judged_bytes += known
        evidence.stateless_bytes += end - start - known
        if shared and target.expected_from is not None:
            for piece_start, piece_end, reason in shared:
                self._no_longer_missing(target, piece_start, piece_end, reason, event)
        elif known and target.expected_from is None:
            target.expected_from = judge.number
        if target.gone:
            target.gone.set(start, end, None)
        if self.conversions.active:
            conversion = self.conversions.find(start, end)
            if conversion is not None:
                conversion.last = judge.now
        if self._unplugged and self._unplugged.some(start, end, 1):
            # QEMU maps before it answers the guest that the memory is plugged.
            mapping.excuse = self.conversions.step(start, end, judge.now, event.source)

    def _map_again(self, event: Map, target: TargetState, mapping: Mapping) -> bool:
        """
        Map what is mapped already: for another domain or member, or by mistake.

        :return: Whether some of it is new.
        """
        start, end = event.start, event.end
        there = target.mappings.some(start, end, _FEW)[:_FEW]
        is_copy = target.members > 1 or any(old.is_copy(event) for _, _, old in there)
        if not (is_copy and target.add_copy(mapping, start, end)):
            for low, high, old in there:
                self._judge.broken(FindingKind.DOUBLE_MAP, event, target, low, high, old)
        return target.mappings.covered(start, end) < end - start

    def region(self, event: Region) -> None:
        """Note RAM that is mapped wholly, where no map says so."""
        if self._maps_are_told:
            return
        self._has_regions = True
        self._evidence.regions += 1
        fields = (event.time, event.source, event.line, _REGIONS, event.start, event.end)
        if event.added:
            self.map(Map(*fields, host=event.host))
        elif _REGIONS in self.targets and self.targets[_REGIONS].mappings.some(
            event.start, event.end, 1
        ):
            self.unmap(Unmap(*fields))

    def _follow(self, event: StateChange | Plug, start: int, end: int, *, shared: bool) -> None:
        """
        Take a range for mapped, or unmapped, because a listener was told of it.

        QEMU's type1 container has no events; its listener maps what becomes populated and unmaps
        what becomes discarded (hw/vfio/listener.c).
        """
        target = self.target(_REGIONS)
        fields = (event.time, event.source, event.line, _REGIONS)
        if not shared:
            for low, high, _ in target.mappings.some(start, end, _MOST):
                self.unmap(Unmap(*fields, low, high, high - low))
            return
        for low, high in target.mappings.gaps(start, end, _MOST):
            if not self._pluggable or self._plugged.covered(low, high) == high - low:
                self.map(Map(*fields, low, high))

    def remark(self, event: Remark) -> None:
        """Note a remark of the trace itself."""
        if event.lost:
            self._evidence.lost.add(f"{event.origin}: {event.text}")
            return
        if event.target is None or event.start is None or event.end is None:
            self._judge.report(event)
            return
        if not event.stale:
            self._judge.report(event)
            return
        target = self.target(event.target)
        reason = self._judge.reason(event, None, event.text)
        if event.end <= event.start or target is self._others:
            return
        # An unmap whose result was not told was taken as done.
        mapping = Mapping(event.start, event.end, event.source, event.line, _PAST, self._judge.now)
        for start, end in target.mappings.gaps(event.start, event.end, _MOST):
            target.add(mapping, start, end)
        target.refuse(event.start, event.end, reason)

    # -- unmaps

    def unmap(self, event: Unmap, count: int = 1) -> None:
        """Note an unmap: the pieces that are gone, were refused, or came short."""
        start, end = event.start, event.end
        self._judge.recent.append((start, end, self._judge.now, event))
        self._evidence.unmaps += count
        if self._undecided is not None:
            self._decide(start, end)
        target = self.targets.get(event.target) or self.target(event.target)
        if target is self._others:
            return
        target.unmaps += count
        if end <= start:
            return
        mappings = target.kept_in(start, end) if target.copies else target.mappings
        only = None if mappings is None else mappings.single(start, end)
        if mappings is None or only is None:
            self._unmap_of_nothing(event, target)
            return
        if (
            isinstance(only, Mapping)
            and event.done
            and (event.unmapped is None or event.unmapped >= end - start)
            and only.is_exactly(start, end, (end - start) // count)
        ):
            target.untold += 0 if event.unmapped else count
            if mappings is target.mappings:
                self._unmapped(event, target, [(start, end, only)], start, end)
            else:
                target.remove_copy(mappings, start, end)
            return
        if self._is_refused(event, target, mappings, count):
            return
        if event.unmapped is not None and event.unmapped < mappings.covered(start, end):
            end = self._short_unmap(event, target, mappings)
            if end <= start:
                return
        if mappings is not target.mappings:
            target.remove_copy(mappings, start, end)
            return
        pieces = mappings.pieces(start, end)
        self._unmapped(event, target, pieces, pieces[0][0], pieces[-1][1])

    def _unmapped(
        self,
        event: Unmap,
        target: TargetState,
        pieces: list[tuple[int, int, Mapping]],
        start: int,
        end: int,
    ) -> None:
        judge, conversions = self._judge, self.conversions
        if judge.observer is not None:
            judge.observer.unmapped(judge.now, target.label, start, end)
        for piece_start, piece_end, mapping in pieces:
            self._judge_piece(target, piece_start, piece_end, mapping, event)
        target.remove(start, end)
        if target.expected_from is not None and self._shared.single(start, end) is not None:
            conversion: ActiveConversion | None
            conversion = conversions.step(start, end, judge.now, event.source)
            reason = judge.reason(event, conversion)
            for piece_start, piece_end, _ in pieces:
                target.gone.set(piece_start, piece_end, reason)
            if not target.declared and not target.mappings:
                self._note_emptied(target)
        elif not target.declared and not target.mappings:
            self._note_emptied(target)
        elif conversions.active:
            conversion = conversions.find(start, end)
            if conversion is not None:
                conversion.last = judge.now

    def _note_emptied(self, target: TargetState) -> None:
        """Take a target without mappings for gone: its end unmaps all without a conversion."""
        if target.gone:
            self._evidence.emptied.add(target.label)
            target.gone.clear()
        target.expected_from = None

    def _unmap_of_nothing(self, event: Unmap, target: TargetState) -> None:
        if event.unmapped and not target.complete:
            self._evidence.mapped_before += event.unmapped
        elif event.done and target.failed.gaps(event.start, event.end, 1):
            note = ""
            if event.unmapped:
                note = (
                    f"{event.unmapped} bytes were unmapped that the trace does not show as mapped"
                )
            self._judge.broken(
                FindingKind.UNMAP_OF_NOTHING, event, target, event.start, event.end, note=note
            )

    def _is_refused(
        self, event: Unmap, target: TargetState, mappings: RangeMap[Mapping], count: int
    ) -> bool:
        """Apply the target's rule; open windows over the ranges that stay mapped."""
        start, end = event.start, event.end
        note = ""
        untold = event.unmapped is None
        exact = is_exact(mappings, start, end, (end - start) // count)
        if not event.done:
            note = "the unmap failed"
        elif start == 0 and end >= _EVERYTHING - 1:
            pass  # every rule has a call for that
        elif target.rule in ("whole", "exact") and bisects(mappings, start, end):
            self._judge.broken(FindingKind.BISECTING_UNMAP, event, target, start, end)
            note = "the unmap names part of a mapping" if untold else ""
        elif target.rule == "exact" and not exact:
            self._judge.broken(FindingKind.INEXACT_UNMAP, event, target, start, end)
            note = "the unmap names no mapping exactly" if untold else ""
        elif untold:
            target.untold += count
            if not exact:
                target.untold_inexact += count
                target.untold_mappings += len(mappings.pieces(start, end))
        if note:
            target.refuse(start, end, self._judge.reason(event, None, note))
        return bool(note)

    def _short_unmap(self, event: Unmap, target: TargetState, mappings: RangeMap[Mapping]) -> int:
        """
        Report that fewer bytes went than there were.

        Return where it ended: the kernel unmaps upwards.
        """
        assert event.unmapped is not None
        left, all_of_it = event.unmapped, mappings.covered(event.start, event.end)
        cut = event.start
        while left > 0:
            for start, end, _ in mappings.some(cut, event.end, 1):
                cut = min(end, start + left)
                left -= cut - start
                if not left:
                    break
        start, _, mapping = mappings.some(cut, event.end, 1)[0]
        end = mappings.last(start, event.end)
        note = f"{event.unmapped} of {all_of_it} bytes were unmapped"
        self._judge.broken(FindingKind.SHORT_UNMAP, event, target, start, end, mapping, note)
        reason = self._judge.reason(event, None, "an unmap came short of it")
        target.refuse(start, end, reason)
        return cut

    # -- windows

    def _judge_piece(
        self, target: TargetState, start: int, end: int, mapping: Mapping, event: Event | None
    ) -> None:
        """Judge what a piece of a mapping was wrong for, which goes now."""
        if target.has_refused:
            for low, high, reason in target.refused.pieces(start, end):
                self._judge_refused(target, low, high, reason, mapping, event)
        for kind, reasons in self._against(target):
            only = reasons.single(start, end)
            if only is None:
                continue
            if isinstance(only, Reason):
                self._judge.window(kind, target, start, end, only, mapping, event)
                continue
            pieces = reasons.some(start, end, _MOST)
            for low, high, reason in pieces[:_MOST]:
                self._judge.window(kind, target, low, high, reason, mapping, event)
            if len(pieces) > _MOST:
                low = pieces[_MOST][0]
                rest = reasons.covered(low, end)
                self._judge.window(kind, target, low, end, pieces[_MOST][2], mapping, event, rest)

    def _against(self, target: TargetState) -> tuple[tuple[FindingKind, RangeMap[Reason]], ...]:
        """Return the reasons why a target must not map pages, of those that there ever were."""
        if target.has_freed:
            return (*self._bad, (FindingKind.FREED, target.freed))
        return self._bad

    def _judge_refused(
        self,
        target: TargetState,
        start: int,
        end: int,
        reason: Reason,
        mapping: Mapping | None,
        event: Event | None,
    ) -> None:
        """Judge what an unmap left, but where it is told already: private, and mapped."""
        for low, high, private in self._private.some(start, end, _MOST)[:_MOST]:
            conversion = private.conversion
            if (
                conversion is None
                or conversion.over
                or (mapping is not None and mapping.born > private.born)
            ):
                if low > start:
                    self._judge.window(
                        FindingKind.STALE, target, start, low, reason, mapping, event
                    )
                start = high
        if start < end:
            self._judge.window(FindingKind.STALE, target, start, end, reason, mapping, event)

    def _judge_mapped(
        self,
        kind: FindingKind,
        target: TargetState,
        start: int,
        end: int,
        reason: Reason,
        event: Event | None,
    ) -> None:
        """Judge what a target maps of a range, for which the reason against it goes now."""
        pieces = target.mappings.some(start, end, _MOST)
        for low, high, mapping in pieces[:_MOST]:
            self._judge.window(kind, target, low, high, reason, mapping, event)
        if len(pieces) > _MOST:
            low = pieces[_MOST][0]
            rest = target.mappings.covered(low, end)
            self._judge.window(kind, target, low, end, reason, pieces[_MOST][2], event, rest)

    def _no_longer_missing(
        self, target: TargetState, start: int, end: int, reason: Reason, event: Event | None
    ) -> None:
        """Judge what a target did not map of a shared range, which now it does or need not."""
        expected_from = target.expected_from
        if expected_from is None:
            return
        mapped = target.mappings.single(start, end)
        if isinstance(mapped, Mapping) or start >= end:
            return
        if mapped is None and not self._pluggable:
            gone = target.gone.single(start, end)
            if gone is not Many.MANY:  # one window, most of the time
                why = reason if gone is None else _later(gone, reason)
                if why.born >= expected_from:
                    self._judge.window(FindingKind.MISSING, target, start, end, why, None, event)
                return
        elif target.mappings.covered(start, end) == end - start:
            return
        gaps = target.mappings.gaps(start, end, _MOST)
        parts = (
            part
            for low, high in gaps[:_MOST]
            for first, last, why in self._plugged_parts(low, high, reason)
            for part in _why_missing(target.gone, first, last, why)
        )
        for low, high, why in islice(parts, _MOST):
            if why.born >= expected_from:
                self._judge.window(FindingKind.MISSING, target, low, high, why, None, event)
        if len(gaps) > _MOST and reason.born >= expected_from:
            low = gaps[_MOST][0]
            rest = end - low - target.mappings.covered(low, end)
            self._judge.window(FindingKind.MISSING, target, low, end, reason, None, event, rest)

    def _plugged_parts(
        self, start: int, end: int, reason: Reason
    ) -> Iterator[tuple[int, int, Reason]]:
        """Yield the parts of a shared range that virtio-mem has not withdrawn, with the reason."""
        if not self._pluggable:
            yield start, end, reason
            return
        position = start
        for low, high, _ in self._pluggable.some(start, end, _FEW):
            if low > position:
                yield position, low, reason
            for first, last, plugged in self._plugged.some(low, high, _MOST):
                yield first, last, _later(plugged, reason)
            position = high
        if position < end:
            yield position, end, reason

    # -- the end

    def finish(self) -> None:
        """Judge the windows that are open where the trace ends."""
        judge = self._judge
        self._forget_undecided()
        self.conversions.end_all_quiet(judge.now if judge.timed else None)
        for target in self._compared:
            for kind, reasons in self._against(target):
                for start, end, reason in reasons.items():
                    self._judge_mapped(kind, target, start, end, reason, None)
            for start, end, reason in target.refused.items():
                for low, high, mapping in target.mappings.pieces(start, end):
                    self._judge_refused(target, low, high, reason, mapping, None)
            for start, end, reason in self._shared.items():
                self._no_longer_missing(target, start, end, reason, None)
        self._evidence.guessed_ends += self.conversions.guessed

    def why_not_mapped(self, address: int) -> tuple[Reason, str] | None:
        """Return the conversion or other event that took a page from its devices, and its word."""
        freed = [
            (target.freed, "given back to the host")
            for target in self._compared
            if target.has_freed
        ]
        for reasons, word in (
            (self._private, "made private"),
            (self._unplugged, "unplugged"),
            *freed,
        ):
            reason = reasons.get(address)
            if reason is not None:
                return reason, word
        return None


def _later(one: Reason, other: Reason) -> Reason:
    return one if one.born > other.born else other


def _why_missing(
    gone: RangeMap[Reason], start: int, end: int, reason: Reason
) -> Iterator[tuple[int, int, Reason]]:
    """Yield the parts of a range that is not mapped: shared since then, or unmapped since."""
    position = start
    if gone:
        for low, high, unmapped in gone.some(start, end, _MOST):
            if low > position:
                yield position, low, reason
            yield low, high, _later(unmapped, reason)
            position = high
    if position < end:
        yield position, end, reason
