# SPDX-License-Identifier: Apache-2.0
"""One contiguous piece of guest RAM (QEMU: RAMBlock)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from ramblock.errors import UsageError
from ramblock.memory.attributes import RamBlockAttributes
from ramblock.memory.backend import HostMemoryBackend
from ramblock.memory.backing import PrivateBacking, SharedBacking, StandInPrivate, check_private
from ramblock.memory.bitmap_source import BitmapSource
from ramblock.memory.coordination import DiscardHold
from ramblock.memory.discard_manager import RamDiscardManager
from ramblock.memory.guard import Guard, Moved
from ramblock.memory.reclaim import Reclaimer
from ramblock.memory.runs import Runs, complement, intersect, merge_adjacent
from ramblock.units import PAGE_SIZE, check_range, format_size

__all__ = ["Placement", "RamBlock"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Placement(Protocol):
    """The guest memory in which a block is placed, as far as the block has to know."""

    def forget(self, block: RamBlock) -> None:
        """Drop every section of *block*, whatever listeners say; the lock is held by the caller."""

    def release_unplaced(self, block: RamBlock) -> None:
        """Let *block* go if it has no section any more."""


def _is_name(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name


class RamBlock:
    """
    Guest RAM: a shared backing, for confidential guests a private one, the page states, and the discard manager.

    Made by :meth:`create` or :meth:`from_backend`. A context manager: leaving it closes the block.
    """

    def __init__(
        self,
        name: str,
        shared: SharedBacking,
        private: PrivateBacking | None,
        *,
        owns_private: bool,
    ) -> None:
        self.name = name
        self.size = shared.size
        self.private = private
        self.guard = Guard()
        self.placement: Placement | None = None
        self.holds: list[DiscardHold] = []
        self._shared = shared
        self._own_private = private if owns_private else None
        self._closed = False
        #: Joins the block's sources and tells its listeners.
        self.discard_manager = RamDiscardManager(self)
        #: The page states; None for ordinary RAM, which is always shared.
        self.attributes: RamBlockAttributes | None = None
        self._free_shared = Reclaimer(
            f"block {name!r}, shared side",
            self.size,
            shared.page_size,
            shared.discard,
            self._used_shared,
        )
        self._free_private: Reclaimer | None = None
        if private is not None:
            self._free_private = Reclaimer(
                f"block {name!r}, private side",
                self.size,
                PAGE_SIZE,
                private.discard,
                self._used_privately,
            )
            self.attributes = RamBlockAttributes(self)
            self.discard_manager.insert_source(self.attributes)
            self.holds.append(
                self.guard.discards.require_coordinated(f"page conversion of block {name!r}")
            )

    @classmethod
    def create(
        cls, name: str, size: int, *, private: PrivateBacking | str | None = None
    ) -> RamBlock:
        """
        Make a block of *size* bytes on a memfd.

        :param name: For messages and traces.
        :param size: In bytes; a multiple of the host page size.
        :param private: None for ordinary RAM; ``"stand-in"`` for a memfd in the role of guest_memfd; or any
            :class:`~ramblock.memory.PrivateBacking`, which stays the caller's to close.
        :raises UsageError: Bad size, or *private* is none of these or too small; nothing is held.
        :raises OSError: The host has no memory; nothing is held.
        """
        return cls.from_backend(name, HostMemoryBackend(size=size), private=private)

    @classmethod
    def from_backend(
        cls, name: str, backend: HostMemoryBackend, *, private: PrivateBacking | str | None = None
    ) -> RamBlock:
        """Make a block from a description of host memory; otherwise like :meth:`create`."""
        if not _is_name(name):
            raise UsageError(f"{name!r} is not a name", value=name, expected="text without NUL")
        if private is None:
            return cls(name, backend.allocate(name), None, owns_private=False)
        if private == "stand-in":
            return cls(
                name, backend.allocate(name), StandInPrivate(name, backend.size), owns_private=True
            )
        check_private(private, backend.size, name)
        assert not isinstance(private, str)  # a string has no discard(): refused above
        return cls(name, backend.allocate(name), private, owns_private=False)

    # -- memory ---------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> SharedBacking:
        """The shared backing itself."""
        return self._shared

    @property
    def fd(self) -> int | None:
        """Descriptor of the shared backing; None for anonymous memory."""
        return self._shared.fd

    @property
    def address(self) -> int:
        """Host virtual address of the shared backing."""
        return self._shared.address

    @property
    def page_size(self) -> int:
        """Page size of the shared backing, in bytes; what of it can be freed at once."""
        return self._shared.page_size

    @property
    def closed(self) -> bool:
        """Whether the block was closed."""
        return self._closed

    def read(self, offset: int, size: int) -> bytes:
        """
        Read the raw shared side, in any page state; a hole reads as zeros and stays a hole.

        :raises UsageError: Empty range, outside the block, or closed.
        """
        self._check_open()
        check_range(offset, size, limit=self.size, align=1, what=f"block {self.name!r}")
        return self._shared.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """
        Write the raw shared side, in any page state.

        :raises UsageError: No data, outside the block, or closed; nothing is written.
        :raises OSError: The host has no page for it; bytes before that page may be written.
        """
        self._check_open()
        check_range(offset, len(data), limit=self.size, align=1, what=f"block {self.name!r}")
        self._shared.write(offset, data)

    def allocated_bytes(self) -> int | None:
        """Bytes of memory in use on the shared side, as the kernel counts them; None for anonymous memory."""
        return self._shared.allocated_bytes()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"block {self.name!r} is closed", value=self.name)

    # -- freeing --------------------------------------------------------------------------------------------------

    @property
    def not_freed_bytes(self) -> int:
        """Bytes on either side that nobody needs and that could not be freed yet."""
        private = self._free_private.not_freed_bytes if self._free_private is not None else 0
        return self._free_shared.not_freed_bytes + private

    def free_pending(self) -> int:
        """
        Try once more to free what could not be freed.

        :return: Bytes that still wait.
        :raises PoisonedError: The block is poisoned, and keeps its pages.
        """
        return self.run("free_pending", self._free_all_pending)

    def _free_all_pending(self) -> int:
        waiting = self._free_shared.free_pending()
        return waiting + (
            self._free_private.free_pending() if self._free_private is not None else 0
        )

    def expect_free(self, offset: int, size: int, *, shared: bool, private: bool) -> None:
        """Put what a commit will leave unused on the account. Lock held by the caller."""
        if shared:
            self._free_shared.expect(offset, size)
        if private and self._free_private is not None:
            self._free_private.expect(offset, size)

    def unexpect_free(self, offset: int, size: int, *, shared: bool, private: bool) -> None:
        """Undo :meth:`expect_free`."""
        if shared:
            self._free_shared.unexpect(offset, size)
        if private and self._free_private is not None:
            self._free_private.unexpect(offset, size)

    def free_shared(self, offset: int, size: int) -> int:
        """Free the shared side of a range that is not populated; return the bytes not freed. Lock held by the caller."""
        return self._free_shared.free(offset, size)

    def free_private(self, offset: int, size: int) -> int:
        """Free the private side of a range that the guest does not use privately; like :meth:`free_shared`."""
        assert self._free_private is not None
        return self._free_private.free(offset, size)

    def keep_used(
        self, offset: int, size: int, *, shared: bool = True, private: bool = True
    ) -> None:
        """After a change: what is in use again does not wait to be freed any more. Lock held by the caller."""
        if shared:
            self._free_shared.keep_used(offset, size)
        if private and self._free_private is not None:
            self._free_private.keep_used(offset, size)

    def _used_shared(self, start: int, end: int) -> Runs:
        """
        Yield what is in use on the shared side: shared, and plugged where virtio-mem has a say.

        Other sources are not asked: what they withhold from devices the guest may still use.
        """
        runs: Runs = iter(((start, end),))
        for source in self.discard_manager.sources:
            if isinstance(source, BitmapSource):
                runs = intersect(runs, source)
        return merge_adjacent(runs)

    def _used_privately(self, start: int, end: int) -> Runs:
        """Yield what is in use on the private side: private, and plugged where virtio-mem has a say."""
        attributes = self.attributes
        assert attributes is not None  # the caller has a private side
        runs = complement(
            ((offset, offset + size) for offset, size in attributes.ranges(start, end - start)),
            start,
            end,
        )
        for source in self.discard_manager.sources:
            if isinstance(source, BitmapSource) and source is not attributes:
                runs = intersect(runs, source)
        return merge_adjacent(runs)

    # -- locking and life -----------------------------------------------------------------------------------------

    def run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
    ) -> T:
        """
        Call ``work(*arguments)`` under the lock that the block is under, which placing the block can change.

        :raises BusyError: A listener called back in.
        :raises PoisonedError: Unless *even_poisoned*.
        :raises UsageError: The block is closed.
        """
        while True:
            result: T | Moved = self.guard.run(
                operation, self._run_open, work, arguments, even_poisoned=even_poisoned, home=self
            )
            if not isinstance(result, Moved):
                return result

    def _run_open(self, work: Callable[..., T], arguments: tuple[object, ...]) -> T:
        self._check_open()
        result: T = work(*arguments)
        return result

    def close(self) -> None:
        """
        Unregister the listeners, leave the guest memory, and give the memory back. Twice is the same as once.

        It never refuses because of listeners: one that cannot let go poisons, and then, as for any poisoned block, the
        pages stay alive, since a target may reach them. Interrupted by Ctrl-C it poisons too; close it again.

        :raises BusyError: Called by a listener from inside an operation; nothing has changed.
        """
        try:
            self.run("close", self._close, even_poisoned=True)
        except UsageError:
            if not self._closed:
                raise

    def _close(self) -> None:
        guard = self.guard
        try:
            if self.placement is not None:
                self.placement.forget(self)
            for registration in self.discard_manager.registrations:
                self.discard_manager.drop_listener(registration.listener)
        except BaseException as error:
            guard.poison(f"closing block {self.name!r} was interrupted: {error!r}")
            raise
        self._closed = True
        for hold in self.holds:
            hold.release()
        if guard.doubts_of(self):
            _log.critical(
                "block %r is closed poisoned; its %s stay allocated",
                self.name,
                format_size(self.size),
            )
            _kept.append(self._shared)
        else:
            self._shared.close()
        if isinstance(self._own_private, StandInPrivate):
            self._own_private.close()

    def __enter__(self) -> RamBlock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RamBlock {self.name!r}: {format_size(self.size)}>"


# Shared sides of closed poisoned blocks, until the process ends. Not a leak: the alternative is a device that writes into
# memory that belongs to somebody else by then, and no object whose life could be watched tells when it no longer can.
_kept: list[SharedBacking] = []
