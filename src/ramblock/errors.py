# SPDX-License-Identifier: Apache-2.0
"""
Every error that leaves the library.

A caller decides by class and by field, a person reads the text. Ranges in messages are half-open
and in hex, ``[start, end)``. The docstring of each class says which state it leaves.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BusyError", "ConversionError", "DmaError", "GuestProgramError", "IommuFault",
    "LocalProtocolError", "MappingLimitError", "PoisonedError", "ProtocolError", "RamblockError",
    "RemoteProtocolError", "TraceError", "UsageError", "describe_error", "describe_range",
]  # fmt: skip


def describe_range(start: int, size: int) -> str:
    """Write a range as every message of ours does: ``[0x1000, 0x3000)``."""
    return f"[{start:#x}, {start + size:#x})"


def describe_error(error: BaseException) -> str:
    """Return ``repr(error)``, or its type where a part's own error cannot even be printed."""
    try:
        return repr(error)
    except BaseException:  # undoing goes on
        return f"{type(error).__name__}, which cannot be printed"


# Not dataclasses: that module alone is a seventh of the time of `ramblock --help`.
class RamblockError(Exception):
    """The root: ``except RamblockError`` catches whatever the library raises on purpose."""


class UsageError(RamblockError, ValueError):
    """A call that cannot be meant: bad range or alignment, a wrong object. Nothing has changed."""

    def __init__(
        self,
        message: str,
        *,
        value: object = None,
        expected: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.value = value  #: The value that was refused, where there is a single one.
        self.expected = expected  #: The values that would have been accepted, in words.
        #: The rule that a range breaks: ``"hole"``, ``"no private side"``, ``"alignment"``,
        #: ``"limit"``, ``"empty"`` (or negative), ``"type"``; else None.
        self.reason = reason


class BusyError(RamblockError):
    """
    Somebody is in the way. Nothing has changed.

    The source is there already, another user requires or forbids discards, or a listener called
    back into the operation that is telling it.
    """


class ConversionError(RamblockError):
    """A conversion failed before its commit and was put back; the cause is ``__cause__``."""

    rolled_back = True  #: Attributes, mappings and states are as before.

    def __init__(
        self,
        message: str,
        *,
        gpa: int | None = None,
        size: int | None = None,
        to: Any = None,
        step: str | None = None,
        target: object = None,
    ) -> None:
        super().__init__(message)
        self.gpa = gpa  #: Start of the range, in guest bytes; None outside a guest memory.
        self.size = size  #: Of the range, in bytes.
        self.to = to  #: The state that was asked for (a ``PageState``).
        #: The step that failed: ``"unmap"``, ``"attribute"``, ``"map"`` or ``"state"``;
        #: ``"poisoned"`` where none was begun.
        self.step = step
        self.target = target  #: The DMA target or listener that refused, where one did.


class PoisonedError(ConversionError):
    """
    Nobody knows for certain which pages a device reaches; see ``GuestMemory.in_doubt()``.

    Raised by the call that poisons, and by every later one that would change anything. Pages are
    kept. Permanent.
    """

    rolled_back = False


class MappingLimitError(RamblockError):
    """The mapping budget does not hold for the operation and its undo. Nothing has been done."""

    def __init__(self, message: str, *, limit: int, needed: int) -> None:
        super().__init__(message)
        self.limit = limit  #: Entries that may exist at once.
        self.needed = needed  #: Entries that would have to exist at once, in total.


class DmaError(RamblockError, OSError):
    """A DMA target refused. Built like any ``OSError``: with errno and text, or the text alone."""

    def __init__(
        self,
        *args: object,
        iova: int | None = None,
        size: int | None = None,
        in_doubt: bool = False,
    ) -> None:
        super().__init__(*args)
        self.iova = iova  #: Start of the range of the call, in bytes, where known.
        self.size = size  #: In bytes.
        #: False: the call did nothing. True: the target cannot say how much of it was done (an
        #: iommufd unmap that removed some areas before it failed); the mapping's owner finds out.
        self.in_doubt = in_doubt


class IommuFault(RamblockError):
    """A device touched an unmapped IOVA or wrote to a read-only one. No byte was transferred."""

    def __init__(self, message: str, *, iova: int, size: int, write: bool) -> None:
        super().__init__(message)
        self.iova = iova  #: Start of the device's access, in bytes.
        self.size = size  #: In bytes.
        self.write = write  #: Whether it was a write.


class GuestProgramError(RamblockError):
    """The guest program cannot go on. Its vCPU is dead; memory and devices are as they were."""

    def __init__(
        self,
        message: str,
        *,
        rip: int | None = None,
        vector: int | None = None,
        address: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rip = rip  #: Address of the instruction that failed, where known.
        self.vector = vector  #: Number of the exception, where there was one.
        #: The byte that was touched, for a page fault and for an access to no memory.
        self.address = address


class ProtocolError(RamblockError):
    """One side broke a rule of vfio-user; the class says which. Never raised itself."""

    def __init__(
        self,
        message: str,
        *,
        command: int | None = None,
        message_id: int | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.command = command  #: The number of the message's command, where known.
        self.message_id = message_id  #: The message's id, where known.
        #: Start of the message, in bytes of the stream since the connection was made, where known.
        self.offset = offset


class LocalProtocolError(ProtocolError):
    """This side was to break the protocol or use a connection that is over. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol. The connection is dead, and its descriptors are closed."""


class TraceError(RamblockError):
    """A trace cannot be read further. The part before it stays valid."""

    def __init__(self, message: str, *, path: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.path = path  #: The file, as it was given.
        self.line = line  #: 1-based line, or the record's number in a binary trace.
