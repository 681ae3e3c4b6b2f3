# SPDX-License-Identifier: Apache-2.0
"""
The discard manager of a block: joins its sources, tells its listeners (QEMU: system/ram-discard-manager.c, 11.1).

A page is populated when every source says so; without sources everything is. The manager keeps no copy of any source's
state: it asks, live, and by runs, so that a replay costs what is populated and not what the block is long. Where QEMU's
manager walks in steps of the smallest granularity, tells failures of a discard to nobody, and prints a failed replay, this
one asks for ranges, lets a listener refuse a discard, and puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from ramblock.errors import BusyError, UsageError
from ramblock.memory.membership import JOIN, LEAVE, Membership
from ramblock.memory.notification import Change, Notification, Registration, reserve
from ramblock.memory.protocols import Listener, Source
from ramblock.memory.runs import Runs, complement, intersect, merge_adjacent, populated_in
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Step, run_transaction
from ramblock.units import PAGE_SIZE, check_granularity, check_range

if TYPE_CHECKING:
    from ramblock.memory.block import RamBlock

__all__ = ["RamDiscardManager"]

_TELL = (Step("notify", Notification.tell, Notification.take_back),)


def _nothing() -> None:
    """For a source that does not want to hear when it is added or removed."""


class RamDiscardManager:
    """
    The sources and listeners of one block. Every block has one; user code does not build it.

    Changing calls take the memory's lock and raise :class:`~ramblock.errors.BusyError` when a listener or source calls
    back in, :class:`~ramblock.errors.PoisonedError` when the block is poisoned.
    """

    def __init__(self, block: RamBlock) -> None:
        self.block = block
        self._sources: tuple[Source, ...] = ()
        #: Who listens, in the order of registration. A tuple: what a notification iterates over never changes under it.
        self.registrations: tuple[Registration, ...] = ()

    # -- asking ---------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, oldest first."""
        return self._sources

    @property
    def min_granularity(self) -> int:
        """The smallest granularity of the sources, in bytes; without sources the host page size."""
        return min((source.granularity for source in self._sources), default=PAGE_SIZE)

    def is_populated(self, section: RamSection) -> bool:
        """
        Whether devices may use all of *section*.

        :raises UsageError: It belongs to another block.
        """
        self._check_block(section)
        return all(source.is_populated(section.offset, section.size) for source in self._sources)

    def populated(self, section: RamSection) -> Iterator[RamSection]:
        """
        Yield the maximal populated runs of *section*, ascending, clipped to it.

        Lazy: a conversion on another thread is seen page by page, before or after.

        :raises UsageError: It belongs to another block.
        """
        self._check_block(section)
        return (
            section.part(start, end)
            for start, end in self.populated_runs(section.offset, section.end)
        )

    def discarded(self, section: RamSection) -> Iterator[RamSection]:
        """Yield the maximal runs of *section* that are not populated; like :meth:`populated` otherwise."""
        self._check_block(section)
        runs = complement(
            self.populated_runs(section.offset, section.end), section.offset, section.end
        )
        return (section.part(start, end) for start, end in runs)

    def populated_runs(self, start: int, end: int) -> Runs:
        """Yield the joint populated runs inside [start, end) of the block, in bytes, as (start, end)."""
        runs: Runs = iter(((start, end),))
        for source in self._sources:
            runs = intersect(runs, source)
        return merge_adjacent(runs)

    def _check_block(self, section: RamSection) -> None:
        if section.block is not self.block:
            raise UsageError(
                f"{section!r} does not belong to block {self.block.name!r}",
                value=section,
                expected=self.block.name,
            )

    # -- sources --------------------------------------------------------------------------------------------------

    def add_source(self, source: Source) -> None:
        """
        Join *source*: what it does not call populated is discarded for the listeners. All or nothing.

        :raises BusyError: It is there already.
        :raises UsageError: Its granularity is not a power of two, or finer than a mapper's page size.
        :raises MappingLimitError: A mapper could not cut its mappings that often.
        :raises Exception: Whatever a listener raised when it refused; the source is not there and all is as before.
        """
        self.block.run("add_source", self.insert_source, source)

    def insert_source(self, source: Source) -> None:
        """:meth:`add_source`, for a caller that holds the lock."""
        if any(source is other for other in self._sources):
            raise BusyError(f"{source!r} is a source of block {self.block.name!r} already")
        check_granularity(source.granularity, f"source {source!r}")
        for registration in self.registrations:
            mapper = registration.budgeted
            if mapper is not None and source.granularity < mapper.granularity:
                raise UsageError(
                    f"source {source!r} can change {source.granularity:#x} bytes, less than a page of"
                    f" {mapper.granularity:#x} bytes of an attached target",
                    value=source.granularity,
                    expected=f"at least {mapper.granularity:#x}",
                )

        def newly_discarded(start: int, end: int) -> Runs:
            # The notification joins the sources that are there; so this says only what the new one lacks.
            return complement(populated_in(source, start, end), start, end)

        getattr(source, "on_adding", _nothing)()
        try:
            self._change_sources(
                newly_discarded, (*self._sources, source), populate=False, operation="add_source"
            )
        except BaseException:
            getattr(source, "on_removed", _nothing)()
            raise

    def remove_source(self, source: Source) -> None:
        """
        Take *source* out: what only it held back is populated for the listeners. All or nothing.

        :raises UsageError: It is not a source of this block, or it is the block's page attributes.
        :raises MappingLimitError: A mapper has no room for what becomes populated.
        :raises Exception: Whatever a listener raised when it refused; the source is still there and all is as before.
        """
        self.block.run("remove_source", self._remove_source, source)

    def _remove_source(self, source: Source) -> None:
        if not any(source is other for other in self._sources):
            raise UsageError(
                f"{source!r} is not a source of block {self.block.name!r}", value=source
            )
        if source is self.block.attributes:
            raise UsageError(
                f"the page attributes of block {self.block.name!r} cannot be removed",
                value=source,
            )

        def newly_populated(start: int, end: int) -> Runs:
            return complement(populated_in(source, start, end), start, end)

        remaining = tuple(other for other in self._sources if other is not source)
        self._change_sources(newly_populated, remaining, populate=True, operation="remove_source")
        getattr(source, "on_removed", _nothing)()

    def _change_sources(
        self,
        runs: Callable[[int, int], Runs],
        sources: tuple[Source, ...],
        *,
        populate: bool,
        operation: str,
    ) -> None:
        before = self._sources
        others = sources if populate else before
        change = Change(0, self.block.size, runs, hollow=False)
        notification = Notification(self, change, others, populate=populate)
        reserve((notification,))

        def replace(_: Notification) -> None:
            self._sources = sources

        def put_back(_: Notification) -> None:
            self._sources = before

        guard = self.block.guard
        failure = run_transaction(
            guard, (*_TELL, Step("sources", replace, put_back)), (notification,)
        )
        if failure is not None:
            failure.reraise(guard, operation)
        self.block.sides.both.keep_used(0, self.block.size)

    # -- what sources call ------------------------------------------------------------------------------------------

    def notify_populate(self, source: Source, offset: int, size: int) -> None:
        """
        *source* has just populated ``[offset, offset + size)``: tell the listeners where the other sources agree.

        The calling source is taken at its word.

        :raises UsageError: Unknown source, or a bad range.
        :raises Exception: Whatever a listener raised when it refused. Those told before it have heard the discard; the
            source takes its own change back.
        """
        self._notify(source, offset, size, populate=True)

    def notify_discard(self, source: Source, offset: int, size: int) -> None:
        """
        *source* has just discarded ``[offset, offset + size)``: tell the listeners what was populated until now.

        :raises UsageError: Unknown source, or a bad range.
        :raises Exception: Whatever a listener raised: it may still use the range. Those told before it were populated
            again; the source takes its own change back.
        """
        self._notify(source, offset, size, populate=False)

    def _notify(self, source: Source, offset: int, size: int, *, populate: bool) -> None:
        operation = "notify_populate" if populate else "notify_discard"
        work = partial(self._notify_locked, operation, populate=populate)
        self.block.run(operation, work, source, offset, size)

    def _notify_locked(
        self, operation: str, source: Source, offset: int, size: int, *, populate: bool
    ) -> None:
        if not any(source is other for other in self._sources):
            raise UsageError(
                f"{source!r} is not a source of block {self.block.name!r}", value=source
            )
        check_range(
            offset,
            size,
            limit=self.block.size,
            align=source.granularity,
            what=f"block {self.block.name!r}",
        )
        notification = self.notification(
            source, Change(offset, offset + size, None, hollow=True), populate=populate
        )
        reserve((notification,))
        guard = self.block.guard
        failure = run_transaction(guard, _TELL, (notification,))
        if failure is not None:
            failure.reraise(guard, operation)
        self.block.sides.both.keep_used(offset, size)

    def notification(self, source: Source, change: Change, *, populate: bool) -> Notification:
        """Build the notification of *change*, made by *source*; the lock is held by the caller."""
        sources = self._sources
        others = (
            () if len(sources) == 1 else tuple(other for other in sources if other is not source)
        )
        return Notification(self, change, others, populate=populate)

    # -- listeners ----------------------------------------------------------------------------------------------------

    def register_listener(self, listener: Listener, section: RamSection) -> None:
        """
        Register *listener* for *section* and replay to it what is populated there, run by run.

        :raises UsageError: It is registered already, or the section is another block's or not made of whole pages.
        :raises MappingLimitError: A mapper has no room for what is populated.
        :raises Exception: Whatever the listener raised when it refused; it has heard the discard of what it was told
            before, and is not registered.
        """
        self.block.run("register_listener", self._register, listener, section)

    def _register(self, listener: Listener, section: RamSection) -> None:
        membership = self.check_in(listener, section)
        reserve((membership.replay,))
        guard = self.block.guard
        failure = run_transaction(guard, JOIN, (membership,))
        if failure is not None:
            failure.reraise(guard, "register_listener")

    def check_in(self, listener: Listener, section: RamSection) -> Membership:
        """Check that *listener* may register for *section*; the lock is held by the caller."""
        self._check_block(section)
        if self._find(listener) is not None:
            raise UsageError(
                f"{listener!r} is registered already; one registration per listener", value=listener
            )
        check_range(
            section.offset,
            section.size,
            limit=self.block.size,
            align=PAGE_SIZE,
            what=f"section of {self.block.name!r}",
        )
        return Membership(self, Registration.of(listener, section))

    def unregister_listener(self, listener: Listener) -> None:
        """
        Unregister *listener*; it hears a discard of what it holds. All or nothing.

        :raises UsageError: It is not registered.
        :raises Exception: Whatever it raised: it may still use the range. It stays registered and holds all it held.
            On a poisoned block it goes all the same, and what it did not let go is in doubt.
        """
        # Only takes away, so it also works on a poisoned block: that is how a target is detached from one.
        self.block.run("unregister_listener", self._unregister, listener, even_poisoned=True)

    def _unregister(self, listener: Listener) -> None:
        guard = self.block.guard
        if guard.poisoned:
            # Nothing is put back on a poisoned block: that would make pages reachable.
            self.drop_listener(listener)
            return
        failure = run_transaction(guard, LEAVE, (self.membership(listener),))
        if failure is not None:
            failure.reraise(guard, "unregister_listener")

    def has_listener(self, listener: Listener) -> bool:
        """Whether *listener* is registered."""
        return self._find(listener) is not None

    def membership(self, listener: Listener) -> Membership:
        """Look up the membership of a registered *listener*; UsageError if there is none."""
        registration = self._find(listener)
        if registration is None:
            raise UsageError(
                f"{listener!r} is not registered with block {self.block.name!r}", value=listener
            )
        return Membership(self, registration)

    def dismiss(self, listener: Listener) -> None:
        """
        Unregister *listener* whatever it says; for closing. The lock is held by the caller.

        First like :meth:`unregister_listener`, so that Ctrl-C leaves everything as before; if it refuses, by force.

        :raises BaseException: Only an interrupt: everything is as before, or the block is poisoned.
        """
        guard = self.block.guard
        if not guard.poisoned:
            failure = run_transaction(guard, LEAVE, (self.membership(listener),))
            if failure is None:
                return
            if not isinstance(failure.cause, Exception) and not guard.poisoned:
                raise failure.cause
        guard.run_to_the_end(
            f"closing block {self.block.name!r}", partial(self.drop_listener, listener)
        )

    def drop_listener(self, listener: Listener) -> None:
        """
        Unregister *listener* by force; for closing and for poisoned blocks. The lock is held by the caller.

        What it refuses to let go is noted as in doubt, and poisons.
        """
        membership = self.membership(listener)
        membership.leave_regardless()
        membership.strike()

    def _find(self, listener: Listener) -> Registration | None:
        return next((entry for entry in self.registrations if entry.listener is listener), None)
