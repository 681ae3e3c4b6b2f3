# SPDX-License-Identifier: Apache-2.0
"""
The discard manager of a block: joins its sources, tells its listeners (QEMU:
system/ram-discard-manager.c, 11.1).

A page is populated when every source says so; without sources everything is. The manager keeps no copy
of any source's state: it asks, live, and by runs, so that a replay costs what is populated and not
the length of the block. Where QEMU's manager walks in steps of the smallest granularity, tells failures
of a discard to nobody, and prints a failed replay, this one asks for ranges, lets a listener refuse a
discard, and puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from ramblock.discard.coordination import DiscardHold
from ramblock.discard.guard import Guard, MovedError
from ramblock.discard.listeners import Listener
from ramblock.discard.notification import Notification, reserve
from ramblock.discard.registry import Registration, Registry
from ramblock.discard.section import Block, RamSection
from ramblock.discard.sources import Source, joint_runs, populated_in
from ramblock.discard.undo import UndoLog
from ramblock.errors import BusyError, UsageError
from ramblock.process import OfOneProcess
from ramblock.ranges import Runs, complement
from ramblock.units import PAGE_SIZE, check_granularity, check_range

__all__ = ["Freeing", "ManagedBlock", "RamDiscardManager"]

T = TypeVar("T")


class Freeing(Protocol):
    """Frees the memory of a block, on all its sides."""

    def free(self, offset: int, size: int) -> int:
        """Free what nobody uses any more; return the bytes that wait."""

    def keep_used(self, offset: int, size: int) -> None:
        """Note that what is in use of the range does not wait to be freed any more."""


class _NothingToFree:
    def free(self, offset: int, size: int) -> int:
        return 0

    def keep_used(self, offset: int, size: int) -> None:
        pass


def _nothing() -> None:
    """For a source that does not want to hear when it is added or removed."""


class RamDiscardManager(OfOneProcess):
    """
    The sources and listeners of one block. Every block has one; user code does not build it.

    Changing calls take the memory's lock and raise :class:`~ramblock.errors.BusyError` when a listener
    or source calls back in, :class:`~ramblock.errors.PoisonedError` when the block is poisoned.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        #: The lock that the block is under; placing the block changes it.
        self.guard = Guard()
        #: Claims on discards that go with the block.
        self.holds: list[DiscardHold] = []
        self.freeing: Freeing = _NothingToFree()
        self.closed = False
        #: The sources, oldest first. Callers change them by the methods below.
        self.sources: tuple[Source, ...] = ()
        self.registry = Registry()

    def run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
    ) -> T:
        """
        Call ``work(*arguments)`` under the lock that the block is under.

        :raises BusyError: A listener called back in.
        :raises PoisonedError: Unless *even_poisoned*.
        :raises UsageError: In a fork. In each case nothing was called.
        """
        while True:
            try:
                return self.guard.run(
                    operation, work, *arguments, even_poisoned=even_poisoned, home=self
                )
            except MovedError:
                pass

    def check_open(self) -> None:
        """Raise :class:`UsageError` if the block is closed."""
        if self.closed:
            raise UsageError(f"block {self.block.name!r} is closed", value=self.block.name)

    # -- asking -----------------------------------------------------------------------------------

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """Who listens, in the order of registration."""
        return tuple(self.registry)

    @property
    def min_granularity(self) -> int:
        """The smallest granularity of the sources, in bytes; without any the host page size."""
        return min((source.granularity for source in self.sources), default=PAGE_SIZE)

    def is_populated(self, section: RamSection) -> bool:
        """
        Whether devices may use all of *section*.

        :raises UsageError: It belongs to another block.
        """
        self._check_block(section)
        return all(source.is_populated(section.offset, section.size) for source in self.sources)

    def populated(self, section: RamSection) -> Iterator[RamSection]:
        """
        Yield the maximal populated runs of *section*, ascending, clipped to it.

        Lazy: a conversion on another thread is seen page by page, before or after.

        :raises UsageError: It belongs to another block.
        """
        self._check_block(section)
        return (section.part(start, end) for start, end in self._runs(section))

    def discarded(self, section: RamSection) -> Iterator[RamSection]:
        """Yield the maximal runs of *section* that are not populated; else like :meth:`populated`."""
        self._check_block(section)
        runs = complement(self._runs(section), section.offset, section.end)
        return (section.part(start, end) for start, end in runs)

    def _runs(self, section: RamSection) -> Runs:
        return joint_runs(iter(((section.offset, section.end),)), self.sources)

    def _check_block(self, section: RamSection) -> None:
        if section.block is not self.block:
            raise UsageError(
                f"{section!r} does not belong to block {self.block.name!r}",
                value=section,
                expected=self.block.name,
            )

    # -- sources ----------------------------------------------------------------------------------

    def add_source(self, source: Source) -> None:
        """
        Join *source*: what it does not call populated is discarded for the listeners. All or nothing.

        Memory that it withholds from the guest (virtio-mem) is freed.

        :raises BusyError: It is there already.
        :raises UsageError: Its granularity is not a power of two, or finer than a mapper's page size.
        :raises MappingLimitError: A mapper could not cut its mappings that often.
        :raises Exception: Whatever a listener raised when it refused; the source is not there and all
            is as before.
        """
        self.run("add_source", self._add_source, source)

    def _add_source(self, source: Source) -> None:
        self.check_open()
        if self._has(source):
            raise BusyError(f"{source!r} is a source of block {self.block.name!r} already")
        check_granularity(source.granularity, f"source {source!r}")
        for registration in self.registry:
            mapper = registration.budgeted
            if mapper is not None and source.granularity < mapper.granularity:
                raise UsageError(
                    f"source {source!r} can change {source.granularity:#x} bytes, less than a page"
                    f" of {mapper.granularity:#x} bytes of an attached target",
                    value=source.granularity,
                    expected=f"at least {mapper.granularity:#x}",
                )
        getattr(source, "on_adding", _nothing)()
        try:
            self._change_sources(source, (*self.sources, source), "add_source")
        except BaseException:
            getattr(source, "on_removed", _nothing)()
            raise
        if getattr(source, "withholds", False):
            size = self.block.size
            for start, end in complement(populated_in(source, 0, size), 0, size):
                self.freeing.free(start, end - start)

    def remove_source(self, source: Source) -> None:
        """
        Take *source* out: what only it held back is populated for the listeners. All or nothing.

        :raises UsageError: It is not a source of this block, or it is the block's page attributes.
        :raises MappingLimitError: A mapper has no room for what becomes populated.
        :raises Exception: Whatever a listener raised when it refused; the source is still there and
            all is as before.
        """
        self.run("remove_source", self._remove_source, source)

    def _remove_source(self, source: Source) -> None:
        self.check_open()
        self._check_source(source)
        if getattr(source, "permanent", False):
            raise UsageError(
                f"the page attributes of block {self.block.name!r} cannot be removed", value=source
            )
        remaining = tuple(other for other in self.sources if other is not source)
        self._change_sources(source, remaining, "remove_source")
        getattr(source, "on_removed", _nothing)()

    def _change_sources(
        self, source: Source, sources: tuple[Source, ...], operation: str
    ) -> None:
        """Make *sources* the sources, of which *source* is a new one or no longer one."""

        def held_back(start: int, end: int) -> Runs:
            return complement(populated_in(source, start, end), start, end)

        populate = len(sources) < len(self.sources)
        size = self.block.size
        notification = Notification(
            self,
            0,
            size,
            populate=populate,
            source=source if populate else None,
            runs=held_back,
            hollow=False,
        )
        reserve((notification,))
        with UndoLog(self.guard, operation) as undo:
            undo.do("notify", notification.tell, notification.take_back)
        self.sources = sources
        self.freeing.keep_used(0, size)

    def _has(self, source: Source) -> bool:
        return any(source is other for other in self.sources)

    def _check_source(self, source: Source) -> None:
        if not self._has(source):
            raise UsageError(
                f"{source!r} is not a source of block {self.block.name!r}", value=source
            )

    # -- what sources call --------------------------------------------------------------------------

    def notify_populate(self, source: Source, offset: int, size: int) -> None:
        """
        *source* has just populated ``[offset, offset + size)``: tell the listeners where the others
        agree. The calling source is taken at its word.

        :raises UsageError: Unknown source, or a bad range.
        :raises Exception: Whatever a listener raised when it refused. Those told before it have heard
            the discard; the source takes its own change back.
        """
        self.run("notify_populate", self._notify, source, offset, size, True)  # noqa: FBT003

    def notify_discard(self, source: Source, offset: int, size: int) -> None:
        """
        *source* has just discarded ``[offset, offset + size)``: tell the listeners what was populated
        until now.

        :raises UsageError: Unknown source, or a bad range.
        :raises Exception: Whatever a listener raised: it may still use the range. Those told before
            it were populated again; the source takes its own change back.
        """
        self.run("notify_discard", self._notify, source, offset, size, False)  # noqa: FBT003

    def _notify(self, source: Source, offset: int, size: int, populate: bool) -> None:  # noqa: FBT001
        self.check_open()
        self._check_source(source)
        what = f"block {self.block.name!r}"
        check_range(offset, size, limit=self.block.size, align=source.granularity, what=what)
        notification = Notification(self, offset, offset + size, populate=populate, source=source)
        reserve((notification,))
        with UndoLog(self.guard, "notify_populate" if populate else "notify_discard") as undo:
            undo.do("notify", notification.tell, notification.take_back)
        self.freeing.keep_used(offset, size)

    # -- listeners ----------------------------------------------------------------------------------

    def register_listener(self, listener: Listener, section: RamSection) -> None:
        """
        Register *listener* for *section* and replay to it what is populated there, run by run.

        :raises UsageError: It is registered already, or the section is another block's or not made of
            whole pages.
        :raises MappingLimitError: A mapper has no room for what is populated.
        :raises Exception: Whatever the listener raised when it refused; it has heard the discard of
            what it was told before, and is not registered.
        """
        self.run("register_listener", self._register, listener, section)

    def _register(self, listener: Listener, section: RamSection) -> None:
        self.check_open()
        registration = self.check_in(listener, section)
        replay = self.replay(registration)
        reserve((replay,))
        with UndoLog(self.guard, "register_listener") as undo:
            self.join(undo, registration, replay)

    def unregister_listener(self, listener: Listener) -> None:
        """
        Unregister *listener*; it hears a discard of what it holds. All or nothing.

        :raises UsageError: It is not registered.
        :raises Exception: Whatever it raised: it may still use the range. It stays registered and
            holds all it held. On a poisoned block it goes all the same, and what it did not let go is
            in doubt.
        """
        # Only takes away, so it also works on a poisoned block: that is how a target is detached
        # from one.
        self.run("unregister_listener", self._unregister, listener, even_poisoned=True)

    def _unregister(self, listener: Listener) -> None:
        self.check_open()
        registration = self.registry.find(listener)
        if registration is None:
            raise UsageError(
                f"{listener!r} is not registered with block {self.block.name!r}", value=listener
            )
        if self.guard.poisoned:
            # Nothing is put back on a poisoned block: that would make pages reachable.
            self.leave_regardless(registration)
            return
        with UndoLog(self.guard, "unregister_listener") as undo:
            self.leave(undo, registration)

    def dismiss_all(self) -> None:
        """Unregister every listener for closing; one that refuses is made to go."""
        for registration in self.registry:
            if not self.guard.poisoned:
                undo = UndoLog(self.guard, "close")
                try:
                    self.leave(undo, registration)
                except BaseException:
                    undo.put_back()
                else:
                    continue
            self.leave_regardless(registration)

    # -- parts of operations; the caller holds the lock -----------------------------------------------

    def check_in(self, listener: Listener, section: RamSection) -> Registration:
        """
        Check that *listener* may register for *section*; it is not registered by that.

        :raises UsageError: As :meth:`register_listener`.
        """
        self._check_block(section)
        if self.registry.find(listener) is not None:
            raise UsageError(
                f"{listener!r} is registered already; one registration per listener", value=listener
            )
        what = f"section of {self.block.name!r}"
        check_range(
            section.offset, section.size, limit=self.block.size, align=PAGE_SIZE, what=what
        )
        return self.registry.make(listener, section)

    def find(self, listener: Listener) -> Registration | None:
        """Look up the registration of *listener*, if it has one."""
        return self.registry.find(listener)

    def registration(self, listener: Listener, section: RamSection) -> Registration:
        """Make the registration of a listener that is on no list, and put it on none."""
        return self.registry.make(listener, section)

    def replay(self, registration: Registration) -> Notification:
        """Build what tells one listener, registered or not, all that is populated."""
        return self._alone(registration, populate=True)

    def _alone(self, registration: Registration, *, populate: bool) -> Notification:
        start, end = registration.section.offset, registration.section.end
        return Notification(self, start, end, populate=populate, only=registration)

    def join(
        self,
        undo: UndoLog,
        registration: Registration,
        replay: Notification,
        *,
        before: Registration | None = None,
        piece: object = None,
    ) -> None:
        """
        Replay to the listener, and put it on the list.

        :param before: Its registration until now, for a part of the section; None: it has none.
        """
        unjoin = partial(self._unjoin, registration, replay, before)
        undo.do("map", replay.tell, unjoin, piece=piece)
        self.registry.add(registration)

    def _unjoin(
        self, registration: Registration, replay: Notification, before: Registration | None
    ) -> None:
        try:
            replay.take_back()
        except BaseException:
            self.registry.discard(registration.listener)
            if registration.budgeted is not None:
                # It may still hold something, and can let go of all of it: it stays on the list,
                # for closing to tell it.
                self.registry.add(registration)
            raise
        if before is not None:
            self.registry.add(before)
        else:
            self.registry.discard(registration.listener)

    def leave(self, undo: UndoLog, registration: Registration, *, piece: object = None) -> None:
        """Tell the listener the discard of all it holds, and take it off the list."""
        farewell = self._alone(registration, populate=False)
        rejoin = partial(self._rejoin, registration, farewell)
        undo.do("unmap", farewell.tell, rejoin, piece=piece)
        self.registry.discard(registration.listener)

    def _rejoin(self, registration: Registration, farewell: Notification) -> None:
        self.registry.add(registration)
        farewell.take_back()

    def leave_regardless(self, registration: Registration) -> None:
        """Make the listener leave, registered or not; what it does not let go of is in doubt."""
        self._alone(registration, populate=False).tell_regardless()
        self.registry.discard(registration.listener)

    def keep(self, registration: Registration) -> None:
        """Put a listener back on the list that may still hold something."""
        self.registry.add(registration)

    def stay_in_doubt(self, registration: Registration, reason: str) -> None:
        """Put the listener back on the list, and tell it nothing: what it left is in doubt."""
        self.registry.add(registration)
        self._alone(registration, populate=False).doubt(reason)


class ManagedBlock(Block, Protocol):
    """A block with its discard manager, as a source of ours needs it."""

    @property
    def discard_manager(self) -> RamDiscardManager:
        """Its manager."""
