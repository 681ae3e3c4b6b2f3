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
from ramblock.memory.coordination import DiscardHold
from ramblock.memory.discard_manager import RamDiscardManager
from ramblock.memory.guard import Guard, Moved
from ramblock.memory.in_place import check_in_place, is_in_place, take_in_place
from ramblock.memory.prealloc import Progress
from ramblock.memory.sides import Sides
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_range, format_size

__all__ = ["Placement", "RamBlock"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Placement(Protocol):
    """The guest memory in which a block is placed, as far as the block has to know."""

    def forget(self, block: RamBlock) -> None:
        """Drop every section of *block*, whatever listeners say; the lock is held by the caller."""

    def release_unplaced(self, block: RamBlock) -> None:
        """Let *block* go if it has no section any more."""


def _check_name(name: object) -> None:
    if not isinstance(name, str) or "\0" in name:
        raise UsageError(f"{name!r} is not a name", value=name, expected="text without NUL")


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
        #: The memory, where it serves both states and so is both sides; else None.
        self.in_place = private if is_in_place(private) else None
        self.guard = Guard()
        self.placement: Placement | None = None
        self.holds: list[DiscardHold] = []
        self._shared = shared
        self._own_private = private if owns_private else None
        self._closed = False
        self._given_back = False
        #: Joins the block's sources and tells its listeners.
        self.discard_manager = RamDiscardManager(self)
        #: The page states; None for ordinary RAM, which is always shared.
        self.attributes: RamBlockAttributes | None = None
        #: What is in use of its memory, and freeing the rest.
        self.sides = Sides(self, shared, private)
        if private is not None:
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
        Make a block of *size* bytes on a memfd, or on a memory that serves both states.

        :param name: For messages and traces.
        :param size: In bytes; a multiple of the host page size.
        :param private: None for ordinary RAM; ``"stand-in"`` for a memfd in the role of guest_memfd; any
            :class:`~ramblock.memory.PrivateBacking`, which stays the caller's to close; or an
            :class:`~ramblock.memory.InPlaceBacking`, which is all of the block's memory from now on and is closed with it.
        :raises UsageError: Bad size, or *private* is none of these or does not fit; nothing is held.
        :raises OSError: The host has no memory; nothing is held.
        """
        if is_in_place(private):
            _check_name(name)
            check_range(0, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what=f"block {name!r}")
            check_in_place(private, size, name)
            block = cls(name, private, private, owns_private=False)
            take_in_place(private)
            return block
        return cls.from_backend(name, HostMemoryBackend(size=size), private=private)

    @classmethod
    def from_backend(
        cls,
        name: str,
        backend: HostMemoryBackend,
        *,
        private: PrivateBacking | str | None = None,
        progress: Progress | None = None,
    ) -> RamBlock:
        """
        Make a block from a description of host memory; otherwise like :meth:`create`.

        :param progress: See :meth:`~ramblock.HostMemoryBackend.allocate`, which also says what is raised.
        """
        _check_name(name)
        if is_in_place(private):
            raise UsageError(
                f"block {name!r}: {private!r} is all the memory of its block, there is none to allocate",
                value=private,
                expected="RamBlock.create",
            )
        if private is not None and private != "stand-in":
            check_private(private, backend.size, name)
        shared = backend.allocate(name, progress=progress)
        if private == "stand-in":
            return cls(name, shared, StandInPrivate(name, backend.size), owns_private=True)
        assert not isinstance(private, str)  # a string has no discard(): refused above
        return cls(name, shared, private, owns_private=False)

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
        :raises OSError: In place, a page of it is private.
        """
        self._check_open()
        check_range(offset, size, limit=self.size, align=1, what=f"block {self.name!r}")
        return self._shared.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """
        Write the raw shared side, in any page state.

        :raises UsageError: No data, outside the block, or closed; nothing is written.
        :raises OSError: The host has no page for it, or (in place) it is private; bytes before that page may be written.
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
        return self.sides.both.not_freed_bytes

    def free_pending(self) -> int:
        """
        Try once more to free what could not be freed.

        :return: Bytes that still wait.
        :raises PoisonedError: The block is poisoned, and keeps its pages.
        """
        return self.run("free_pending", self.sides.both.free_pending)

    # -- locking and life -----------------------------------------------------------------------------------------

    def run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
        even_closed: bool = False,
    ) -> T:
        """
        Call ``work(*arguments)`` under the lock that the block is under, which placing the block can change.

        :raises BusyError: A listener called back in.
        :raises PoisonedError: Unless *even_poisoned*.
        :raises UsageError: The block is closed; unless *even_closed*.
        """
        while True:
            result: T | Moved = self.guard.run(
                operation,
                self._run_open,
                work,
                arguments,
                even_closed,
                even_poisoned=even_poisoned,
                home=self,
            )
            if not isinstance(result, Moved):
                return result

    def _run_open(
        self, work: Callable[..., T], arguments: tuple[object, ...], even_closed: object
    ) -> T:
        if not even_closed:
            self._check_open()
        result: T = work(*arguments)
        return result

    def close(self) -> None:
        """
        Unregister the listeners, leave the guest memory, and give the memory back. Twice is the same as once.

        It never refuses because of listeners: one that cannot let go poisons, and then, as for any poisoned block, the
        pages stay alive, since a target may reach them. Interrupted by Ctrl-C it has left nothing half-done, and is to be
        called again; if it comes while a listener that refuses is being forced out, it poisons.

        :raises BusyError: Called by a listener from inside an operation; nothing has changed.
        """
        self.run("close", self._close, even_poisoned=True, even_closed=True)

    def _close(self) -> None:
        if not self._closed:
            if self.placement is not None:
                self.placement.forget(self)
            for registration in self.discard_manager.registrations:
                self.discard_manager.dismiss(registration.listener)
            self._closed = True
        if not self._given_back:
            self._give_back()
            self._given_back = True

    def _give_back(self) -> None:
        """Give back what the block holds; whatever of it was given back before an interrupt is so twice."""
        for hold in self.holds:
            hold.release()
        if self.guard.doubts_of(self):
            _kept.append(self._shared)
            _log.critical(
                "block %r is closed poisoned; its %s stay allocated",
                self.name,
                format_size(self.size),
            )
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
