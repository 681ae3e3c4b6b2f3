# SPDX-License-Identifier: Apache-2.0
"""
The audit's way with targets: they come, map, fault, and go.

Unmaps have a module of their own.
"""

from __future__ import annotations

from ramblock.trace.events import Access, Attach, Detach, Map, Origin, Remark
from ramblock.trace.findings import FindingKind
from ramblock.trace.ledger import PRIVATE, Ledger
from ramblock.trace.mappings import Mapping, TargetState

__all__ = ["TargetEvents"]


class TargetEvents:
    """Events of targets."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def attach(self, event: Attach) -> None:
        """Note that a target is there."""
        # The kernel's word for a device that joins may come at any time; the others come first.
        self._ledger.target(event.target, complete=event.device is None)

    def detach(self, event: Detach) -> None:
        """Note that a target goes, and its mappings with it."""
        target = self._ledger.targets.get(event.target)
        if target is None:
            return
        for windows in target.windows:
            for start, end, window in windows.items():
                self._ledger.judge(target, start, end, window, event)
            windows.clear()
        self._ledger.evidence.gone.append(target.summary())
        if self._ledger.observer is not None:
            for start, end, _ in target.mappings.items():
                self._ledger.observer.unmapped(self._ledger.now, target.name, start, end)
        del self._ledger.targets[event.target]

    def map(self, event: Map) -> None:
        """Note that a target maps."""
        self._ledger.evidence.maps += 1
        if not event.done or event.end <= event.start:
            self._ledger.evidence.failed_maps += 1
            if event.end > event.start:
                self._ledger.target(event.target).failed.set(event.start, event.end, event.origin)
            return
        start, end = event.start, event.end
        target = self._ledger.targets.get(event.target) or self._ledger.target(event.target)
        target.maps += 1
        mapping = Mapping(start, end, event.source, event.line, event.key)
        there = target.mappings.pieces(start, end)
        if there and self._is_copy(event, target, there):
            return
        for piece_start, piece_end, old in there:
            self._ledger.broken(FindingKind.DOUBLE_MAP, event, target, piece_start, piece_end, old)
        target.mappings.set(start, end, mapping)
        if event.host is not None:
            self._ledger.places.note_host(start, end, event.host)
        if self._ledger.observer is not None:
            self._ledger.observer.mapped(self._ledger.now, target.name, start, end)
        if target.missing:
            self._ledger.close(target, target.missing, start, end, event)
        self._look_at_mapped_pages(event, target, mapping)

    def _look_at_mapped_pages(self, event: Map, target: TargetState, mapping: Mapping) -> None:
        start, end = event.start, event.end
        known = 0
        for piece_start, piece_end, state in self._ledger.states.pieces(start, end):
            known += piece_end - piece_start
            if state is PRIVATE:
                # No conversion excuses this: to-shared makes pages shared before it maps them.
                self._ledger.open_stale(event, target, piece_start, piece_end, mapping, None)
        self._ledger.evidence.stateless_bytes += end - start - known
        if known:
            target.expected = True
        if self._ledger.conversions.active:
            conversion = self._ledger.conversions.find(start, end)
            if conversion is not None:
                conversion.last = self._ledger.now
        if self._ledger.plugged:
            for piece_start, piece_end, plug in self._ledger.plugged.pieces(start, end):
                if plug == "out":
                    # QEMU maps before it answers the guest that the memory is plugged.
                    plugging = self._ledger.conversions.step(
                        start, end, self._ledger.now, event.source
                    )
                    self._ledger.open_unplugged(
                        event, target, piece_start, piece_end, mapping, plugging
                    )

    @staticmethod
    def _is_copy(event: Map, target: TargetState, there: list[tuple[int, int, Mapping]]) -> bool:
        """Whether this is the copy for another domain of the same container."""
        start, end, old = there[0]
        if event.key is None or old.key != event.key or (start, end) != (event.start, event.end):
            return False
        if (old.start, old.end) != (start, end):
            return False
        old.copies += 1
        return True

    def access(self, event: Access) -> None:
        """Note that a device touched memory, or tried to."""
        if event.refused:
            target = self._ledger.target(event.target)
            target.faults += 1
        if self._ledger.observer is not None:
            self._ledger.observer.accessed(event)

    def remark(self, event: Remark) -> None:
        """Note a remark of the trace itself."""
        if event.lost:
            self._ledger.evidence.lost.append(
                f"{Origin(event.source.name, event.line)}: {event.text}"
            )
            return
        if event.target is None or event.start is None or event.end is None:
            self._ledger.report(event)
            return
        target = self._ledger.target(event.target)
        if not event.stale:
            self._ledger.report(event)
            return
        pieces = target.mappings.pieces(event.start, event.end)
        mapping = pieces[0][2] if pieces else None
        window = self._ledger.window(FindingKind.STALE, event, None, mapping)
        window.note = event.text
        target.refused.open(event.start, event.end, window)
