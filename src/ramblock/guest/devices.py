# SPDX-License-Identifier: Apache-2.0
"""
A mapper that is attached to a guest memory, and how it comes and goes.

A guest can have a million runs, and mapping them takes seconds. So a mapper is attached in batches,
and conversions get between them: after each batch its listener is registered for as much of the
section as is mapped, hears of every change there, and of none behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable
from itertools import islice

from ramblock.discard.coordination import HoldKind
from ramblock.discard.guard import Guard
from ramblock.discard.listeners import Registration
from ramblock.discard.notification import reserve
from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.dma.mapper import Mapper, SectionMapper
from ramblock.dma.target import DmaTarget
from ramblock.errors import UsageError, describe_range
from ramblock.guest.places import Place, PlaceMap
from ramblock.hostmem.backing import SharedBacking

# Entries that one batch maps: some milliseconds on a fast target, and conversions wait no longer.
_BATCH = 256
# Runs that one batch looks at before anything is mapped, to count the entries.
_COUNTED = 4096


class Attachment:
    """
    A mapper in a guest. The caller holds the lock.

    Its target keeps alive the memory it reaches, also where nobody else does.

    :param siblings: The attachments of the guest; it adds and removes itself.
    :raises UsageError: It is there already, or its target cannot map one of *places*.
    :raises BusyError: Somebody needs to discard behind the mapper's back.
    """

    def __init__(
        self, mapper: Mapper, guard: Guard, places: PlaceMap, siblings: list[Attachment]
    ) -> None:
        target = mapper.target
        if any(sibling.mapper.target is target for sibling in siblings):
            raise UsageError(f"{target!r} is attached already", value=target)
        self.mapper: Mapper = mapper
        self._guard = guard
        self._places = places
        self._siblings = siblings
        #: Whether it maps all that it should. Not so while it is still being attached.
        self.complete = False
        for place in places:
            self._check(place)
        owner = f"DMA mapper of {target!r}"
        self._hold = guard.discards.hold(owner, HoldKind.FORBID_UNCOORDINATED)
        # By listener. Nothing in here leads back to the target: else neither would ever go.
        self._reachable: dict[int, SharedBacking] = {}
        self._anchor: weakref.finalize[..., DmaTarget] | None = None
        try:
            self._anchor = weakref.finalize(target, self._reachable.clear)
            self._anchor.atexit = False
        except TypeError:
            pass  # it cannot be watched, for instance because it has __slots__
        # From here on, a section that is placed meanwhile is mapped with the others.
        #: Maps all sections, batch by batch: where it yields, the lock may go to others.
        self.batches = self._map_all(list(places))
        siblings.append(self)

    def _check(self, place: Place) -> None:
        # Its target must be able to map any granule; a block without sources does not change.
        section, manager = place.section, place.block.discard_manager
        unit, ranges = self.mapper.page_size, self.mapper.target.capabilities.iova_ranges
        granularity = manager.min_granularity
        if manager.sources and granularity < unit:
            changes = f"{section!r} changes by {granularity:#x}"
            text = f"the target maps pages of {unit:#x} bytes, {changes}"
            raise UsageError(text, value=unit, expected=f"at most {granularity:#x}")
        if (section.gpa | section.offset | section.size) % unit:
            raise UsageError(f"{section!r} is not made of pages of {unit:#x} bytes", value=section)
        if ranges is not None and not any(
            start <= section.gpa and section.gpa_end <= end for start, end in ranges
        ):
            where = describe_range(section.gpa, section.size)
            expected = ", ".join(describe_range(start, end - start) for start, end in ranges)
            text = f"{where} is outside the target's addresses {expected}"
            raise UsageError(text, value=section, expected=expected)

    def admit(self, place: Place) -> Registration:
        """Make a listener for *place*, unless the target cannot map it; it is not registered."""
        self._check(place)
        listener = SectionMapper(self.mapper, place.section, self._guard.doubt)
        place.listeners[self] = listener
        self._reachable[id(listener)] = place.block.shared
        return place.block.discard_manager.check_in(listener, place.section)

    def registration(self, place: Place) -> Registration | None:
        """Look up the registration of the listener for *place*, if there is one."""
        listener = place.listeners.get(self)
        return None if listener is None else place.block.discard_manager.registry.find(listener)

    def _map_all(self, places: list[Place]) -> Generator[None]:
        if self.mapper.limit is not None:
            # For all of it, before anything is mapped.
            needed = 0
            for place in places:
                position, end = place.section.offset, place.section.end
                while position < end:
                    rest = place.block.discard_manager.populated(place.section.part(position, end))
                    runs = list(islice(rest, _COUNTED))
                    needed += sum(self.mapper.entries_for(run.size) for run in runs)
                    position = runs[-1].end if len(runs) == _COUNTED else end
                    yield
            self.mapper.require(needed)
        for place in places:
            while self._map_some(place):
                yield
        self.complete = True

    def _map_some(self, place: Place) -> bool:
        # The next batch, all or nothing; whether anything is left to map.
        section, manager = place.section, place.block.discard_manager
        if self._places.look_up(section) is not place:
            return False  # it was unmapped meanwhile
        before = self.registration(place)
        start = section.offset if before is None else before.section.end
        registration = before or self.admit(place)
        rest = manager.populated(section.part(start, section.end))
        stop = self._end_of_batch(rest) or section.end
        replay = manager.replay(registration._replace(section=section.part(start, stop)))
        reserve((replay,))
        with UndoLog(self._guard, "attach") as undo:
            mapped = registration._replace(section=section.part(section.offset, stop))
            manager.join(undo, mapped, replay, before=before)
        return stop < section.end

    def _end_of_batch(self, runs: Iterable[RamSection]) -> int | None:
        left = _BATCH
        for run in runs:
            entries = self.mapper.entries_for(run.size)
            if entries >= left:
                # Only one mapping for each page can be divided; one of a run is a single entry.
                divided = run.offset + left * self.mapper.page_size
                return run.end if entries == left else divided
            left -= entries
        return None  # behind the last run

    def leave_all(self) -> None:
        """Unmap everything, all or nothing; as much as the target lets go of if it is poisoned."""
        if self._guard.poisoned:
            for place in self._places:
                self.force_out(place)
        else:
            with UndoLog(self._guard, "detach") as undo:
                for place in self._places:
                    registration = self.registration(place)
                    if registration is not None:
                        place.block.discard_manager.leave(undo, registration)
        for place in self._places:
            place.listeners.pop(self, None)
        self._siblings.remove(self)
        self._close()

    def give_up(self) -> None:
        """Unmap a mapper that is attached in part, whatever its target says."""
        # Here, where interrupts wait: one that came while Python throws a generator away is lost.
        self.batches.close()
        self._siblings.remove(self)
        for place in self._places:
            registration = self.registration(place)
            self.force_out(place)
            listener = place.listeners.pop(self, None)
            if registration is not None and listener is not None and listener.in_doubt:
                # Nobody holds the mapper: for closing to tell it once more.
                place.block.discard_manager.registry.add(registration)
        self._close()

    def _close(self) -> None:
        self._hold.release()
        # On a poisoned memory it is not certain that nothing is mapped any more.
        if self._anchor is not None and not self._guard.poisoned:
            self._anchor.detach()

    def force_out(self, place: Place) -> None:
        """Unmap what the target lets go of in *place*; the rest is noted as in doubt."""
        listener = place.listeners.get(self)
        if listener is not None:
            manager = place.block.discard_manager
            registry = manager.registry
            # After an undo that failed it may be in no list and still hold pages.
            found = registry.find(listener) or registry.make(listener, place.section)
            manager.leave_regardless(found)

    def forget(self, place: Place) -> None:
        """Forget the listener for *place*; nothing happens if there is none."""
        listener = place.listeners.pop(self, None)
        if listener is not None:
            self.mapper.remove(listener)
            if not listener.in_doubt:
                del self._reachable[id(listener)]
