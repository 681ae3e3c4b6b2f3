# SPDX-License-Identifier: Apache-2.0
"""
Every error that leaves the library.

One root, few kinds, fields instead of prose: a caller decides by class and by field, a person reads the text.
Ranges in messages are half-open and in hex, ``[start, end)``. The docstring of each class says what state it leaves.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BusyError",
    "ConversionError",
    "DmaError",
    "GuestProgramError",
    "IommuFault",
    "LocalProtocolError",
    "MappingLimitError",
    "PoisonedError",
    "ProtocolError",
    "RamblockError",
    "RemoteProtocolError",
    "TraceError",
    "UsageError",
    "describe_range",
]


def describe_range(start: int, size: int) -> str:
    """Write a range the way every message of ours does: ``[0x1000, 0x3000)``."""
    return f"[{start:#x}, {start + size:#x})"


class RamblockError(Exception):
    """The root: ``except RamblockError`` catches whatever the library raises on purpose."""


class UsageError(RamblockError, ValueError):
    """
    A call that cannot be meant: bad range or alignment, an unknown or a wrong object. Nothing has changed.

    :ivar value: The value that was refused, where there is a single one.
    :ivar expected: What would have been accepted, in words.
    :ivar reason: For a range that was refused, which rule it breaks: ``"hole"``, ``"no private side"``,
        ``"alignment"``, ``"limit"``, ``"empty"`` (or negative), ``"type"``; else None.
    """

    def __init__(
        self,
        message: str,
        *,
        value: object = None,
        expected: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.value = value
        self.expected = expected
        self.reason = reason


class BusyError(RamblockError):
    """
    Somebody is in the way. Nothing has changed.

    The source is there already, discards are required or forbidden by another user, or a listener called back into the
    operation that is telling it.
    """


class ConversionError(RamblockError):
    """
    A conversion failed before its commit. Every step was put back: attributes, mappings and states are as before.

    The cause is chained (``__cause__``).

    :ivar gpa: Start of the range that was asked for, in guest physical bytes; None outside a guest memory.
    :ivar size: Its size in bytes.
    :ivar to: The state that was asked for (a ``PageState``).
    :ivar step: The step that failed: ``"unmap"``, ``"attribute"``, ``"map"`` or ``"state"``;
        ``"poisoned"`` where none was begun.
    :ivar target: The DMA target or listener that refused, where one did.
    :ivar rolled_back: True: nothing changed. False only in :class:`PoisonedError`.
    """

    rolled_back = True

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
        self.gpa = gpa
        self.size = size
        self.to = to
        self.step = step
        self.target = target


class PoisonedError(ConversionError):
    """
    What a device may reach is no longer known for certain; see ``GuestMemory.in_doubt()``.

    Raised by the call that poisons and by every later one that would change anything. The pages are kept. Permanent.
    """

    rolled_back = False


class MappingLimitError(RamblockError):
    """
    The mapping budget does not hold for the operation and its undo. Raised before anything was done.

    :ivar limit: Entries that may exist at once.
    :ivar needed: Entries that would have to exist at once, in total.
    """

    def __init__(self, message: str, *, limit: int, needed: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.needed = needed


class DmaError(RamblockError, OSError):
    """
    A DMA target refused. Built like any ``OSError``: ``DmaError(errno, text)``, or ``DmaError(text)`` without errno.

    :ivar iova: Start of the range of the call that was refused, in bytes, where known.
    :ivar size: Its size in bytes.
    :ivar in_doubt: False: the call did nothing. True: the target cannot say how much of it was done
        (an iommufd unmap that removed some areas before it failed); whoever holds the mapping has to find out.
    """

    def __init__(
        self,
        *args: object,
        iova: int | None = None,
        size: int | None = None,
        in_doubt: bool = False,
    ) -> None:
        super().__init__(*args)
        self.iova = iova
        self.size = size
        self.in_doubt = in_doubt


class IommuFault(RamblockError):
    """
    A device touched an IOVA that is not mapped, or wrote to a read-only one. No byte was transferred.

    :ivar iova: Start of the device's access, in bytes.
    :ivar size: Its size in bytes.
    :ivar write: Whether it was a write.
    """

    def __init__(self, message: str, *, iova: int, size: int, write: bool) -> None:
        super().__init__(message)
        self.iova = iova
        self.size = size
        self.write = write


class GuestProgramError(RamblockError):
    """
    The guest program cannot go on: an exception, a triple fault, or an answer that it cannot have.

    Its vCPU is of no more use; memory and devices are as they were.

    :ivar rip: Address of the instruction that failed, where it is known.
    :ivar vector: Number of the exception, where there was one.
    :ivar address: What the instruction touched, for a page fault and for an access to where no memory is.
    """

    def __init__(
        self,
        message: str,
        *,
        rip: int | None = None,
        vector: int | None = None,
        address: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rip = rip
        self.vector = vector
        self.address = address


class ProtocolError(RamblockError):
    """
    A rule of the vfio-user protocol was broken; which side did it, says the class. Never raised itself.

    :ivar command: The number of the message's command, where known.
    :ivar message_id: The message's id, where known.
    :ivar offset: Where the message begins, in bytes of the stream since the connection was made, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        command: int | None = None,
        message_id: int | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.command = command
        self.message_id = message_id
        self.offset = offset


class LocalProtocolError(ProtocolError):
    """This side was asked to break the protocol, or to go on with a connection that is over. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol. The connection is of no more use, and its descriptors are closed."""


class TraceError(RamblockError):
    """
    A trace cannot be read further. What was read before it stays valid.

    :ivar path: The file, as it was given.
    :ivar line: 1-based line, or the record's number in a binary trace.
    """

    def __init__(self, message: str, *, path: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.line = line
