# SPDX-License-Identifier: Apache-2.0
"""The payload of every reply as a value, and the rules by which it fits its request."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from ramblock.dma.vfio_user.capabilities import Capabilities
from ramblock.dma.vfio_user.layout import (
    EmptyMessage,
    MalformedError,
    Message,
    read_fixed,
    split_data,
)
from ramblock.dma.vfio_user.numbers import FROM_SERVER, Command
from ramblock.dma.vfio_user.requests import (
    DMA_ACCESS,
    DMA_UNMAP,
    FOUR_WORDS,
    MULTI_COUNT,
    REGION_ACCESS,
    REGION_INFO,
    VERSION,
    Version,
    check_argsz,
    check_count,
)

__all__ = [
    "REPLIES",
    "DeviceInfoReply",
    "DmaMapReply",
    "DmaReadReply",
    "DmaUnmapReply",
    "DmaWriteReply",
    "ErrorReply",
    "InvalidReply",
    "IrqInfoReply",
    "RegionInfoReply",
    "RegionIoFdsReply",
    "RegionReadReply",
    "RegionWriteMultiReply",
    "RegionWriteReply",
    "ResetReply",
    "SetIrqsReply",
    "UnknownReply",
    "VersionReply",
    "check_answer",
]

# The count in the answer to DMA_WRITE has four bytes in the specification, eight in QEMU 11.1 and
# in libvfio-user (include/vfio-user.h, struct vfio_user_dma_region_access).
_SHORT_DMA_ACCESS = struct.Struct("=QI")


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The command failed."""

    command: int
    errno: int
    """0 where the peer does not say which."""


@dataclass(frozen=True, slots=True)
class InvalidReply(ErrorReply):
    """A client's answer that makes no sense: nothing can be taken from it."""

    reason: str
    """The rule that it breaks."""


@dataclass(frozen=True, slots=True)
class VersionReply(Message):
    """The version that holds from now on, and the server's abilities."""

    command: ClassVar = Command.VERSION
    max_fds: ClassVar = None
    repeats: ClassVar = ("major",)
    major: int
    minor: int
    capabilities: Capabilities

    def pack(self) -> bytes:
        """Write it."""
        return VERSION.pack(self.major, self.minor) + self.capabilities.pack()

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (major, minor), data = split_data(VERSION, payload)
        return cls(major, minor, Capabilities.unpack(data))


@dataclass(frozen=True, slots=True)
class DmaMapReply(EmptyMessage):
    """The window is there."""

    command: ClassVar = Command.DMA_MAP


@dataclass(frozen=True, slots=True)
class DmaUnmapReply(Message):
    """The unmapped range; the request with its size as it was carried out."""

    command: ClassVar = Command.DMA_UNMAP
    fixed_size: ClassVar = DMA_UNMAP.size
    repeats: ClassVar = ("address",)
    flags: int
    address: int
    size: int

    def pack(self) -> bytes:
        """Write it."""
        return DMA_UNMAP.pack(DMA_UNMAP.size, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        _, flags, address, size = read_fixed(DMA_UNMAP, payload)
        return cls(flags, address, size)


@dataclass(frozen=True, slots=True)
class DeviceInfoReply(Message):
    """The device's description."""

    command: ClassVar = Command.DEVICE_GET_INFO
    fixed_size: ClassVar = FOUR_WORDS.size
    argsz: int
    flags: int
    """:class:`~ramblock.uapi.vfio.DeviceFlags`, as it came."""
    num_regions: int
    num_irqs: int

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        return cls(*read_fixed(FOUR_WORDS, payload))


@dataclass(frozen=True, slots=True)
class RegionInfoReply(Message):
    """One region; with VFIO_REGION_INFO_FLAG_MMAP its descriptor comes along."""

    command: ClassVar = Command.DEVICE_GET_REGION_INFO
    repeats: ClassVar = ("index",)
    max_fds: ClassVar = None
    argsz: int
    """
    Bytes of the whole payload.

    More than were sent: the capabilities did not fit the request's argsz.
    """
    flags: int
    """:class:`~ramblock.uapi.vfio.RegionFlags`, as it came."""
    index: int
    cap_offset: int
    size: int
    """In bytes."""
    offset: int
    """Where the region begins in its descriptor."""
    capabilities: bytes = b""
    """
    VFIO's chain of capabilities, undecoded.

    *cap_offset* counts from the start of the payload.
    """

    def pack(self) -> bytes:
        """Write it."""
        fixed = REGION_INFO.pack(
            self.argsz, self.flags, self.index, self.cap_offset, self.size, self.offset
        )
        return fixed + self.capabilities

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (argsz, flags, index, cap_offset, size, offset), rest = split_data(REGION_INFO, payload)
        check_argsz(argsz, len(payload))
        return cls(argsz, flags, index, cap_offset, size, offset, rest)


@dataclass(frozen=True, slots=True)
class RegionIoFdsReply(Message):
    """Parts of a region with descriptors of their own."""

    command: ClassVar = Command.DEVICE_GET_REGION_IO_FDS
    repeats: ClassVar = ("index",)
    max_fds: ClassVar = None
    argsz: int
    flags: int
    index: int
    count: int
    parts: bytes = b""
    """The array of parts, undecoded."""

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, self.flags, self.index, self.count) + self.parts

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (argsz, flags, index, count), parts = split_data(FOUR_WORDS, payload)
        check_argsz(argsz, len(payload))
        return cls(argsz, flags, index, count, parts)


@dataclass(frozen=True, slots=True)
class IrqInfoReply(Message):
    """One kind of interrupt."""

    command: ClassVar = Command.DEVICE_GET_IRQ_INFO
    fixed_size: ClassVar = FOUR_WORDS.size
    repeats: ClassVar = ("index",)
    argsz: int
    flags: int
    """:class:`~ramblock.dma.vfio_user.numbers.IrqInfoFlags`, as it came."""
    index: int
    count: int

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, self.flags, self.index, self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        return cls(*read_fixed(FOUR_WORDS, payload))


@dataclass(frozen=True, slots=True)
class SetIrqsReply(EmptyMessage):
    """The interrupts are set."""

    command: ClassVar = Command.DEVICE_SET_IRQS


@dataclass(frozen=True, slots=True)
class RegionReadReply(Message):
    """The data read."""

    command: ClassVar = Command.REGION_READ
    repeats: ClassVar = ("region", "offset")
    region: int
    offset: int
    data: bytes

    @property
    def amount(self) -> int:
        """How many bytes were read."""
        return len(self.data)

    def pack(self) -> bytes:
        """Write it."""
        return REGION_ACCESS.pack(self.offset, self.region, len(self.data)) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (offset, region, count), data = split_data(REGION_ACCESS, payload)
        check_count(count, data)
        return cls(region, offset, data)


@dataclass(frozen=True, slots=True)
class RegionWriteReply(Message):
    """How much was written."""

    command: ClassVar = Command.REGION_WRITE
    fixed_size: ClassVar = REGION_ACCESS.size
    repeats: ClassVar = ("region", "offset")
    region: int
    offset: int
    count: int

    @property
    def amount(self) -> int:
        """How many bytes were written."""
        return self.count

    def pack(self) -> bytes:
        """Write it."""
        return REGION_ACCESS.pack(self.offset, self.region, self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        offset, region, count = read_fixed(REGION_ACCESS, payload)
        return cls(region, offset, count)


@dataclass(frozen=True, slots=True)
class RegionWriteMultiReply(Message):
    """How many of the writes were made."""

    command: ClassVar = Command.REGION_WRITE_MULTI
    fixed_size: ClassVar = MULTI_COUNT.size
    count: int

    @property
    def amount(self) -> int:
        """How many writes were made."""
        return self.count

    def pack(self) -> bytes:
        """Write it."""
        return MULTI_COUNT.pack(self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        return cls(*read_fixed(MULTI_COUNT, payload))


@dataclass(frozen=True, slots=True)
class DmaReadReply(Message):
    """The data read."""

    command: ClassVar = Command.DMA_READ
    repeats: ClassVar = ("address",)
    address: int
    data: bytes

    @property
    def amount(self) -> int:
        """How many bytes were read."""
        return len(self.data)

    def pack(self) -> bytes:
        """Write it."""
        return DMA_ACCESS.pack(self.address, len(self.data)) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (address, count), data = split_data(DMA_ACCESS, payload)
        check_count(count, data)
        return cls(address, data)


@dataclass(frozen=True, slots=True)
class DmaWriteReply(Message):
    """How much was written."""

    command: ClassVar = Command.DMA_WRITE
    fixed_size: ClassVar = DMA_ACCESS.size
    repeats: ClassVar = ("address",)
    address: int
    count: int

    @property
    def amount(self) -> int:
        """How many bytes were written."""
        return self.count

    def pack(self) -> bytes:
        """Write it, as QEMU and libvfio-user do."""
        return DMA_ACCESS.pack(self.address, self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it in either width."""
        short = len(payload) == _SHORT_DMA_ACCESS.size
        return cls(*read_fixed(_SHORT_DMA_ACCESS if short else DMA_ACCESS, payload))


@dataclass(frozen=True, slots=True)
class ResetReply(EmptyMessage):
    """The device is reset."""

    command: ClassVar = Command.DEVICE_RESET


@dataclass(frozen=True, slots=True)
class UnknownReply(Message):
    """A peer's answer to a command that is not known here."""

    max_fds: ClassVar = None
    command: int  # type: ignore[assignment,misc]  # here it is not the class that says which
    payload: bytes

    def pack(self) -> bytes:
        """Write it."""
        return self.payload


#: The class of each command's reply.
REPLIES: dict[int, type[Message]] = {
    reply.command: reply
    for reply in (
        VersionReply,
        DmaMapReply,
        DmaUnmapReply,
        DeviceInfoReply,
        RegionInfoReply,
        RegionIoFdsReply,
        IrqInfoReply,
        SetIrqsReply,
        RegionReadReply,
        RegionWriteReply,
        RegionWriteMultiReply,
        DmaReadReply,
        DmaWriteReply,
        ResetReply,
    )
}


def check_answer(request: Message, reply: Message) -> None:
    """
    Check that *reply* answers *request*: the same place, and no more of it than was asked for.

    A region may be read or written in part; DMA is done whole or not at all.

    :raises MalformedError: It does not.
    """
    for name in reply.repeats:
        expected, found = getattr(request, name), getattr(reply, name)
        if found != expected:
            raise MalformedError(f"{name} {found:#x}, the request's is {expected:#x}")
    if isinstance(request, Version) and isinstance(reply, VersionReply):
        if reply.minor > request.minor:
            raise MalformedError(f"minor version {reply.minor}, proposed was {request.minor}")
    elif reply.amount > request.amount or (
        reply.command in FROM_SERVER and reply.amount != request.amount
    ):
        raise MalformedError(f"{reply.amount:#x} done, {request.amount:#x} were asked for")
