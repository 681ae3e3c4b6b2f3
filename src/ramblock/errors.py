# SPDX-License-Identifier: Apache-2.0
"""
Every error that leaves the library.

A caller decides by class and by field, a person reads the text. Ranges in messages are half-open
and in hex, ``[start, end)``. The docstring of each class says which state it leaves.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any

__all__ = [
    "BusyError", "ConversionError", "DmaError", "GuestProgramError", "IommuFault",
    "LocalProtocolError", "MappingLimitError", "PoisonedError", "ProtocolError", "RamblockError",
    "RemoteProtocolError", "TraceError", "UsageError", "describe_range",
]  # fmt: skip


def describe_range(start: int, size: int) -> str:
    """Write a range as every message of ours does: ``[0x1000, 0x3000)``."""
    return f"[{start:#x}, {start + size:#x})"


# Errors are compared by identity and shown as Python shows every exception.
@dataclass(eq=False, repr=False)
class RamblockError(Exception):
    """The root: ``except RamblockError`` catches whatever the library raises on purpose."""

    message: InitVar[str]

    def __post_init__(self, message: str) -> None:
        super().__init__(message)


@dataclass(eq=False, repr=False, kw_only=True)
class UsageError(RamblockError, ValueError):
    """A call that cannot be meant: bad range or alignment, a wrong object. Nothing has changed."""

    value: object = None  #: The value that was refused, where there is a single one.
    expected: str | None = None  #: The values that would have been accepted, in words.
    #: The rule that a range breaks: ``"hole"``, ``"no private side"``, ``"alignment"``,
    #: ``"limit"``, ``"empty"`` (or negative), ``"type"``; else None.
    reason: str | None = None


class BusyError(RamblockError):
    """
    Somebody is in the way. Nothing has changed.

    The source is there already, another user requires or forbids discards, or a listener called
    back into the operation that is telling it.
    """


@dataclass(eq=False, repr=False, kw_only=True)
class ConversionError(RamblockError):
    """A conversion failed before its commit: attributes, mappings and states are put back."""

    rolled_back = True  #: Nothing has changed. False only in :class:`PoisonedError`.
    gpa: int | None = None  #: Start of the range, in guest bytes; None outside a guest memory.
    size: int | None = None  #: Of the range, in bytes.
    to: Any = None  #: The state that was asked for (a ``PageState``).
    #: The step that failed: ``"unmap"``, ``"attribute"``, ``"map"`` or ``"state"``;
    #: ``"poisoned"`` where none was begun.
    step: str | None = None
    target: object = None  #: The DMA target or listener that refused, where one did.


class PoisonedError(ConversionError):
    """
    Nobody knows for certain which pages a device reaches; see ``GuestMemory.in_doubt()``.

    Raised by the call that poisons, and by every later one that would change anything. Pages are
    kept. Permanent.
    """

    rolled_back = False


@dataclass(eq=False, repr=False, kw_only=True)
class MappingLimitError(RamblockError):
    """The mapping budget does not hold for the operation and its undo. Nothing has been done."""

    limit: int  #: Entries that may exist at once.
    needed: int  #: Entries that would have to exist at once, in total.


class DmaError(RamblockError, OSError):
    """A DMA target refused. Built like any ``OSError``: with errno and text, or the text alone."""

    def __init__(
        self,
        *args: object,
        iova: int | None = None,
        size: int | None = None,
        in_doubt: bool = False,
    ) -> None:
        OSError.__init__(self, *args)
        self.iova = iova  #: Start of the range of the call, in bytes, where known.
        self.size = size  #: In bytes.
        #: False: the call did nothing. True: the target cannot say how much of it was done (an
        #: iommufd unmap that removed some areas before it failed); the mapping's owner finds out.
        self.in_doubt = in_doubt


@dataclass(eq=False, repr=False, kw_only=True)
class IommuFault(RamblockError):
    """A device touched an unmapped IOVA or wrote to a read-only one. No byte was transferred."""

    iova: int  #: Start of the device's access, in bytes.
    size: int  #: In bytes.
    write: bool  #: Whether it was a write.


@dataclass(eq=False, repr=False, kw_only=True)
class GuestProgramError(RamblockError):
    """The guest program cannot go on. Its vCPU is dead; memory and devices are as they were."""

    rip: int | None = None  #: Address of the instruction that failed, where known.
    vector: int | None = None  #: Number of the exception, where there was one.
    #: The byte that was touched, for a page fault and for an access to no memory.
    address: int | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class ProtocolError(RamblockError):
    """One side broke a rule of vfio-user; the class says which. Never raised itself."""

    command: int | None = None  #: The number of the message's command, where known.
    message_id: int | None = None  #: The message's id, where known.
    #: Start of the message, in bytes of the stream since the connection was made, where known.
    offset: int | None = None


class LocalProtocolError(ProtocolError):
    """This side was to break the protocol or use a connection that is over. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol. The connection is dead, and its descriptors are closed."""


@dataclass(eq=False, repr=False, kw_only=True)
class TraceError(RamblockError):
    """A trace cannot be read further. The part before it stays valid."""

    path: str | None = None  #: The file, as it was given.
    line: int | None = None  #: 1-based line, or the record's number in a binary trace.
