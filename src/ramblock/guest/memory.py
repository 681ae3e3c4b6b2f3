# SPDX-License-Identifier: Apache-2.0
"""A guest's memory: where its blocks are, which devices see it, and the conversion of its pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, MappingPolicy
from ramblock.errors import (
    ConversionError,
    ConversionInterrupted,
    PoisonedError,
    UsageError,
    describe_range,
)
from ramblock.events import Observer
from ramblock.guest.attachment import ATTACH, DETACH, Attachment
from ramblock.guest.conversion import STEPS, ConversionPiece, ConversionResult, free_unused
from ramblock.guest.placement import PLACE, REMOVE, PlacedSection
from ramblock.guest.sections import SectionMap
from ramblock.guest.vm import NoVm, Vm
from ramblock.memory.attributes import PageState, check_state
from ramblock.memory.block import RamBlock
from ramblock.memory.coordination import DiscardCoordinator
from ramblock.memory.guard import Guard, InDoubt
from ramblock.memory.notification import reserve
from ramblock.memory.runs import merge_adjacent
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Failure, Step, run_transaction
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_range

__all__ = ["GuestMemory"]

_log = logging.getLogger(__name__)

P = TypeVar("P")


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
            addresses or (with private backing) in the block, or the block is in another memory; nothing has changed.
        :raises BusyError: The block's users and this memory's contradict each other about discards; nothing has changed.
        :raises MappingLimitError: A mapper has no room for it; nothing has changed.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This memory or the block is poisoned, or this call poisoned it.
        """
        length = block.size - offset if size is None else size
        check_range(offset, length, limit=block.size, align=PAGE_SIZE, what=f"block {block.name!r}")
        check_range(gpa, length, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="guest addresses")
        section = RamSection(block, offset, length, gpa, readonly)
        with self._guard.entered("map"):
            self._sections.check_free(section)
            adopted = self._adopt(block)
            try:
                self._place(section)
            except BaseException:
                if adopted:
                    self._release(block)
                raise
        return section

    def unmap(self, section: RamSection) -> None:
        """
        Take *section* out of the guest: unmapped in every target, then the slot, then the attributes. All or nothing.

        On a poisoned memory it does what can be done and keeps the doubts.

        :raises UsageError: It is not a section of this memory.
        :raises OSError: The VM or a target refused; everything is as before.
        :raises PoisonedError: This call poisoned the memory.
        """
        with self._guard.entered("unmap", even_poisoned=True):
            if section not in self._sections:
                raise UsageError(f"{section!r} is not mapped here", value=section)
            placed = self._placed(section)
            if self._guard.poisoned:
                placed.force_out(poisoned=True)
            else:
                placed.gather()
                self._run(REMOVE, (placed,), "unmap")
                placed.abandon()
            if not self._sections.of_block(section.block):
                self._release(section.block)

    def forget(self, block: RamBlock) -> None:
        """Drop every section of *block*, whatever listeners say. For ``RamBlock.close``, which holds the lock."""
        for section in self._sections.of_block(block):
            self._placed(section).force_out(poisoned=self._guard.poisoned)
        # The block keeps this guard: its doubts are noted here.
        block.placement = None

    def _placed(self, section: RamSection) -> PlacedSection:
        return PlacedSection(self._vm, self._sections, section, self._attachments)

    def _place(self, section: RamSection) -> None:
        placed = self._placed(section)
        try:
            placed.prepare()
            self._run(PLACE, (placed,), "map")
        except BaseException:
            if not self._guard.poisoned:
                placed.abandon()
            raise

    def _adopt(self, block: RamBlock) -> bool:
        """Bring *block* under this memory's lock; whether it was not before."""
        if block.placement is self:
            return False
        if block.placement is not None:
            # Looked at before its lock is taken: two memories that each try the other's block would wait forever.
            raise UsageError(
                f"block {block.name!r} is in another guest memory already", value=block
            )
        own = block.enter("map")
        try:
            self._guard.adopt(own)
            block.guard = self._guard
            block.placement = self
        finally:
            own.leave()
        return True

    def _release(self, block: RamBlock) -> None:
        """Give *block* a guard of its own again."""
        guard = Guard()
        guard.take_over(self._guard, block, block.holds)
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
        if max_mappings is not None and max_mappings <= 0:
            raise UsageError(
                f"max_mappings {max_mappings} is not positive",
                value=max_mappings,
                expected="at least 1",
            )
        with self._guard.entered("attach"):
            if any(attachment.mapper.target is target for attachment in self._attachments):
                raise UsageError(f"{target!r} is attached already", value=target)
            mapper = Mapper(target, policy, max_mappings)
            hold = self._guard.discards.forbid_uncoordinated(f"DMA mapper of {target!r}")
            attachment = Attachment(self._attachments, mapper, hold, self._guard.doubt)
            try:
                attachment.prepare(self._sections)
                self._run(ATTACH, (attachment,), "attach")
            except BaseException:
                hold.release()
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
        with self._guard.entered("detach", even_poisoned=True):
            attachment = next(
                (entry for entry in self._attachments if entry.mapper is mapper), None
            )
            if attachment is None:
                raise UsageError(f"{mapper!r} is not attached here", value=mapper)
            if self._guard.poisoned:
                attachment.force_out()
            else:
                attachment.gather()
                self._run(DETACH, (attachment,), "detach")
            attachment.hold.release()

    def _run(self, steps: Sequence[Step[P]], pieces: Sequence[P], operation: str) -> None:
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
        :raises ConversionError: A step failed, and every step was put back: nothing has changed. The cause is chained.
            Interrupted by Ctrl-C: :class:`~ramblock.errors.ConversionInterrupted`.
        :raises PoisonedError: This memory is poisoned, or this call poisoned it: see :meth:`in_doubt`.
        :raises KeyboardInterrupt: While freeing; the conversion is done then.
        """
        guard = self._guard
        guard.enter("convert")
        try:
            check_state(to)
            check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="conversion")
            pieces = self._plan(gpa, size, to)
            calls = self._calls()
            if pieces:
                failure = run_transaction(guard, STEPS[to], pieces)
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
        finally:
            guard.leave()

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
        mappers = [attachment.mapper for attachment in self._attachments]
        return sum(mapper.map_calls for mapper in mappers), sum(
            mapper.unmap_calls for mapper in mappers
        )

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
        _log.log(
            logging.CRITICAL if kind is PoisonedError else logging.WARNING, "%s: %r", text, cause
        )
        raise kind(text, gpa=gpa, size=size, to=to, step=failure.step, target=target) from cause

    def __repr__(self) -> str:
        state = ", poisoned" if self.poisoned else ""
        return (
            f"<GuestMemory: {len(self.sections)} sections, {len(self._attachments)} targets{state}>"
        )
