# SPDX-License-Identifier: Apache-2.0
"""The guest's part of the audit: conversions, page states, virtio-mem, memory given back."""

from __future__ import annotations

from ramblock.trace.events import (
    Attributes,
    Conversion,
    ConversionEnd,
    Discard,
    Layout,
    Plug,
    PlugRequest,
    StateChange,
    VcpuEntry,
)
from ramblock.trace.findings import FindingKind
from ramblock.trace.ledger import PRIVATE, SHARED, Ledger

__all__ = ["GuestEvents"]


class GuestEvents:
    """Events of the guest."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def layout(self, event: Layout) -> None:
        """Note where blocks are, and which targets there will be."""
        self._ledger.places.note(event)
        if event.ends:
            self._ledger.conversions.ending.add(event.source.name)
        if event.unmap is not None and self._ledger.unmap_rule is None:
            self._ledger.unmap_rule = event.unmap
        for name in event.targets:
            self._ledger.target(name, complete=True).declared = True

    def conversion(self, event: Conversion) -> None:
        """Note that a conversion begins."""
        self._ledger.evidence.conversions += 1
        if event.time is None:
            self._ledger.conversions.end_of(event.source)
        self._ledger.conversions.step(
            event.start, event.end, self._ledger.now, event.source, event.vcpu
        )

    def conversion_end(self, event: ConversionEnd) -> None:
        """Note that a conversion is over."""
        self._ledger.evidence.conversions += 1
        self._ledger.conversions.end_of(event.source)
        if self._ledger.observer is not None:
            self._ledger.observer.converted(event)

    def vcpu_entry(self, event: VcpuEntry) -> None:
        """Note that a vCPU goes on."""
        self._ledger.conversions.entry(event.vcpu)

    def attributes(self, event: Attributes) -> None:
        """Note that pages became private or shared."""
        self._ledger.evidence.attributes += 1
        self._set_state(event, event.start, event.end, private=event.private, vcpu=event.vcpu)

    def state_change(self, event: StateChange) -> None:
        """Note that page states of a block changed."""
        if self._ledger.evidence.attributes:
            return  # they say the same, with guest addresses
        self._ledger.evidence.state_changes += 1
        places = self._ledger.places.of_block(event.block, event.start, event.end)
        if not places:
            self._ledger.evidence.unplaced_states += 1
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
        conversion = self._ledger.conversions.step(start, end, self._ledger.now, event.source, vcpu)
        conversion.asked = True
        self._ledger.states.set(start, end, PRIVATE if private else SHARED)
        if self._ledger.observer is not None:
            self._ledger.observer.page_state(self._ledger.now, start, end, private=private)
        for target in self._ledger.targets.values():
            if private:
                for piece_start, piece_end, mapping in target.mappings.pieces(start, end):
                    self._ledger.open_stale(
                        event, target, piece_start, piece_end, mapping, conversion
                    )
                if target.missing:
                    self._ledger.close(target, target.missing, start, end, event)
            else:
                if target.stale:
                    self._ledger.close(target, target.stale, start, end, event)
                for gap_start, gap_end in target.mappings.gaps(start, end):
                    self._ledger.open_missing(event, target, gap_start, gap_end, conversion)

    def plug_request(self, event: PlugRequest) -> None:
        """Note that virtio-mem is asked for memory, or gets some back."""
        # QEMU maps before it answers that memory is plugged, which takes long where there is much
        # to map.
        self._ledger.conversions.step(
            event.start, event.end, self._ledger.now, event.source
        ).held = True

    def plug(self, event: Plug) -> None:
        """Note virtio-mem's answer."""
        asked = self._ledger.conversions.find(event.start, event.end)
        if asked is not None:
            asked.held = False
        if not event.done:
            return
        self._ledger.evidence.plugs += 1
        self._ledger.plugged.set(event.start, event.end, "in" if event.plugged else "out")
        conversion = self._ledger.conversions.step(
            event.start, event.end, self._ledger.now, event.source
        )
        for target in self._ledger.targets.values():
            if event.plugged:
                self._ledger.close(target, target.unplugged, event.start, event.end, event)
                for start, end in target.mappings.gaps(event.start, event.end):
                    for piece_start, piece_end, state in self._ledger.states.pieces(start, end):
                        if state is SHARED:
                            self._ledger.open_missing(
                                event, target, piece_start, piece_end, conversion
                            )
            else:
                self._ledger.close(target, target.missing, event.start, event.end, event)
                for start, end, mapping in target.mappings.pieces(event.start, event.end):
                    self._ledger.open_unplugged(event, target, start, end, mapping, conversion)

    def discard(self, event: Discard) -> None:
        """Note that memory was given back to the host."""
        if not event.done or not event.shared:
            return
        self._ledger.evidence.discards += 1
        if event.host is None:
            places = [(event.start, event.end)]
        else:
            places = self._ledger.places.of_host(event.start, event.end)
            if not places:
                self._ledger.evidence.unplaced_discards += 1
        for start, end in places:
            # QEMU's virtio-mem gives memory back first and unmaps then; a pinned page stays the
            # device's until it is unmapped.
            conversion = self._ledger.conversions.find(start, end)
            unplugging = conversion if conversion is not None and conversion.held else None
            for target in self._ledger.targets.values():
                for piece_start, piece_end, mapping in target.mappings.pieces(start, end):
                    if unplugging is None:
                        self._ledger.broken(
                            FindingKind.FREED, event, target, piece_start, piece_end, mapping
                        )
                    else:
                        self._ledger.open_freed(
                            event, target, piece_start, piece_end, mapping, unplugging
                        )
