# SPDX-License-Identifier: Apache-2.0
"""The effect of an unmap: the pieces that are gone, were refused, or came short."""

from __future__ import annotations

from ramblock.trace.events import Unmap
from ramblock.trace.findings import FindingKind
from ramblock.trace.ledger import SHARED, Ledger
from ramblock.trace.mappings import Mapping, TargetState, Unmapping

__all__ = ["Unmaps"]


class Unmaps:
    """The audit's way with unmaps."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def apply(self, event: Unmap) -> None:
        """Take one."""
        self._ledger.evidence.unmaps += 1
        target = self._ledger.targets.get(event.target) or self._ledger.target(event.target)
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
        if self._ledger.observer is not None and gone:
            self._ledger.observer.unmapped(self._ledger.now, target.name, start, end)
        self._close_unmapped(event, target, gone)
        if not target.declared and not target.mappings:
            self._note_emptied(target)

    def _note_emptied(self, target: TargetState) -> None:
        """Take a target without mappings for gone: its end unmaps all without a conversion."""
        if target.missing:
            self._ledger.evidence.emptied.add(target.name)
            target.missing.clear()
        target.expected = False

    def _close_unmapped(
        self, event: Unmap, target: TargetState, gone: list[tuple[int, int]]
    ) -> None:
        for start, end in gone:
            for windows in (target.stale, target.refused, target.unplugged, target.freed):
                if windows:
                    self._ledger.close(target, windows, start, end, event)
            for piece_start, piece_end, state in self._ledger.states.pieces(start, end):
                if state is SHARED:
                    conversion = self._ledger.conversions.step(
                        piece_start, piece_end, self._ledger.now, event.source
                    )
                    self._ledger.open_missing(event, target, piece_start, piece_end, conversion)
                elif self._ledger.conversions.active:
                    conversion_of = self._ledger.conversions.find(piece_start, piece_end)
                    if conversion_of is not None:
                        conversion_of.last = self._ledger.now

    def _unmap_of_nothing(self, event: Unmap, target: TargetState) -> None:
        if event.unmapped and not target.complete:
            self._ledger.evidence.mapped_before += event.unmapped
        elif event.done and target.failed.gaps(event.start, event.end):
            note = ""
            if event.unmapped:
                note = (
                    f"{event.unmapped} bytes were unmapped that the trace does not show as mapped"
                )
            self._ledger.broken(
                FindingKind.UNMAP_OF_NOTHING, event, target, event.start, event.end, None, note
            )

    def _is_refused(self, event: Unmap, target: TargetState, met: Unmapping) -> bool:
        """Apply the target's rule; open windows over the ranges that stay mapped."""
        note = ""
        untold = event.unmapped is None
        if not event.done:
            note = "the unmap failed"
        elif met.bisects and target.rule in ("whole", "exact"):
            self._ledger.broken(
                FindingKind.BISECTING_UNMAP, event, target, event.start, event.end, None
            )
            note = "the unmap names part of a mapping" if untold else ""
        elif target.rule == "exact" and not met.exact:
            self._ledger.broken(
                FindingKind.INEXACT_UNMAP, event, target, event.start, event.end, None
            )
            note = "the unmap names no mapping exactly" if untold else ""
        elif untold:
            target.untold += 1
            if not met.exact:
                target.untold_inexact += 1
                target.untold_mappings += len(met.pieces)
        for start, end, mapping in met.pieces if note else ():
            window = self._ledger.window(FindingKind.STALE, event, None, mapping)
            window.note = note
            target.refused.open(start, end, window)
        return bool(note)

    def _short_unmap(
        self, event: Unmap, target: TargetState, met: Unmapping
    ) -> list[tuple[int, int, Mapping]]:
        """
        Report that fewer bytes went than there were.

        Return the pieces that went, the first ones: the kernel unmaps upwards.
        """
        assert event.unmapped is not None
        left = event.unmapped
        gone = []
        for start, end, mapping in met.pieces:
            size = min(left, end - start)
            if size:
                gone.append((start, start + size, mapping))
            if size < end - start:
                note = f"{event.unmapped} of {met.mapped_bytes} bytes were unmapped"
                self._ledger.broken(
                    FindingKind.SHORT_UNMAP, event, target, start + size, end, mapping, note
                )
                window = self._ledger.window(FindingKind.STALE, event, None, mapping)
                window.note = "an unmap came short of it"
                target.refused.open(start + size, end, window)
            left -= size
        return gone
