# SPDX-License-Identifier: Apache-2.0
"""
A mapper that is attached to a guest memory, and how it comes and goes.

A guest can have a million runs, and mapping them takes seconds. So a mapper is attached in batches,
and conversions get between them: after each batch its listener is registered for as much of the
section as is mapped, hears of every change there, and of none behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import islice

from ramblock.discard.coordination import DiscardHold
from ramblock.discard.guard import Guard
from ramblock.discard.notification import reserve
from ramblock.discard.registry import Registration
from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.dma.mapper import Mapper, SectionMapper
from ramblock.dma.target import DmaTarget
from ramblock.guest.places import Place, PlaceMap
from ramblock.hostmem.backing import SharedBacking

__all__ = ["Attachment", "check_place", "count_some", "give_up", "leave_all", "map_some"]

# Entries that one batch maps: some milliseconds on a fast target, and conversions wait no longer.
_BATCH = 256
# Runs that one batch looks at before anything is mapped, to count the entries.
_COUNTED = 4096


class Attachment:
    """
    A mapper, and that its target keeps alive the memory it reaches, also where nobody else does.

    :param mapper: Whose target is kept in step.
    :param hold: Its claim that nobody discards behind its back.
    """

    def __init__(self, mapper: Mapper, hold: DiscardHold) -> None:
        self.mapper = mapper
        #: Whether it maps all that it should. Not so while it is still being attached.
        self.complete = False
        self._hold = hold
        # By listener. Nothing in here leads back to the target: else neither would ever go.
        self._reachable: dict[int, SharedBacking] = {}
        self._anchor: weakref.finalize[..., DmaTarget] | None = None
        try:
            self._anchor = weakref.finalize(mapper.target, self._reachable.clear)
            self._anchor.atexit = False
        except TypeError:
            pass  # it cannot be watched, for instance because it has __slots__

    def finish(self) -> None:
        """Note that everything is mapped."""
        self.complete = True

    def admit(self, place: Place, guard: Guard) -> Registration:
        """
        Make a listener for *place*; it is not registered by that.

        :raises UsageError: The target cannot map it.
        """
        check_place(self.mapper, place)
        listener = SectionMapper(self.mapper, place.section, guard.doubt)
        place.listeners[self] = listener
        self._reachable[id(listener)] = place.block.shared
        return place.block.discard_manager.check_in(listener, place.section)

    def registration(self, place: Place) -> Registration | None:
        """Look up the registration of the listener for *place*, if there is one."""
        listener = place.listeners.get(self)
        return None if listener is None else place.block.discard_manager.find(listener)

    def force_out(self, place: Place) -> None:
        """
        Unmap what the target lets go of, on a poisoned memory; the rest is noted as in doubt.

        The listener may be in no list and still hold pages, after an undo that failed.
        """
        listener = place.listeners.get(self)
        if listener is not None:
            manager = place.block.discard_manager
            manager.leave_regardless(
                manager.find(listener) or manager.registration(listener, place.section)
            )

    def forget(self, place: Place) -> None:
        """Forget the listener for *place*; nothing happens if there is none."""
        listener = place.listeners.pop(self, None)
        if listener is not None:
            self.mapper.remove(listener)
            if not listener.in_doubt:
                del self._reachable[id(listener)]

    def close(self, *, keeps_blocks: bool) -> None:
        """
        Give back the claim, once nothing is mapped any more.

        :param keeps_blocks: It is not certain that nothing is.
        """
        self._hold.release()
        if self._anchor is not None and not keeps_blocks:
            self._anchor.detach()


def check_place(mapper: Mapper, place: Place) -> None:
    """Raise :class:`UsageError` if the target of *mapper* cannot map the section of *place*."""
    manager = place.block.discard_manager
    mapper.check_section(place.section, manager.min_granularity if manager.sources else None)


def count_some(mapper: Mapper, place: Place, position: int) -> tuple[int, int]:
    """
    Count the entries that the next runs of *place* need, from offset *position* of the block on.

    :return: The entries, and the offset up to which they are counted.
    """
    part = place.section.part(position, place.section.end)
    runs = list(islice(place.block.discard_manager.populated(part), _COUNTED))
    entries = sum(mapper.entries_for(run.size) for run in runs)
    return entries, runs[-1].end if len(runs) == _COUNTED else place.section.end


def map_some(attachment: Attachment, places: PlaceMap, place: Place, guard: Guard) -> bool:
    """
    Map the next batch of *place*; whether anything is left to map. All of the batch or nothing.

    :raises UsageError: The target cannot map it.
    :raises MappingLimitError: No room for the batch.
    :raises BaseException: What the target raised.
    """
    section, manager = place.section, place.block.discard_manager
    if places.look_up(section) is not place:
        return False  # it was unmapped meanwhile
    before = attachment.registration(place)
    start = section.offset if before is None else before.section.end
    registration = before or attachment.admit(place, guard)
    rest = manager.populated(section.part(start, section.end))
    stop = _end_of_batch(attachment.mapper, rest) or section.end
    replay = manager.replay(registration._replace(section=section.part(start, stop)))
    reserve((replay,))
    with UndoLog(guard, "attach") as undo:
        mapped = registration._replace(section=section.part(section.offset, stop))
        manager.join(undo, mapped, replay, before=before)
    return stop < section.end


def _end_of_batch(mapper: Mapper, runs: Iterable[RamSection]) -> int | None:
    """Find where a batch ends; None: behind the last of *runs*."""
    left = _BATCH
    for run in runs:
        entries = mapper.entries_for(run.size)
        if entries > left:
            # Only one mapping for each page can be divided; one of a run is a single entry.
            return run.offset + left * mapper.page_size
        if entries == left:
            return run.end
        left -= entries
    return None


def leave_all(attachment: Attachment, places: Iterable[Place], guard: Guard) -> None:
    """
    Unmap everything that *attachment* has mapped: all or nothing.

    On a poisoned memory, all that the target lets go of; the rest is noted as in doubt.

    :raises BaseException: What the target raised; all is mapped as before.
    :raises PoisonedError: It could not be mapped again.
    """
    if guard.poisoned:
        for place in places:
            attachment.force_out(place)
    else:
        with UndoLog(guard, "detach") as undo:
            for place in places:
                registration = attachment.registration(place)
                if registration is not None:
                    place.block.discard_manager.leave(undo, registration)
    for place in places:
        place.listeners.pop(attachment, None)


def give_up(attachment: Attachment, places: Iterable[Place]) -> None:
    """Unmap a mapper that is attached in part, whatever its target says."""
    for place in places:
        registration = attachment.registration(place)
        attachment.force_out(place)
        listener = place.listeners.pop(attachment, None)
        if registration is not None and listener is not None and listener.in_doubt:
            # Nobody holds the mapper: for closing to tell it once more.
            place.block.discard_manager.keep(registration)
