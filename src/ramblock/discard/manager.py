# SPDX-License-Identifier: Apache-2.0
"""
The discard manager of a block (QEMU: system/ram-discard-manager.c, 11.1).

A page is populated when every source says so; without sources everything is. The manager keeps no
copy of any source's state: it asks, live, and by runs, so that the cost of a replay is in the
populated runs and not in the length of the block. QEMU's manager walks in steps of the smallest
granularity, tells failures of a discard to nobody, and prints a failed replay; this one asks for
ranges, lets a listener refuse a discard, and puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from ramblock.discard.coordination import DiscardHold
from ramblock.discard.guard import Guard, MovedError
from ramblock.discard.listeners import Listener, Registration, Registry
from ramblock.discard.notification import Notification, reserve
from ramblock.discard.section import Block, RamSection
from ramblock.discard.sources import Source, held_back_by, joint_runs
from ramblock.discard.undo import UndoLog
from ramblock.errors import BusyError, UsageError, describe_error
from ramblock.process import OfOneProcess
from ramblock.ranges import complement
from ramblock.units import PAGE_SIZE, check_granularity, check_range

T = TypeVar("T")


class Freeing(Protocol):
    """Frees the memory of a block, on all its sides."""

    def free(self, offset: int, size: int) -> int:
        """Free a range, where nobody uses it any more; return the bytes that wait."""

    def keep_used(self, offset: int, size: int) -> None:
        """Note that the part of the range in use is no longer waiting to be freed."""


def _nothing() -> None:
    """For a source that does not want to hear when it is added or removed."""


class RamDiscardManager(OfOneProcess):
    """
    The sources and listeners of one block. Every block has one; user code does not build it.

    Changing calls take the memory's lock and are all or nothing. Each raises
    :class:`~ramblock.errors.UsageError` for a closed block,
    :class:`~ramblock.errors.BusyError` when a listener or source calls back in,
    :class:`~ramblock.errors.MappingLimitError` when a mapper has no room or cannot cut that often,
    and the exception of a listener that refused or a source that gave no answer. All is as before
    then, unless it is :class:`~ramblock.errors.PoisonedError`: the block is poisoned, or this call
    poisoned it.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._place = f"block {block.name!r}"
        #: The lock that the block is under; placing the block changes it.
        self.guard = Guard()
        #: Claims on discards that go with the block.
        self.holds: list[DiscardHold] = []
        self.freeing: Freeing  # the block's sides, which need this manager
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
        """Call ``work(*arguments)`` under the block's lock; see :meth:`Guard.run`."""
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
            raise UsageError(f"{self._place} is closed", value=self.block.name)

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
        runs = joint_runs(iter(((section.offset, section.end),)), self.sources)
        return (section.part(start, end) for start, end in runs)

    def discarded(self, section: RamSection) -> Iterator[RamSection]:
        """Yield the runs of *section* that are not populated; else like :meth:`populated`."""
        runs = ((part.offset, part.end) for part in self.populated(section))
        gaps = complement(runs, section.offset, section.end)
        return (section.part(start, end) for start, end in gaps)

    def _check_block(self, section: RamSection) -> None:
        if section.block is not self.block:
            text = f"{section!r} does not belong to {self._place}"
            raise UsageError(text, value=section, expected=self.block.name)

    def add_source(self, source: Source) -> None:
        """
        Join *source*: the listeners hear the discard of all that it does not call populated.

        Memory that it withholds from the guest (virtio-mem) is freed.

        :raises BusyError: It is there already.
        :raises UsageError: It is another block's, or its granularity is no power of two, or finer
            than a mapper's page size.
        """
        self.run("add_source", self._add_source, source)

    def _add_source(self, source: Source) -> None:
        self.check_open()
        if any(source is other for other in self.sources):
            raise BusyError(f"{source!r} is a source of {self._place} already")
        if getattr(getattr(source, "block", None), "discard_manager", self) is not self:
            raise UsageError(
                f"{source!r} belongs to another block than {self._place}", value=source
            )
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
            self._change_sources("add_source", source, (*self.sources, source))
        except BaseException:
            getattr(source, "on_removed", _nothing)()
            raise
        if getattr(source, "withholds", False):
            for start, end in held_back_by(source, 0, self.block.size):
                self.freeing.free(start, end - start)

    def remove_source(self, source: Source) -> None:
        """
        Take *source* out: the listeners hear of all that it alone held back.

        :raises UsageError: It is not a source of this block, or it is the block's page attributes.
        """
        self.run("remove_source", self._remove_source, source)

    def _remove_source(self, source: Source) -> None:
        self._check_source(source)
        if getattr(source, "permanent", False):
            text = f"the page attributes of {self._place} cannot be removed"
            raise UsageError(text, value=source)
        remaining = tuple(other for other in self.sources if other is not source)
        self._change_sources("remove_source", source, remaining)
        getattr(source, "on_removed", _nothing)()

    def _change_sources(self, operation: str, source: Source, sources: tuple[Source, ...]) -> None:
        # Of the sources until now, one that goes is taken at its word; one that comes is not there.
        going = source if len(sources) < len(self.sources) else None
        size, populate, runs = self.block.size, going is not None, partial(held_back_by, source)
        change = Notification(
            self, 0, size, populate=populate, source=going, runs=runs, hollow=False
        )
        self._tell(operation, change)
        self.sources = sources
        self.freeing.keep_used(0, size)

    def _tell(self, operation: str, change: Notification) -> None:
        reserve((change,))
        with UndoLog(self.guard, operation) as undo:
            undo.do("notify", change.tell, change.take_back)

    def _check_source(self, source: Source) -> None:
        self.check_open()
        if not any(source is other for other in self.sources):
            raise UsageError(f"{source!r} is not a source of {self._place}", value=source)

    def notify_populate(self, source: Source, offset: int, size: int) -> None:
        """
        Tell the listeners that *source* has just populated ``[offset, offset + size)``, in bytes.

        It is taken at its word; they hear of it where the other sources agree.

        :raises UsageError: Unknown source, or a bad range.
        :raises Exception: A listener refused. Those told before it have heard the discard; the
            source takes its own change back.
        """
        self.run("notify_populate", self._notify, "notify_populate", source, offset, size)

    def notify_discard(self, source: Source, offset: int, size: int) -> None:
        """
        Tell the listeners that *source* has just discarded a range; see :meth:`notify_populate`.

        :raises Exception: A listener may still use the range. Those told before it were populated
            again; the source takes its own change back.
        """
        self.run("notify_discard", self._notify, "notify_discard", source, offset, size)

    def _notify(self, operation: str, source: Source, offset: int, size: int) -> None:
        self._check_source(source)
        check_range(offset, size, limit=self.block.size, align=source.granularity, what=self._place)
        populate = operation == "notify_populate"
        change = Notification(self, offset, offset + size, populate=populate, source=source)
        self._tell(operation, change)
        self.freeing.keep_used(offset, size)

    def register_listener(self, listener: Listener, section: RamSection) -> None:
        """
        Register *listener* for *section* and replay to it the populated runs there.

        :raises UsageError: It is registered already, or the section is another block's or not made
            of whole pages; nothing has changed.
        :raises Exception: It refused; it has heard the discard of all it was told before, and is
            not registered.
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
        Unregister *listener*; it hears a discard of all it holds.

        On a poisoned block it goes whatever it raises, and all that it keeps is in doubt.

        :raises UsageError: It is not registered.
        :raises Exception: It refused: it may still use the range. It stays registered and holds all
            it held.
        """
        # It only takes away, which detaches a target from a poisoned block too.
        self.run("unregister_listener", self._unregister, listener, even_poisoned=True)

    def _unregister(self, listener: Listener) -> None:
        self.check_open()
        registration = self.registry.find(listener)
        if registration is None:
            raise UsageError(f"{listener!r} is not registered with {self._place}", value=listener)
        if self.guard.poisoned:
            # Nothing is put back on a poisoned block: that would make pages reachable.
            self.leave_regardless(registration)
            return
        with UndoLog(self.guard, "unregister_listener") as undo:
            self.leave(undo, registration)

    def dismiss_all(self) -> None:
        """Unregister every listener for closing; one that refuses is made to go."""
        for registration in self.registry:
            try:
                self._unregister(registration.listener)
            except BaseException:
                self.leave_regardless(registration)

    # Below are parts of operations; the caller holds the lock.

    def check_in(self, listener: Listener, section: RamSection) -> Registration:
        """Check that *listener* may register for *section*; it is not registered by that."""
        self._check_block(section)
        if self.registry.find(listener) is not None:
            text = f"{listener!r} is registered already; one registration per listener"
            raise UsageError(text, value=listener)
        limit, what = self.block.size, f"section of {self.block.name!r}"
        check_range(section.offset, section.size, limit=limit, align=PAGE_SIZE, what=what)
        return self.registry.make(listener, section)

    def replay(self, registration: Registration, *, populate: bool = True) -> Notification:
        """Build the notification of one listener, registered or not, of all that is populated."""
        start, end = registration.section.offset, registration.section.end
        return Notification(self, start, end, populate=populate, only=registration)

    def join(
        self,
        undo: UndoLog,
        registration: Registration,
        replay: Notification,
        *,
        before: Registration | None = None,
    ) -> None:
        """
        Replay to the listener, and put it on the list.

        :param before: Its registration until now, for a part of the section; None: it has none.
        """

        def unjoin() -> None:
            try:
                replay.take_back()
            except BaseException:
                self.registry.discard(registration.listener)
                if registration.budgeted is not None:
                    # It may still hold something, and closing tells it to let go of all of it.
                    self.registry.add(registration)
                raise
            self.registry.discard(registration.listener)
            if before is not None:
                self.registry.add(before)

        undo.do("map", replay.tell, unjoin)
        self.registry.add(registration)

    def leave(self, undo: UndoLog, registration: Registration) -> None:
        """Tell the listener the discard of all it holds, and take it off the list."""
        farewell = self.replay(registration, populate=False)

        def rejoin() -> None:
            self.registry.add(registration)
            farewell.take_back()

        undo.do("unmap", farewell.tell, rejoin)
        self.registry.discard(registration.listener)

    def leave_regardless(self, registration: Registration) -> None:
        """Make the listener leave, registered or not; all that it keeps is in doubt."""
        section, listener = registration.section, registration.listener
        if registration.budgeted is not None:
            registration.budgeted.let_go()
        else:
            # After a failure a sparse one may hold pages that are not populated any more.
            for part in (section,) if registration.sparse else self.populated(section):
                try:
                    listener.notify_discard(part)
                except BaseException as error:  # closing goes on
                    self.guard.doubt(
                        part, listener, f"could not be discarded: {describe_error(error)}"
                    )
        self.registry.discard(listener)

    def stay_in_doubt(self, registration: Registration, reason: str) -> None:
        """Put the listener back on the list, and tell it nothing: all that it left is in doubt."""
        self.registry.add(registration)
        self.replay(registration, populate=False).doubt(reason)


class ManagedBlock(Block, Protocol):
    """A block with its discard manager, as a source of ours needs it."""

    @property
    def discard_manager(self) -> RamDiscardManager:
        """Its manager."""
