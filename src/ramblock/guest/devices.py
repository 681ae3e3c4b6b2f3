# SPDX-License-Identifier: Apache-2.0
"""
A mapper that is attached to a guest memory, and how it comes and goes.

A guest can have a million runs, and mapping them takes seconds. So a mapper is attached in batches, and
conversions get between them: after each batch its listener is registered for as much of the section as
is mapped, hears of every change there, and of none behind.
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
from ramblock.guest.places import Place
from ramblock.hostmem.backing import SharedBacking

__all__ = [
    "Attachment",
    "count_some",
    "give_up",
    "leave_all",
    "leave_all_regardless",
    "map_some",
]

# Entries that one batch maps: some milliseconds on a fast target, and conversions wait no longer.
_BATCH = 256
# Runs that one batch looks at before anything is mapped, to count the entries.
_COUNTED = 4096


class Attachment:
    """
    A mapper and its listeners.

    :param mapper: Whose target is kept in step.
    :param hold: Its claim that nobody discards behind its back.
    """

    def __init__(self, mapper: Mapper, hold: DiscardHold) -> None:
        self.mapper = mapper
        self.hold = hold
        #: Whether it maps all that it should. Not so while it is still being attached.
        self.complete = False
        # By listener. Nothing in here leads back to the target: else neither would ever go.
        self._reachable: dict[int, SharedBacking] = {}
        self._anchor: weakref.finalize[..., DmaTarget] | None = None

    def check(self, place: Place) -> None:
        """Raise :class:`UsageError` if the target cannot map the section of *place*."""
        manager = place.block.discard_manager
        granularity = manager.min_granularity if manager.sources else None
        self.mapper.check_section(place.section, granularity)

    def admit(self, place: Place, guard: Guard) -> Registration:
        """
        Make a listener for *place*; it is not registered by that.

        :raises UsageError: The target cannot map it.
        """
        self.check(place)
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

    def hold_blocks(self) -> None:
        """Let the target keep alive the memory it reaches, also where nobody else holds it."""
        try:
            self._anchor = weakref.finalize(self.mapper.target, self._reachable.clear)
        except TypeError:
            return  # it cannot be watched, for instance because it has __slots__
        self._anchor.atexit = False

    def let_blocks_go(self) -> None:
        """Undo :meth:`hold_blocks`, once nothing is mapped any more."""
        if self._anchor is not None:
            self._anchor.detach()


def count_some(attachment: Attachment, place: Place, position: int) -> tuple[int, int]:
    """
    Count the entries that the next runs of *place* need, from offset *position* of the block on.

    :return: The entries, and the offset up to which they are counted.
    """
    part = place.section.part(position, place.section.end)
    runs = list(islice(place.block.discard_manager.populated(part), _COUNTED))
    entries = sum(attachment.mapper.entries_for(run.size) for run in runs)
    return entries, runs[-1].end if len(runs) == _COUNTED else place.section.end


def map_some(attachment: Attachment, place: Place, guard: Guard) -> bool:
    """
    Map the next batch of *place*; whether anything is left to map. All of the batch or nothing.

    :raises UsageError: The target cannot map it.
    :raises MappingLimitError: No room for the batch.
    :raises BaseException: What the target raised.
    """
    section, manager = place.section, place.block.discard_manager
    registration = attachment.registration(place)
    start = section.offset
    if registration is None:
        registration = attachment.admit(place, guard)
    else:
        start = registration.section.end
    stop = _end_of_batch(attachment.mapper, manager.populated(section.part(start, section.end)))
    stop = section.end if stop is None else stop
    replay = manager.replay(registration._replace(section=section.part(start, stop)))
    reserve((replay,))
    with UndoLog(guard, "attach") as undo:
        mapped = registration._replace(section=section.part(section.offset, stop))
        manager.join(undo, mapped, replay, before=registration if start > section.offset else None)
    return stop < section.end


def _end_of_batch(mapper: Mapper, runs: Iterable[RamSection]) -> int | None:
    """Find where a batch ends; None: behind the last of *runs*."""
    left = _BATCH
    for run in runs:
        entries = mapper.entries_for(run.size)
        if entries >= left:
            # Only one mapping for each page can be divided; one of a run is a single entry.
            return run.end if entries == left else run.offset + left * mapper.page_size
        left -= entries
    return None


def leave_all(attachment: Attachment, places: Iterable[Place], guard: Guard) -> None:
    """
    Unmap everything that *attachment* has mapped: all or nothing.

    :raises BaseException: What the target raised; all is mapped as before.
    :raises PoisonedError: It could not be mapped again.
    """
    with UndoLog(guard, "detach") as undo:
        for place in places:
            registration = attachment.registration(place)
            if registration is not None:
                place.block.discard_manager.leave(undo, registration)


def give_up(attachment: Attachment, places: Iterable[Place]) -> None:
    """Unmap a mapper that is attached in part, whatever its target says."""
    for place in places:
        registration = attachment.registration(place)
        attachment.force_out(place)
        listener = place.listeners.pop(attachment, None)
        if registration is not None and listener is not None and listener.in_doubt:
            # Nobody holds the mapper: for closing to tell it once more.
            place.block.discard_manager.keep(registration)


def leave_all_regardless(attachment: Attachment, places: Iterable[Place]) -> None:
    """Unmap all that the target lets go of; the rest is noted as in doubt."""
    for place in places:
        attachment.force_out(place)
