# SPDX-License-Identifier: Apache-2.0
"""A guest's memory: where its blocks are, which devices see it, and the conversion of its pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from ramblock.discard.attributes import PageState, check_state
from ramblock.discard.coordination import DiscardCoordinator, DiscardHold
from ramblock.discard.guard import Guard, InDoubt
from ramblock.discard.notification import reserve
from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, MappingPolicy
from ramblock.errors import BusyError, ConversionError, PoisonedError, UsageError, describe_error
from ramblock.events import Observer
from ramblock.guest.block import RamBlock
from ramblock.guest.conversion import ConversionResult, convert_pieces
from ramblock.guest.devices import Attachment
from ramblock.guest.freeing import free_each
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.reset import reset_guest
from ramblock.guest.vm import MAKE_SHARED, MemorySlots, Vm, change_slot, establish, withdraw
from ramblock.hostmem.backing import PrivateBacking
from ramblock.interrupts import hand_over, uninterrupted
from ramblock.logs import Sparingly
from ramblock.process import OfOneProcess
from ramblock.ranges import Runs, clip, complement, merge
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_positive, check_range, new_tuple

_log = logging.getLogger(__name__)


class GuestMemory(OfOneProcess):
    """
    The memory of one guest.

    Every changing call takes the one lock of this memory and is all or nothing. It raises
    :class:`~ramblock.errors.UsageError` for arguments that do not fit, and in a fork of the process
    that made the memory; :class:`~ramblock.errors.BusyError` when a listener, target or VM calls
    back in; :class:`~ramblock.errors.MappingLimitError` when a budget does not hold for it and its
    undo; else the exception of a target or VM that refused. All is as before then, unless it is
    :class:`~ramblock.errors.PoisonedError`: this memory is poisoned, or this call poisoned it.
    Ctrl-C waits until a call has ended (:mod:`ramblock.interrupts`).

    :param vm: Sets page attributes (and memory slots, where it has them); None: they are only
        tracked.
    """

    def __init__(self, vm: Vm | None = None) -> None:
        self._guard = Guard()
        self._vm = vm
        self._guard.has_vm = vm is not None
        self._places = PlaceMap()
        self._attachments: list[Attachment] = []
        self._log_failure = Sparingly(_log)
        #: Who needs discards of this memory, and who forbids them.
        self.discards: DiscardCoordinator = self._guard.discards
        # Guest addresses, as (start, end), of sections that have gone and whose attributes the VM
        # did not reset.
        self._not_reset: list[tuple[int, int]] = []
        # The claims that each block's own guard held when it came here, by the block's id.
        self._adopted: dict[int, list[DiscardHold]] = {}

    @property
    def sections(self) -> tuple[RamSection, ...]:
        """The parts of blocks that appear, ascending by guest address."""
        return tuple(place.section for place in self._places)

    @property
    def mappers(self) -> tuple[Mapper, ...]:
        """The mappers that are attached, oldest first."""
        return tuple(entry.mapper for entry in self._attachments if entry.complete)

    @property
    def observer(self) -> Observer | None:
        """Called with each :class:`~ramblock.events.StateChanged`, under the lock; None: nobody."""
        return self._guard.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._guard.observer = observer

    @property
    def poisoned(self) -> bool:
        """Whether the reach of devices is no longer certain. Permanent."""
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
        ((place, offset, _),) = self._places.pieces(gpa, 1)
        attributes = place.block.attributes
        shared = attributes is None or attributes.is_populated(offset, 1)
        return PageState.SHARED if shared else PageState.PRIVATE

    def ranges(self, state: PageState) -> Iterator[tuple[int, int]]:
        """
        Yield the maximal runs of pages in *state* as (gpa, size), ascending, across blocks.

        Holes are in neither state. Lazy: a conversion on another thread is seen page by page,
        before or after.

        :raises UsageError: Not a page state.
        """
        check_state(state)
        runs = merge(self._runs(shared=state is PageState.SHARED))
        return ((start, end - start) for start, end in runs)

    def _runs(self, *, shared: bool) -> Runs:
        for place in self._places:
            shift = place.section.gpa - place.section.offset
            for start, end in place.runs(shared=shared):
                yield start + shift, end + shift

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
        Let *block*, or ``[offset, offset + size)`` of it, appear at *gpa*.

        The attributes of a block with private backing are set before the guest can see it (its
        memory slot), so that the guest at no instant could run with pages shared that are tracked
        as private. Then each attached target maps the populated pages.

        :param gpa: In bytes, a multiple of the page size.
        :param offset: In the block, in bytes, a multiple of the page size.
        :param size: In bytes; None: to the end of the block.
        :param readonly: Devices may not write to it.
        :raises UsageError: Unaligned, outside the block or the address space, overlapping another
            section in guest addresses or (with private backing) in the block, or the block is
            closed or in another memory.
        :raises BusyError: The block's users and this memory's contradict each other about discards.
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
        place, manager = Place(block, section), block.discard_manager
        slot_stays = partial(self._guard.doubt, section, self._vm, "the VM keeps its slot")
        try:
            if block.placement is not self:
                own = block.guard
                self._check_unplaced(block)
                # Its own guard is taken inside ours, and nobody takes them the other way round: a
                # block's own guard knows no memory, and a listener of a block may not change one.
                own.run("map", self._adopt, block, own)
            joining = [attachment.admit(place) for attachment in self._attachments]
            replays = [manager.replay(registration) for registration in joining]
            reserve(replays)
            with UndoLog(self._guard, "map") as undo:
                # From the first moment: private before the slot lets the guest see the pages.
                undo.do("attribute", self._set_attributes, self._try_to_withdraw, place)
                change_slot(undo, self._vm, place, add=True, stuck=slot_stays)
                for registration, replay in zip(joining, replays, strict=True):
                    manager.join(undo, registration, replay)
            self._places.add(place)
        except BaseException:
            if not self._guard.poisoned:
                self._forget_listeners(place)
            self._release_unplaced(block)
            raise

    def _check_unplaced(self, block: RamBlock) -> None:
        if block.placement is not None:
            text = f"block {block.name!r} is in another guest memory already"
            raise UsageError(text, value=block)
        block.discard_manager.check_open()

    def _adopt(self, block: RamBlock, own: Guard) -> None:
        self._check_unplaced(block)
        if block.guard is not own:
            raise BusyError(f"block {block.name!r} is being placed by somebody else")
        self._adopted[id(block)] = self._guard.discards.adopt(own.discards)
        block.placement = self
        block.discard_manager.guard = self._guard

    def _release_unplaced(self, block: RamBlock) -> None:
        # A block without a section here gets a guard of its own again.
        if block.placement is self and not self._places.of_block(block):
            guard, manager = Guard(), block.discard_manager
            holds = [*self._adopted.pop(id(block), ()), *manager.holds]
            self._guard.leave_with(guard, block, holds)
            block.placement = None
            manager.guard = guard

    def unmap(self, section: RamSection) -> None:
        """
        Take *section* out: from every target, then its slot, then its attributes.

        On a poisoned memory it does as much as can be done and keeps the doubts.

        :raises UsageError: It is not a section of this memory.
        """
        self._guard.run("unmap", self._unmap, section, even_poisoned=True)

    def _unmap(self, section: RamSection) -> None:
        place = self._places.look_up(section)
        if place is None:
            raise UsageError(f"{section!r} is not mapped here", value=section)
        if self._guard.poisoned:
            self._force_out(place)
        else:
            self._remove(place, partial(withdraw, self._vm))
        self._release_unplaced(place.block)

    def _remove(self, place: Place, unset: Callable[[Place], None]) -> None:
        # All or nothing; *unset* takes the attributes away.
        manager = place.block.discard_manager
        found = [attachment.registration(place) for attachment in self._attachments]
        leaving = [registration for registration in found if registration is not None]

        def stay_unmapped(*_: object) -> None:
            for registration in leaving:
                manager.stay_in_doubt(registration, "unmapped, and the VM does not take it back")

        with UndoLog(self._guard, "unmap") as undo:
            for registration in leaving:
                manager.leave(undo, registration)
            change_slot(undo, self._vm, place, add=False, stuck=stay_unmapped)
            undo.do("attribute", unset, self._set_attributes, place, stuck=stay_unmapped)
        self._places.discard(place)
        self._forget_listeners(place)

    def _force_out(self, place: Place) -> None:
        # Whatever anybody says; the rest of its mappings is noted as in doubt.
        poisoned, vm = self._guard.poisoned, self._vm
        for attachment in self._attachments:
            attachment.force_out(place)
        self._places.discard(place)
        self._forget_listeners(place)
        try:
            if isinstance(vm, MemorySlots):
                vm.remove_memory_slot(place.section)
        except BaseException as error:
            # The guest still sees the memory, as a device would: the block must keep it.
            self._guard.doubt(place.section, vm, f"the VM keeps its slot: {describe_error(error)}")
        else:
            if not poisoned:
                self._try_to_withdraw(place)

    def _forget_listeners(self, place: Place) -> None:
        for attachment in self._attachments:
            attachment.forget(place)

    def _set_attributes(self, place: Place) -> None:
        section, vm = place.section, self._vm
        ours = section.gpa, section.gpa_end
        if place.block.attributes is not None:
            establish(vm, place)
        elif vm is not None and any(
            low < ours[1] and ours[0] < high for low, high in self._not_reset
        ):
            # Ordinary RAM has the kernel's default, which an earlier section may have left changed.
            vm.set_memory_attributes(section.gpa, section.size, MAKE_SHARED)
        if place.block.in_place is None:  # else the VM's are as they were
            self._not_reset = [
                rest
                for run in self._not_reset
                for rest in complement(clip(iter((ours,)), *run), *run)
            ]

    def _try_to_withdraw(self, place: Place) -> None:
        # For a section that the guest does not see. Where the VM refuses, nobody is harmed: nothing
        # is there. But the next section there has to set the attributes.
        try:
            withdraw(self._vm, place)
        except BaseException as error:
            self._not_reset.append((place.section.gpa, place.section.gpa_end))
            _log.warning("%r: attributes are not reset: %s", place.section, error)

    def forget(self, block: RamBlock) -> None:
        """Take out every section of *block*, for its ``close``, which holds the lock."""
        for place in self._places.of_block(block):
            try:
                if not self._guard.poisoned:
                    self._remove(place, self._try_to_withdraw)
                    continue
            except BaseException as error:
                _log.debug("closing block %r by force: %r", block.name, error)
            self._force_out(place)
        # The block keeps this guard: its doubts are noted here.
        self._adopted.pop(id(block), None)
        block.placement = None

    def reset(
        self, vm: Vm | None = None, private: Mapping[RamBlock, PrivateBacking] | None = None
    ) -> int:
        """
        Reset the guest.

        All confidential pages become private, virtio-mem is unplugged, no device maps either, and
        all that memory is freed on both sides.

        :param vm: Takes the place of the VM until now, which must not run any more; None: it stays.
        :param private: New private backings by block, where they are recreated.
        :return: Bytes of the old guest that could not be freed. Unless it is 0 the new guest must
            not run: call it again. (A backing that was replaced is closed, and not tried again.)
        :raises UsageError: *vm* is no VM, or a block cannot take a new private backing.
        """
        return self._guard.run("reset", self._reset, vm, dict(private or {}))

    def _reset(self, vm: Vm | None, private: Mapping[RamBlock, PrivateBacking]) -> int:
        frees = reset_guest(self._guard, self._places, self._vm, vm, private)
        if vm is not None:
            self._vm, self._guard.has_vm, self._not_reset = vm, True, []
        return free_each(frees)

    def attach(
        self,
        target: DmaTarget,
        policy: MappingPolicy = MappingPolicy.AUTO,
        *,
        max_mappings: int | None = None,
    ) -> Mapper:
        """
        Keep *target* in step from now on: it maps the populated pages.

        It maps in batches; conversions get between them, and so does Ctrl-C, which undoes it.

        :param max_mappings: The operator's budget; the smaller of it and the target's counts.
        :return: The mapper that watches over it; hand it to :meth:`detach`.
        :raises UsageError: RUN on a target that cannot cut, page size above a block's granularity,
            a section outside its IOVA ranges, or attached here already.
        :raises BusyError: Somebody needs uncoordinated discards.
        """
        if max_mappings is not None:
            check_positive(max_mappings, "max_mappings")
        if not hasattr(target, "capabilities"):
            text = f"{target!r} is not a DMA target"
            raise UsageError(text, value=target, expected="a DmaTarget")
        return uninterrupted(self._attach, target, policy, max_mappings)

    def _attach(self, target: DmaTarget, policy: MappingPolicy, max_mappings: int | None) -> Mapper:
        run, mapper = self._guard.run, Mapper(target, policy, max_mappings)
        attachment = run("attach", Attachment, mapper, self._guard, self._places, self._attachments)
        try:
            while run("attach", next, attachment.batches, attachment) is not attachment:
                hand_over()
        except BaseException as error:
            run("attach", attachment.give_up, even_poisoned=True)
            if self._guard.poisoned and not isinstance(error, PoisonedError):
                raise self._guard.poisoned_error("attach") from error
            raise
        return mapper

    def detach(self, mapper: Mapper) -> None:
        """
        Unmap all that *mapper* mapped and stop watching; the target is not closed.

        On a poisoned memory it unmaps as much as can be unmapped and keeps the doubts.

        :raises UsageError: It is not attached here.
        """
        self._guard.run("detach", self._detach, mapper, even_poisoned=True)

    def _detach(self, mapper: Mapper) -> None:
        found = (entry for entry in self._attachments if entry.mapper is mapper and entry.complete)
        attachment = next(found, None)
        if attachment is None:
            raise UsageError(f"{mapper!r} is not attached here", value=mapper)
        attachment.leave_all()

    def convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        """
        Convert ``[gpa, gpa + size)``, which may span several blocks, in one transaction.

        :param gpa: In bytes, a multiple of the page size.
        :param size: In bytes, a multiple of the page size.
        :raises UsageError: Unaligned, empty, past 2**64, over a hole or over RAM without private
            backing.
        :raises ConversionError: A step failed, and every step was put back. The cause is chained.
            In place, an OSError with EAGAIN: somebody holds a page, and the guest may ask again.
        :raises KeyboardInterrupt: It came meanwhile and waited: the conversion is done, or put back
            with its error as the context.
        """
        return self._guard.run("convert", self._convert, gpa, size, to)

    def _convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        if to is not PageState.PRIVATE and to is not PageState.SHARED:
            check_state(to)
        # The look that check_range() begins with, to save a call; it has the words for the others.
        whole = type(gpa) is int and type(size) is int
        if not whole or gpa < 0 or not 0 < size <= ADDRESS_LIMIT - gpa or (gpa | size) % PAGE_SIZE:
            check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="conversion")
        map_calls = unmap_calls = 0
        for attachment in self._attachments:
            map_calls -= attachment.mapper.map_calls
            unmap_calls -= attachment.mapper.unmap_calls
        try:
            pieces = convert_pieces(self._guard, self._places, self._vm, gpa, size, to)
        except PoisonedError as error:
            _log.critical("%s: %s", error, describe_error(error.__cause__ or error))
            raise
        except ConversionError as error:
            self._log_failure("%s: %s", error, describe_error(error.__cause__ or error))
            raise
        changed = 0
        for piece in pieces:
            changed += piece.change.changed_bytes
            if self._guard.observer is not None:
                piece.attributes.observe(piece.change, piece.start, piece.end - piece.start)
        # Committed: freeing cannot be undone, and is not.
        not_freed = pieces[0].free() if len(pieces) == 1 else free_each(p.free for p in pieces)
        for attachment in self._attachments:
            map_calls += attachment.mapper.map_calls
            unmap_calls += attachment.mapper.unmap_calls
        account = (gpa, size, to, changed, map_calls, unmap_calls, not_freed)
        return new_tuple(ConversionResult, account)

    def __repr__(self) -> str:
        sections, targets = len(self.sections), len(self._attachments)
        state = ", poisoned" if self.poisoned else ""
        return f"<GuestMemory: {sections} sections, {targets} targets{state}>"
