# SPDX-License-Identifier: Apache-2.0
"""A guest's memory: where its blocks are, which devices see it, and the conversion of its pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from ramblock.discard.attributes import PageState, check_state
from ramblock.discard.coordination import DiscardCoordinator, DiscardHold
from ramblock.discard.guard import Guard, InDoubt
from ramblock.discard.notification import reserve
from ramblock.discard.section import RamSection
from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, MappingPolicy
from ramblock.errors import BusyError, ConversionError, PoisonedError, UsageError
from ramblock.events import Observer
from ramblock.guest.block import RamBlock
from ramblock.guest.conversion import ConversionResult, convert_pieces, plan_pieces
from ramblock.guest.devices import (
    Attachment,
    check_place,
    count_some,
    give_up,
    leave_all,
    map_some,
)
from ramblock.guest.freeing import free_each
from ramblock.guest.placement import Placer
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.reset import check_new_parts, reset_guest
from ramblock.guest.vm import Vm
from ramblock.hostmem.backing import PrivateBacking
from ramblock.interrupts import hand_over, uninterrupted
from ramblock.logs import Sparingly
from ramblock.process import OfOneProcess
from ramblock.ranges import merge_adjacent
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_positive, check_range

__all__ = ["GuestMemory"]

_log = logging.getLogger(__name__)


def _check_unplaced(block: RamBlock) -> None:
    if block.placement is not None:
        raise UsageError(f"block {block.name!r} is in another guest memory already", value=block)
    block.discard_manager.check_open()


class GuestMemory(OfOneProcess):
    """
    The memory of one guest.

    Every changing call takes the one lock of this memory. It raises
    :class:`~ramblock.errors.BusyError` when a listener, target or VM calls back in, and
    :class:`~ramblock.errors.UsageError` in a fork of the process that made the memory. Ctrl-C waits
    until it has ended (:mod:`ramblock.interrupts`).

    :param vm: Sets page attributes (and memory slots, where it has them); None: they are only
        tracked.
    """

    def __init__(self, vm: Vm | None = None) -> None:
        self._guard = Guard()
        self._places = PlaceMap()
        self._attachments: list[Attachment] = []
        self._placer = Placer(self._guard, vm, self._places, self._attachments)
        self._log_failure = Sparingly(_log)
        # The claims that each block's own guard held when it came here, by the block's id.
        self._adopted: dict[int, list[DiscardHold]] = {}

    @property
    def sections(self) -> tuple[RamSection, ...]:
        """Where blocks appear, ascending by guest address."""
        return tuple(place.section for place in self._places)

    @property
    def mappers(self) -> tuple[Mapper, ...]:
        """The mappers that are attached, oldest first."""
        return tuple(entry.mapper for entry in self._attachments if entry.complete)

    @property
    def discards(self) -> DiscardCoordinator:
        """Who needs discards of this memory, and who forbids them."""
        return self._guard.discards

    @property
    def observer(self) -> Observer | None:
        """Called with each :class:`~ramblock.events.StateChanged`, under the lock; None: nobody."""
        return self._guard.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._guard.observer = observer

    @property
    def poisoned(self) -> bool:
        """Whether it is no longer certain what devices can reach. Permanent."""
        return self._guard.poisoned

    def in_doubt(self) -> list[InDoubt]:
        """List the ranges that a target may or may not still reach, as (gpa, size, target)."""
        return self._guard.in_doubt()

    def state(self, gpa: int) -> PageState:
        """
        Tell the state of the page at *gpa*; ordinary RAM is always shared.

        :raises UsageError: Nothing is mapped there.
        """
        check_range(gpa, 1, limit=ADDRESS_LIMIT, align=1, what="guest address")
        ((place, section),) = self._places.pieces(gpa, 1)
        attributes = place.block.attributes
        shared = attributes is None or attributes.is_populated(section.offset, 1)
        return PageState.SHARED if shared else PageState.PRIVATE

    def ranges(self, state: PageState) -> Iterator[tuple[int, int]]:
        """
        Yield the maximal runs of pages in *state* as (gpa, size), ascending, across blocks.

        Holes are in neither state. Lazy: a conversion on another thread is seen page by page, before
        or after.

        :raises UsageError: Not a page state.
        """
        check_state(state)
        runs = merge_adjacent(self._runs(shared=state is PageState.SHARED))
        return ((start, end - start) for start, end in runs)

    def _runs(self, *, shared: bool) -> Iterator[tuple[int, int]]:
        for place in self._places:
            section, attributes = place.section, place.block.attributes
            if attributes is not None:
                shift = section.gpa - section.offset
                first, last = section.offset // PAGE_SIZE, section.end // PAGE_SIZE
                for start, end in attributes.bits.runs(first, last, value=shared):
                    yield start * PAGE_SIZE + shift, end * PAGE_SIZE + shift
            elif shared:
                yield section.gpa, section.gpa_end

    def map(
        self,
        block: RamBlock,
        gpa: int,
        *,
        offset: int = 0,
        size: int | None = None,
        readonly: bool = False,
    ) -> RamSection:
        """
        Let *block*, or ``[offset, offset + size)`` of it, appear at *gpa*. All or nothing.

        The attributes of a block with private backing are set before the guest can see it (its memory
        slot), so that the guest at no instant could run with pages shared that are tracked as
        private. Then each attached target maps the populated pages.

        :param gpa: In bytes, a multiple of the page size.
        :param offset: In the block, in bytes, a multiple of the page size.
        :param size: In bytes; None: to the end of the block.
        :param readonly: Devices may not write to it.
        :raises UsageError: Unaligned, outside the block or the address space, overlapping another
            section in guest addresses or (with private backing) in the block, or the block is closed
            or in another memory; nothing has changed.
        :raises BusyError: The block's users and this memory's contradict each other about discards;
            nothing has changed.
        :raises MappingLimitError: A mapper has no room for it; nothing has changed.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This memory or the block is poisoned, or this call poisoned it.
        """
        if not isinstance(block, RamBlock):
            raise UsageError(f"{block!r} is not a RAM block", value=block, expected="a RamBlock")
        what = f"block {block.name!r}"
        if size is None:
            check_range(offset, 1, limit=block.size, align=1, what=what)
            size = block.size - offset
        check_range(offset, size, limit=block.size, align=PAGE_SIZE, what=what)
        check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="guest addresses")
        section = RamSection(block, offset, size, gpa, readonly)
        self._guard.run("map", self._map, block, section)
        return section

    def _map(self, block: RamBlock, section: RamSection) -> None:
        self._places.check_free(block, section)
        try:
            self._adopt(block)
            self._placer.place(Place(block, section))
        except BaseException:
            self._release_unplaced(block)
            raise

    def unmap(self, section: RamSection) -> None:
        """
        Take *section* out: from every target, then its slot, then its attributes. All or nothing.

        On a poisoned memory it does as much as can be done and keeps the doubts.

        :raises UsageError: It is not a section of this memory.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This call poisoned the memory.
        """
        self._guard.run("unmap", self._unmap, section, even_poisoned=True)

    def _unmap(self, section: RamSection) -> None:
        place = self._places.look_up(section)
        if place is None:
            raise UsageError(f"{section!r} is not mapped here", value=section)
        if self._guard.poisoned:
            self._placer.force_out(place)
        else:
            self._placer.remove(place)
        self._release_unplaced(place.block)

    def forget(self, block: RamBlock) -> None:
        """Take out every section of *block*, for its ``close``, which holds the lock."""
        for place in self._places.of_block(block):
            if not self._guard.poisoned:
                try:
                    self._placer.remove(place, closing=True)
                    continue
                except BaseException as error:
                    _log.debug("closing block %r by force: %r", block.name, error)
            self._placer.force_out(place)
        # The block keeps this guard: its doubts are noted here.
        self._adopted.pop(id(block), None)
        block.placement = None

    def _adopt(self, block: RamBlock) -> None:
        """Bring *block* under this memory's lock, if it is not there."""
        if block.placement is not self:
            _check_unplaced(block)
            # Its own guard is taken inside ours. Nobody takes them the other way round: a block's
            # own guard knows no memory.
            own = block.guard
            own.run("map", self._adopt_under, block, own)

    def _adopt_under(self, block: RamBlock, own: Guard) -> None:
        _check_unplaced(block)
        if block.guard is not own:
            raise BusyError(f"block {block.name!r} is being placed by somebody else")
        self._adopted[id(block)] = self._guard.discards.adopt(own.discards)
        block.placement = self
        block.discard_manager.guard = self._guard

    def _release_unplaced(self, block: RamBlock) -> None:
        """Give *block* a guard of its own again, if it has no section here."""
        if block.placement is self and not self._places.of_block(block):
            guard, manager = Guard(), block.discard_manager
            holds = [*self._adopted.pop(id(block), ()), *manager.holds]
            self._guard.leave_with(guard, block, holds)
            block.placement = None
            manager.guard = guard

    def reset(
        self, vm: Vm | None = None, private: Mapping[RamBlock, PrivateBacking] | None = None
    ) -> int:
        """
        Reset the guest: all confidential pages private, virtio-mem unplugged, neither mapped by any
        device, and all that memory freed on both sides. All or nothing until it is committed.

        :param vm: Takes the place of the VM until now, which must not run any more; None: it stays.
        :param private: New private backings by block, where they are recreated.
        :return: Bytes of the old guest that could not be freed. Unless it is 0 the new guest must not
            run: call it again.
        :raises UsageError: *vm* is no VM, or a block cannot take a new private backing; nothing has
            changed.
        :raises BaseException: What a target or VM raised; everything is as before.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it.
        """
        return self._guard.run("reset", self._reset, vm, dict(private or {}))

    def _reset(self, vm: Vm | None, private: Mapping[RamBlock, PrivateBacking]) -> int:
        check_new_parts(self._places, vm, private)
        not_freed = reset_guest(self._guard, self._places, self._placer.vm, vm, private)
        if vm is not None:
            self._placer.vm = vm
        return not_freed

    def attach(
        self,
        target: DmaTarget,
        policy: MappingPolicy = MappingPolicy.AUTO,
        *,
        max_mappings: int | None = None,
    ) -> Mapper:
        """
        Keep *target* in step from now on: it maps the populated pages. All or nothing.

        It maps in batches; conversions get between them, and so does Ctrl-C, which undoes it.

        :param max_mappings: The operator's budget; the smaller of it and the target's counts.
        :return: The mapper that watches over it; hand it to :meth:`detach`.
        :raises UsageError: RUN on a target that cannot cut, page size above a block's granularity, a
            section outside its IOVA ranges, or attached here already; nothing has changed.
        :raises BusyError: Somebody needs uncoordinated discards; nothing has changed.
        :raises MappingLimitError: No room for the populated pages; nothing has changed.
        :raises DmaError: The target refused; its mappings are unmapped again.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it.
        """
        if max_mappings is not None:
            check_positive(max_mappings, "max_mappings")
        if not hasattr(target, "capabilities"):
            text = f"{target!r} is not a DMA target"
            raise UsageError(text, value=target, expected="a DmaTarget")
        return uninterrupted(self._attach, target, policy, max_mappings)

    def _attach(self, target: DmaTarget, policy: MappingPolicy, max_mappings: int | None) -> Mapper:
        run, mapper = self._guard.run, Mapper(target, policy, max_mappings)
        attachment, places = run("attach", self._begin_attach, mapper)
        try:
            if mapper.limit is not None:
                # For all of it, before anything is mapped.
                needed = 0
                for place in places:
                    position = place.section.offset
                    while position < place.section.end:
                        entries, position = run("attach", count_some, mapper, place, position)
                        needed += entries
                        hand_over()
                mapper.require(needed)
            for place in places:
                while run("attach", map_some, attachment, self._places, place, self._guard):
                    hand_over()
            run("attach", attachment.finish)
        except BaseException as error:
            run("attach", self._give_up_attach, attachment, even_poisoned=True)
            if self._guard.poisoned and not isinstance(error, PoisonedError):
                raise self._guard.poisoned_error("attach") from error
            raise
        return mapper

    def _begin_attach(self, mapper: Mapper) -> tuple[Attachment, list[Place]]:
        target = mapper.target
        if any(attachment.mapper.target is target for attachment in self._attachments):
            raise UsageError(f"{target!r} is attached already", value=target)
        places = list(self._places)
        for place in places:
            check_place(mapper, place)
        hold = self._guard.discards.forbid_uncoordinated(f"DMA mapper of {target!r}")
        attachment = Attachment(mapper, hold)
        # From here on, a section that is placed meanwhile is mapped with the others.
        self._attachments.append(attachment)
        return attachment, places

    def _give_up_attach(self, attachment: Attachment) -> None:
        self._attachments.remove(attachment)
        give_up(attachment, self._places)
        attachment.close(keeps_blocks=self._guard.poisoned)

    def detach(self, mapper: Mapper) -> None:
        """
        Unmap all that *mapper* mapped and stop watching; the target is not closed. All or nothing.

        On a poisoned memory it unmaps as much as can be unmapped and keeps the doubts.

        :raises UsageError: It is not attached here.
        :raises DmaError: The target refused; everything is mapped as before and *mapper* is still
            attached.
        :raises PoisonedError: This call poisoned the memory.
        """
        self._guard.run("detach", self._detach, mapper, even_poisoned=True)

    def _detach(self, mapper: Mapper) -> None:
        found = (entry for entry in self._attachments if entry.mapper is mapper and entry.complete)
        attachment = next(found, None)
        if attachment is None:
            raise UsageError(f"{mapper!r} is not attached here", value=mapper)
        leave_all(attachment, self._places, self._guard)
        self._attachments.remove(attachment)
        attachment.close(keeps_blocks=self._guard.poisoned)

    def convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        """
        Convert ``[gpa, gpa + size)``, which may span several blocks, in one transaction.

        :param gpa: In bytes, a multiple of the page size.
        :param size: In bytes, a multiple of the page size.
        :raises UsageError: Unaligned, empty, past 2**64, over a hole or over RAM without private
            backing; nothing has changed.
        :raises MappingLimitError: A budget does not hold for it and its undo; nothing has changed.
        :raises ConversionError: A step failed, and every step was put back: nothing has changed. The
            cause is chained. In place, an OSError with EAGAIN: somebody holds a page, and the guest may
            ask again later.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it: see :meth:`in_doubt`.
        :raises KeyboardInterrupt: It came meanwhile and waited: the conversion is done, or put back
            with its error as the context.
        """
        return self._guard.run("convert", self._convert, gpa, size, to)

    def _convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        if to is not PageState.PRIVATE and to is not PageState.SHARED:
            check_state(to)
        # The look that check_range() begins with; it has the words for the others.
        if (
            type(gpa) is not int
            or type(size) is not int
            or gpa < 0
            or not 0 < size <= ADDRESS_LIMIT - gpa
            or (gpa | size) & (PAGE_SIZE - 1)
        ):
            check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="conversion")
        pieces = plan_pieces(self._places, gpa, size, to, self._placer.vm)
        if not pieces:
            return ConversionResult(gpa, size, to, 0, 0, 0, 0)
        map_calls = unmap_calls = 0
        for attachment in self._attachments:
            map_calls -= attachment.mapper.map_calls
            unmap_calls -= attachment.mapper.unmap_calls
        for piece in pieces:
            if piece.block.discard_manager.registry.limited:
                reserve([each.change.notification for each in pieces])
                break
        try:
            convert_pieces(self._guard, pieces, gpa, size, to)
        except PoisonedError as error:
            _log.critical("%s: %r", error, error.__cause__)
            raise
        except ConversionError as error:
            self._log_failure("%s: %r", error, error.__cause__)
            raise
        changed = 0
        for piece in pieces:
            changed += piece.change.changed_bytes
            if self._guard.observer is not None:
                section = piece.section
                piece.attributes.observe(piece.change, section.offset, section.size)
        # Committed. What is freed is not put back.
        not_freed = pieces[0].free() if len(pieces) == 1 else free_each(p.free for p in pieces)
        for attachment in self._attachments:
            map_calls += attachment.mapper.map_calls
            unmap_calls += attachment.mapper.unmap_calls
        return ConversionResult(gpa, size, to, changed, map_calls, unmap_calls, not_freed)

    def __repr__(self) -> str:
        sections, targets = len(self.sections), len(self._attachments)
        state = ", poisoned" if self.poisoned else ""
        return f"<GuestMemory: {sections} sections, {targets} targets{state}>"
