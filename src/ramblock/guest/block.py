# SPDX-License-Identifier: Apache-2.0
"""One contiguous piece of guest RAM (QEMU: RAMBlock)."""

from __future__ import annotations

import logging
from typing import Protocol

from ramblock.discard.attributes import RamBlockAttributes
from ramblock.discard.coordination import HoldKind
from ramblock.discard.guard import Guard
from ramblock.discard.manager import RamDiscardManager
from ramblock.errors import UsageError
from ramblock.guest.freeing import Sides
from ramblock.hostmem.backend import HostMemoryBackend, Progress
from ramblock.hostmem.backing import PrivateBacking, SharedBacking, StandInPrivate, check_private
from ramblock.hostmem.in_place import check_in_place, is_in_place, take_in_place
from ramblock.process import ClosedAtEnd
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_range, format_size

_log = logging.getLogger(__name__)


class Placement(Protocol):
    """The guest memory in which a block is placed, as far as the block has to know."""

    def forget(self, block: RamBlock) -> None:
        """Drop every section of *block*, whatever listeners say; the caller holds the lock."""


def _check_name(name: object) -> None:
    if not isinstance(name, str) or "\0" in name:
        raise UsageError(f"{name!r} is not a name", value=name, expected="text without NUL")


class RamBlock(ClosedAtEnd):
    """
    Guest RAM: its backings, page states and discard manager.

    The shared backing is always there, the private one for confidential guests. Made by
    :meth:`create` or :meth:`from_backend`. A context manager: leaving it closes the block.
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
        self.size = shared.size  #: In bytes.
        self.shared = shared  #: The shared backing itself.
        self.fd = shared.fd  #: Descriptor of the shared backing; None for anonymous memory.
        self.address = shared.address  #: Host virtual address of the shared backing.
        #: The smallest piece of the shared backing that can be freed, in bytes.
        self.page_size = shared.page_size
        self.private = private  #: The private backing; None for ordinary RAM.
        #: The memory, where it serves both states; else None.
        self.in_place = private if is_in_place(private) else None
        self.placement: Placement | None = None
        self._own_private = None
        if owns_private and isinstance(private, StandInPrivate):
            self._own_private = private
        #: Joins the block's sources and tells its listeners.
        self.discard_manager = manager = RamDiscardManager(self)
        #: The page states; None for ordinary RAM, which is always shared.
        self.attributes: RamBlockAttributes | None = None
        if private is not None:
            self.attributes = RamBlockAttributes(self)
        #: The use of its memory, and freeing the rest.
        self.sides = Sides(manager, self.attributes, shared, self._discard_private)
        manager.freeing = self.sides
        if self.attributes is not None:
            manager.add_source(self.attributes)
            owner, kind = f"page conversion of block {name!r}", HoldKind.REQUIRE_COORDINATED
            manager.holds.append(self.guard.discards.hold(owner, kind))

    def _discard_private(self, offset: int, size: int) -> None:
        # Not bound once: a reset puts another backing here.
        assert self.private is not None
        self.private.discard(offset, size)

    def retire_private(self, old: PrivateBacking) -> int:
        """Empty *old*, which a reset has replaced, close it if it is ours; return the rest."""
        not_freed = 0
        try:
            old.discard(0, self.size)
        except Exception as error:
            not_freed = self.size
            _log.warning("block %r: the old private side is not emptied: %s", self.name, error)
        if self._own_private is old:
            self._own_private.close()
            self._own_private = None
        return not_freed

    @classmethod
    def create(
        cls, name: str, size: int, *, private: PrivateBacking | str | None = None
    ) -> RamBlock:
        """
        Make a block of *size* bytes on a memfd, or on a memory that serves both states.

        :param name: For messages and traces.
        :param size: In bytes; a multiple of the host page size.
        :param private: None for ordinary RAM; ``"stand-in"`` for a memfd in the role of
            guest_memfd; any :class:`~ramblock.PrivateBacking`, which stays the caller's to close;
            or an :class:`~ramblock.InPlaceBacking`, which is all of the block's memory from now on
            and is closed with it.
        :raises UsageError: Bad size, or *private* is no such or does not fit; nothing is held.
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

        :param progress: See :meth:`~ramblock.HostMemoryBackend.allocate`, also for the errors.
        """
        _check_name(name)
        if is_in_place(private):
            reason = f"{private!r} is all the memory of its block, there is none to allocate"
            text = f"block {name!r}: {reason}"
            raise UsageError(text, value=private, expected="RamBlock.create")
        if private is not None and private != "stand-in":
            check_private(private, backend.size, name)
        shared = backend.allocate(name, progress=progress)
        if private == "stand-in":
            return cls(name, shared, StandInPrivate(name, backend.size), owns_private=True)
        assert not isinstance(private, str)  # a string has no discard(): refused above
        return cls(name, shared, private, owns_private=False)

    @property
    def closed(self) -> bool:
        """Whether the block was closed."""
        return self.discard_manager.closed

    def read(self, offset: int, size: int) -> bytes:
        """
        Read the raw shared side, in any page state; a hole reads as zeros and stays a hole.

        :raises UsageError: Empty range, outside the block, or closed.
        :raises OSError: In place, a page of it is private.
        """
        self.discard_manager.check_open()
        check_range(offset, size, limit=self.size, align=1, what=f"block {self.name!r}")
        return self.shared.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """
        Write the raw shared side, in any page state.

        :raises UsageError: No data, outside the block, or closed; nothing is written.
        :raises OSError: The host has no page for it, or (in place) it is private; bytes before that
            page may be written.
        """
        self.discard_manager.check_open()
        check_range(offset, len(data), limit=self.size, align=1, what=f"block {self.name!r}")
        self.shared.write(offset, data)

    def allocated_bytes(self) -> int | None:
        """Bytes in use on the shared side, by the kernel's count; None for anonymous memory."""
        return self.shared.allocated_bytes()

    @property
    def not_freed_bytes(self) -> int:
        """Bytes on both sides that nobody needs and that could not be freed yet."""
        return self.sides.not_freed_bytes

    def free_pending(self) -> int:
        """
        Try once more to free all that waits; return the bytes that still wait.

        :raises PoisonedError: The block is poisoned, and keeps its pages.
        """
        return self.discard_manager.run("free_pending", self._free_pending)

    def _free_pending(self) -> int:
        self.discard_manager.check_open()
        return self.sides.free_pending()

    @property
    def guard(self) -> Guard:
        """The lock, the poison and the doubts that the block is under."""
        return self.discard_manager.guard

    def close(self) -> None:
        """
        Unregister the listeners, leave the guest memory, and give the memory back.

        Twice is the same as once. It never refuses because of listeners: one that cannot let go
        poisons, and then, as for any poisoned block, the pages stay alive, since a target may reach
        them. In a fork it only closes this process's part of the block, and tells nobody.

        :raises BusyError: Called by a listener from inside an operation; nothing has changed.
        """
        if self.guard.forked:
            self.discard_manager.closed = True
            self.shared.close()
        else:
            self.discard_manager.run("close", self._close, even_poisoned=True)

    def _close(self) -> None:
        manager = self.discard_manager
        if manager.closed:
            return
        if self.placement is not None:
            self.placement.forget(self)
        manager.dismiss_all()
        manager.closed = True
        for hold in manager.holds:
            hold.release()
        if manager.guard.doubts_of(self):
            _kept.append(self.shared)
            size = format_size(self.size)
            _log.critical("block %r is closed poisoned; its %s stay allocated", self.name, size)
        else:
            self.shared.close()
        if self._own_private is not None:
            self._own_private.close()

    def __repr__(self) -> str:
        return f"<RamBlock {self.name!r}: {format_size(self.size)}>"


# Shared sides of closed poisoned blocks, until the process ends. Not a leak: the alternative is a
# device that writes into memory that belongs to somebody else by then, and no object whose life
# could be watched tells when it no longer can.
_kept: list[SharedBacking] = []
