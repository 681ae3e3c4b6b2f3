# SPDX-License-Identifier: Apache-2.0
"""A guest's memory: where its blocks are, which devices see it, and the conversion of its pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, MappingPolicy
from ramblock.errors import (
    BusyError,
    ConversionError,
    ConversionInterrupted,
    PoisonedError,
    UsageError,
    describe_range,
)
from ramblock.events import Observer
from ramblock.guest.attachment import ATTACH, DETACH, Attachment
from ramblock.guest.conversion import STEPS, ConversionPiece, ConversionResult, free_unused
from ramblock.guest.placement import CLOSE, PLACE, REMOVE, PlacedSection
from ramblock.guest.sections import SectionMap
from ramblock.guest.vm import NoVm, Vm
from ramblock.logs import Sparingly
from ramblock.memory.attributes import PageState, check_state
from ramblock.memory.block import RamBlock
from ramblock.memory.coordination import DiscardCoordinator, DiscardHold
from ramblock.memory.guard import Guard, InDoubt, Moved
from ramblock.memory.notification import reserve
from ramblock.memory.runs import merge_adjacent
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Failure, Step, run_transaction
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_positive, check_range

__all__ = ["GuestMemory"]

_log = logging.getLogger(__name__)

P = TypeVar("P")
T = TypeVar("T")


def _check_unplaced(block: RamBlock) -> None:
    if block.placement is not None:
        raise UsageError(f"block {block.name!r} is in another guest memory already", value=block)
    if block.closed:
        raise UsageError(f"block {block.name!r} is closed", value=block)


class GuestMemory:
    """
    The memory of one guest.

    :param vm: What sets page attributes (and, where it has them, memory slots); None: they are only tracked.

    Every changing call takes the one lock of this memory, and raises :class:`~ramblock.errors.BusyError` when a listener,
    target or VM calls back in.
    """

    def __init__(self, vm: Vm | None = None) -> None:
        self._vm: Vm = NoVm() if vm is None else vm
        self._guard = Guard()
        self._sections = SectionMap()
        self._attachments: list[Attachment] = []
        self._log_failure = Sparingly(_log)
        # What each block's own guard held when it came here, by the block's id.
        self._adopted: dict[int, list[DiscardHold]] = {}

    # -- asking ---------------------------------------------------------------------------------------------------

    @property
    def sections(self) -> tuple[RamSection, ...]:
        """Where blocks appear, ascending by guest address."""
        return tuple(self._sections)

    @property
    def mappers(self) -> tuple[Mapper, ...]:
        """What is attached, oldest first."""
        return tuple(attachment.mapper for attachment in self._attachments)

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
        section = self._sections.pieces(gpa, 1)[0]
        attributes = section.block.attributes
        if attributes is None or attributes.is_populated(section.offset, 1):
            return PageState.SHARED
        return PageState.PRIVATE

    def ranges(self, state: PageState) -> Iterator[tuple[int, int]]:
        """
        Yield the maximal runs of pages in *state* as (gpa, size), ascending, across blocks. Holes are in neither state.

        Lazy: a conversion on another thread is seen page by page, before or after.

        :raises UsageError: Not a page state.
        """
        check_state(state)
        return ((start, end - start) for start, end in merge_adjacent(self._runs(state)))

    def _runs(self, state: PageState) -> Iterator[tuple[int, int]]:
        shared = state is PageState.SHARED
        for section in self._sections:
            attributes = section.block.attributes
            if attributes is None:
                if shared:
                    yield section.gpa, section.gpa_end
                continue
            shift = section.gpa - section.offset
            first, last = section.offset // PAGE_SIZE, section.end // PAGE_SIZE
            for start, end in attributes.bits.runs(first, last, value=shared):
                yield start * PAGE_SIZE + shift, end * PAGE_SIZE + shift

    # -- placing blocks ---------------------------------------------------------------------------------------------

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

        The attributes of a block with private backing are set before the guest can see it (its memory slot), so there
        is no instant at which the guest could run with pages shared that are tracked as private. Then each attached
        target maps what is populated.

        :param gpa: In bytes, a multiple of the page size.
        :param offset: In the block, in bytes, a multiple of the page size.
        :param size: In bytes; None: to the end of the block.
        :param readonly: Devices may not write to it.
        :raises UsageError: Unaligned, outside the block or the address space, overlapping another section in guest
            addresses or (with private backing) in the block, or the block is closed or in another memory; nothing has
            changed.
        :raises BusyError: The block's users and this memory's contradict each other about discards; nothing has changed.
        :raises MappingLimitError: A mapper has no room for it; nothing has changed.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This memory or the block is poisoned, or this call poisoned it.
        """
        if not isinstance(block, RamBlock):
            raise UsageError(f"{block!r} is not a RAM block", value=block, expected="a RamBlock")
        what = f"block {block.name!r}"
        length = size
        if length is None:
            check_range(offset, 1, limit=block.size, align=1, what=what)
            length = block.size - offset
        check_range(offset, length, limit=block.size, align=PAGE_SIZE, what=what)
        check_range(gpa, length, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="guest addresses")
        section = RamSection(block, offset, length, gpa, readonly)
        if block.placement is not None and block.placement is not self:
            # Before our lock is taken: two memories that each try the other's block would wait forever.
            block.placement.release_unplaced(block)
        self._run("map", self._map, section)
        return section

    def _map(self, section: RamSection) -> None:
        block = section.block
        self._sections.check_free(section)
        try:
            self._adopt(block)
            self._place(section)
        except BaseException:
            self._release_unplaced(block)
            raise

    def unmap(self, section: RamSection) -> None:
        """
        Take *section* out of the guest: unmapped in every target, then the slot, then the attributes. All or nothing.

        On a poisoned memory it does what can be done and keeps the doubts.

        :raises UsageError: It is not a section of this memory.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This call poisoned the memory.
        """
        self._run("unmap", self._unmap, section, even_poisoned=True)

    def _unmap(self, section: RamSection) -> None:
        if section not in self._sections:
            raise UsageError(f"{section!r} is not mapped here", value=section)
        placed = self._placed(section)
        if self._guard.poisoned:
            placed.force_out(poisoned=True)
        else:
            placed.gather()
            self._transact(REMOVE, (placed,), "unmap")
            placed.abandon()
        self._release_unplaced(section.block)

    def release_unplaced(self, block: RamBlock) -> None:
        """Let *block* go if it has no section here any more (an unmap was interrupted at its very end)."""
        self._run("map", self._release_unplaced, block, even_poisoned=True)

    def _release_unplaced(self, block: RamBlock) -> None:
        if block.placement is self and not self._sections.of_block(block):
            self._release(block)

    def forget(self, block: RamBlock) -> None:
        """
        Take out every section of *block*, whatever listeners say. For ``RamBlock.close``, which holds the lock.

        First the way :meth:`unmap` does it, which Ctrl-C can interrupt and everything is as before. Where somebody refuses,
        by force.

        :raises BaseException: Only an interrupt: everything is as before, or the memory is poisoned.
        """
        guard = self._guard
        placed = [self._placed(section) for section in self._sections.of_block(block)]
        if not guard.poisoned and placed:
            for each in placed:
                each.gather()
            failure = run_transaction(guard, CLOSE, placed)
            if failure is None:
                for each in placed:
                    each.abandon()
                placed = []
            elif not isinstance(failure.cause, Exception) and not guard.poisoned:
                raise failure.cause
        for each in placed:
            force_out = partial(each.force_out, poisoned=guard.poisoned)
            guard.run_to_the_end(f"closing block {block.name!r}", force_out)
        # The block keeps this guard: its doubts are noted here.
        self._adopted.pop(id(block), None)
        block.placement = None

    def _placed(self, section: RamSection) -> PlacedSection:
        return PlacedSection(self._vm, self._sections, section, self._attachments)

    def _place(self, section: RamSection) -> None:
        placed = self._placed(section)
        try:
            placed.prepare()
            self._transact(PLACE, (placed,), "map")
        except BaseException:
            if not self._guard.poisoned:
                placed.abandon()
            raise

    def _adopt(self, block: RamBlock) -> None:
        """Bring *block* under this memory's lock, if it is not there."""
        if block.placement is self:
            return
        _check_unplaced(block)
        # Its own guard is taken inside ours. Nobody takes them the other way round: a block's own guard knows no memory.
        moved = block.guard.run("map", self._adopt_under, block, home=block)
        if isinstance(moved, Moved):
            raise BusyError(f"block {block.name!r} is being placed by somebody else")

    def _adopt_under(self, block: RamBlock) -> None:
        _check_unplaced(block)
        self._adopted[id(block)] = self._guard.adopt(block.guard)
        block.placement = self
        block.guard = self._guard

    def _release(self, block: RamBlock) -> None:
        """Give *block* a guard of its own again."""
        guard = Guard()
        holds = [*self._adopted.pop(id(block), ()), *block.holds]
        self._guard.leave_with(guard, block, holds)
        block.placement = None
        block.guard = guard

    # -- devices ----------------------------------------------------------------------------------------------------

    def attach(
        self,
        target: DmaTarget,
        policy: MappingPolicy = MappingPolicy.AUTO,
        *,
        max_mappings: int | None = None,
    ) -> Mapper:
        """
        Keep *target* in step from now on: it maps what is populated. All or nothing.

        :param max_mappings: The operator's budget; the smaller of it and the target's counts.
        :return: What watches over it; hand it to :meth:`detach`.
        :raises UsageError: RUN on a target that cannot cut, page size above a block's granularity, a section outside its
            IOVA ranges, or attached here already; nothing has changed.
        :raises BusyError: Somebody needs uncoordinated discards; nothing has changed.
        :raises MappingLimitError: No room for what is populated; nothing has changed.
        :raises DmaError: The target refused; what it had mapped is unmapped again.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it.
        """
        if max_mappings is not None:
            check_positive(max_mappings, "max_mappings")
        if not hasattr(target, "capabilities"):
            raise UsageError(
                f"{target!r} is not a DMA target", value=target, expected="a DmaTarget"
            )
        return self._run("attach", self._attach, target, policy, max_mappings)

    def _attach(self, target: DmaTarget, policy: MappingPolicy, max_mappings: int | None) -> Mapper:
        if any(attachment.mapper.target is target for attachment in self._attachments):
            raise UsageError(f"{target!r} is attached already", value=target)
        mapper = Mapper(target, policy, max_mappings)
        hold = self._guard.discards.forbid_uncoordinated(f"DMA mapper of {target!r}")
        attachment = Attachment(self._attachments, mapper, hold, self._guard.doubt)
        try:
            attachment.prepare(self._sections)
            attachment.hold_blocks()
            self._transact(ATTACH, (attachment,), "attach")
        except BaseException:
            hold.release()
            if not self._guard.poisoned:
                attachment.let_blocks_go()
            raise
        return mapper

    def detach(self, mapper: Mapper) -> None:
        """
        Unmap all that *mapper* mapped and stop watching; the target is not closed. All or nothing.

        On a poisoned memory it unmaps what can be unmapped and keeps the doubts.

        :raises UsageError: It is not attached here.
        :raises DmaError: The target refused; everything is mapped as before and *mapper* is still attached.
        :raises PoisonedError: This call poisoned the memory.
        """
        self._run("detach", self._detach, mapper, even_poisoned=True)

    def _detach(self, mapper: Mapper) -> None:
        attachment = next((entry for entry in self._attachments if entry.mapper is mapper), None)
        if attachment is None:
            raise UsageError(f"{mapper!r} is not attached here", value=mapper)
        if self._guard.poisoned:
            attachment.force_out()
        else:
            attachment.gather()
            self._transact(DETACH, (attachment,), "detach")
            attachment.let_blocks_go()
        attachment.hold.release()

    def _run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
    ) -> T:
        """Call ``work(*arguments)`` with the lock held."""
        result = self._guard.run(operation, work, *arguments, even_poisoned=even_poisoned)
        assert not isinstance(result, Moved)  # a memory keeps its guard
        return result

    def _transact(self, steps: Sequence[Step[P]], pieces: Sequence[P], operation: str) -> None:
        failure = run_transaction(self._guard, steps, pieces)
        if failure is not None:
            failure.reraise(self._guard, operation)

    # -- conversion -------------------------------------------------------------------------------------------------

    def convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        """
        Convert ``[gpa, gpa + size)``, which may span several blocks, in one transaction.

        :param gpa: In bytes, a multiple of the page size.
        :param size: In bytes, a multiple of the page size.
        :raises UsageError: Unaligned, empty, past 2**64, over a hole or over RAM without private backing; nothing has
            changed.
        :raises MappingLimitError: A budget does not hold for it and its undo; nothing has changed.
        :raises ConversionError: A step failed, and every step was put back: nothing has changed. The cause is chained. In
            place, an OSError with EAGAIN: somebody holds a page, and the guest may ask again later. Interrupted by Ctrl-C: :class:`~ramblock.errors.ConversionInterrupted`.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it: see :meth:`in_doubt`.
        :raises KeyboardInterrupt: While freeing; the conversion is done then.
        """
        return self._run("convert", self._convert, gpa, size, to)

    def _convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        check_state(to)
        check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="conversion")
        pieces = self._plan(gpa, size, to)
        calls = self._calls()
        if pieces:
            failure = run_transaction(self._guard, STEPS[to], pieces)
            if failure is not None:
                self._raise_failure(failure, gpa, size, to)
        for piece in pieces:
            piece.attributes.observe(piece.change, piece.section.offset, piece.section.size)
        not_freed = free_unused(pieces)
        changed = sum(piece.change.changed_bytes for piece in pieces)
        map_calls, unmap_calls = self._calls()
        return ConversionResult(
            gpa, size, to, changed, map_calls - calls[0], unmap_calls - calls[1], not_freed
        )

    def _plan(self, gpa: int, size: int, to: PageState) -> list[ConversionPiece]:
        """List the pieces in which something changes, checked against the budgets."""
        pieces = []
        for section in self._sections.pieces(gpa, size):
            attributes = section.block.attributes
            if attributes is None:
                raise UsageError(
                    f"{describe_range(gpa, size)}: block {section.block.name!r} at {section.gpa:#x} has no private backing",
                    value=section.gpa,
                    expected="RAM with private backing",
                )
            pieces.append(ConversionPiece(section, attributes, to, self._vm))
        pieces = [piece for piece in pieces if piece.change.notification is not None]
        if self._attachments:
            reserve(
                piece.change.notification
                for piece in pieces
                if piece.change.notification is not None
            )
        return pieces

    def _calls(self) -> tuple[int, int]:
        map_calls = unmap_calls = 0
        for attachment in self._attachments:
            map_calls += attachment.mapper.map_calls
            unmap_calls += attachment.mapper.unmap_calls
        return map_calls, unmap_calls

    def _raise_failure(
        self, failure: Failure[ConversionPiece], gpa: int, size: int, to: PageState
    ) -> NoReturn:
        cause = failure.cause
        notification = failure.piece.change.notification
        target = None if notification is None else notification.refused_by
        where = f"conversion of {describe_range(gpa, size)} to {to.value}: step {failure.step!r}"
        if target is not None:
            where += f" on {target!r}"
        kind: type[ConversionError] = ConversionError
        if self._guard.poisoned:
            kind = PoisonedError
            text = f"{where} failed and could not be put back; see in_doubt()"
        elif isinstance(cause, KeyboardInterrupt):
            kind = ConversionInterrupted
            text = f"{where} was interrupted; nothing has changed"
        elif not isinstance(cause, Exception):
            cause.add_note(f"{where} was left by it; nothing has changed")
            raise cause
        else:
            text = f"{where} failed; nothing has changed"
        if kind is PoisonedError:
            _log.critical("%s: %r", text, cause)
        else:
            self._log_failure("%s: %r", text, cause)
        raise kind(text, gpa=gpa, size=size, to=to, step=failure.step, target=target) from cause

    def __repr__(self) -> str:
        state = ", poisoned" if self.poisoned else ""
        return (
            f"<GuestMemory: {len(self.sections)} sections, {len(self._attachments)} targets{state}>"
        )
