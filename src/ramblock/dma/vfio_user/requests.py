# SPDX-License-Identifier: Apache-2.0
"""
The payload of every request as a value.

A value has the fields of one message and nothing else; whether it makes sense (a window that wraps
around, a region that does not exist) is for the server to judge, and to answer with an error.
"""

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
from ramblock.dma.vfio_user.numbers import (
    MAX_MULTI_DATA,
    MAX_MULTI_WRITES,
    Command,
    IrqSetFlags,
)

__all__ = [
    "REQUESTS",
    "DmaMap",
    "DmaRead",
    "DmaUnmap",
    "DmaWrite",
    "GetDeviceInfo",
    "GetIrqInfo",
    "GetRegionInfo",
    "GetRegionIoFds",
    "InvalidRequest",
    "RegionRead",
    "RegionWrite",
    "RegionWriteMulti",
    "Reset",
    "SetIrqs",
    "UnknownRequest",
    "Version",
]

VERSION = struct.Struct("=HH")
_DMA_MAP = struct.Struct("=IIQQQ")
DMA_UNMAP = struct.Struct("=IIQQ")
#: argsz, flags and two more words: DEVICE_GET_INFO, DEVICE_GET_IRQ_INFO, DEVICE_GET_REGION_IO_FDS.
FOUR_WORDS = struct.Struct("=IIII")
REGION_INFO = struct.Struct("=IIIIQQ")
_SET_IRQS = struct.Struct("=IIIII")
REGION_ACCESS = struct.Struct("=QII")
DMA_ACCESS = struct.Struct("=QQ")
MULTI_COUNT = struct.Struct("=Q")
_MULTI_WRITE = struct.Struct(f"=QII{MAX_MULTI_DATA}s")


@dataclass(frozen=True, slots=True)
class Version(Message):
    """The first message: the client's proposed version, and its abilities."""

    command: ClassVar = Command.VERSION
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
class DmaMap(Message):
    """A window to guest memory, with its descriptor or without."""

    command: ClassVar = Command.DMA_MAP
    fixed_size: ClassVar = _DMA_MAP.size
    max_fds: ClassVar = 1
    flags: int
    """:class:`~ramblock.dma.vfio_user.numbers.DmaFlags`, as it came."""
    offset: int
    """First byte in the descriptor."""
    address: int
    """IOVA of the first byte."""
    size: int
    """In bytes."""

    def pack(self) -> bytes:
        """Write it."""
        return _DMA_MAP.pack(_DMA_MAP.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, flags, offset, address, size = read_fixed(_DMA_MAP, payload)
        check_argsz(argsz, _DMA_MAP.size)
        return cls(flags, offset, address, size)


@dataclass(frozen=True, slots=True)
class DmaUnmap(Message):
    """Takes a window away."""

    command: ClassVar = Command.DMA_UNMAP
    fixed_size: ClassVar = DMA_UNMAP.size
    flags: int
    """:class:`~ramblock.dma.vfio_user.numbers.DmaUnmapFlags`, as it came."""
    address: int
    size: int

    def pack(self) -> bytes:
        """Write it."""
        return DMA_UNMAP.pack(DMA_UNMAP.size, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, flags, address, size = read_fixed(DMA_UNMAP, payload)
        check_argsz(argsz, DMA_UNMAP.size)
        return cls(flags, address, size)


@dataclass(frozen=True, slots=True)
class GetDeviceInfo(Message):
    """Asks for the device's description."""

    command: ClassVar = Command.DEVICE_GET_INFO
    fixed_size: ClassVar = FOUR_WORDS.size
    argsz: int = FOUR_WORDS.size
    """How many bytes the payload of the reply may have."""

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, 0, 0, 0)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, *_ = read_fixed(FOUR_WORDS, payload)
        check_argsz(argsz, FOUR_WORDS.size)
        return cls(argsz)


@dataclass(frozen=True, slots=True)
class GetRegionInfo(Message):
    """Asks for one region."""

    command: ClassVar = Command.DEVICE_GET_REGION_INFO
    fixed_size: ClassVar = REGION_INFO.size
    argsz: int
    index: int

    def pack(self) -> bytes:
        """Write it."""
        return REGION_INFO.pack(self.argsz, 0, self.index, 0, 0, 0)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, _, index, *_ = read_fixed(REGION_INFO, payload)
        check_argsz(argsz, REGION_INFO.size)
        return cls(argsz, index)


@dataclass(frozen=True, slots=True)
class GetRegionIoFds(Message):
    """Asks which parts of a region have an ioeventfd or ioregionfd."""

    command: ClassVar = Command.DEVICE_GET_REGION_IO_FDS
    fixed_size: ClassVar = FOUR_WORDS.size
    argsz: int
    index: int

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, 0, self.index, 0)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, _, index, _ = read_fixed(FOUR_WORDS, payload)
        check_argsz(argsz, FOUR_WORDS.size)
        return cls(argsz, index)


@dataclass(frozen=True, slots=True)
class GetIrqInfo(Message):
    """Asks for one kind of interrupt."""

    command: ClassVar = Command.DEVICE_GET_IRQ_INFO
    fixed_size: ClassVar = FOUR_WORDS.size
    argsz: int
    index: int

    def pack(self) -> bytes:
        """Write it."""
        return FOUR_WORDS.pack(self.argsz, 0, self.index, 0)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        argsz, _, index, _ = read_fixed(FOUR_WORDS, payload)
        check_argsz(argsz, FOUR_WORDS.size)
        return cls(argsz, index)


@dataclass(frozen=True, slots=True)
class SetIrqs(Message):
    """
    Configures interrupts.

    With DATA_EVENTFD their eventfds come along, or none to take them away.
    """

    command: ClassVar = Command.DEVICE_SET_IRQS
    max_fds: ClassVar = None
    flags: int
    """:class:`~ramblock.dma.vfio_user.numbers.IrqSetFlags`, as it came."""
    index: int
    start: int
    count: int
    data: bytes = b""
    """With DATA_BOOL one byte for each interrupt."""

    def pack(self) -> bytes:
        """Write it."""
        argsz = _SET_IRQS.size + len(self.data)
        return _SET_IRQS.pack(argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (argsz, flags, index, start, count), data = split_data(_SET_IRQS, payload)
        check_argsz(argsz, _SET_IRQS.size)
        # libvfio-user: lib/irq.c, device_set_irqs_validate().
        if not flags & IrqSetFlags.DATA_BOOL:
            data = b""
        elif len(data) != count:
            raise MalformedError(f"data of {len(data):#x} bytes, expected {count:#x}")
        return cls(flags, index, start, count, data)


@dataclass(frozen=True, slots=True)
class RegionRead(Message):
    """Reads from a region."""

    command: ClassVar = Command.REGION_READ
    fixed_size: ClassVar = REGION_ACCESS.size
    region: int
    offset: int
    count: int

    @property
    def amount(self) -> int:
        """How many bytes to read."""
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
class RegionWrite(Message):
    """Writes to a region."""

    command: ClassVar = Command.REGION_WRITE
    region: int
    offset: int
    data: bytes

    @property
    def amount(self) -> int:
        """How many bytes to write."""
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
class RegionWriteMulti(Message):
    """Several writes of up to eight bytes each, in their order."""

    command: ClassVar = Command.REGION_WRITE_MULTI
    writes: tuple[RegionWrite, ...]

    @property
    def amount(self) -> int:
        """How many writes."""
        return len(self.writes)

    def pack(self) -> bytes:
        """Write it."""
        if len(self.writes) > MAX_MULTI_WRITES:
            raise MalformedError(f"{len(self.writes)} writes, limit {MAX_MULTI_WRITES}")
        parts = [MULTI_COUNT.pack(len(self.writes))]
        for write in self.writes:
            check_multi_count(len(write.data))
            parts.append(_MULTI_WRITE.pack(write.offset, write.region, len(write.data), write.data))
        return b"".join(parts)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        (count,), data = split_data(MULTI_COUNT, payload)
        if count > MAX_MULTI_WRITES:
            raise MalformedError(f"{count} writes, limit {MAX_MULTI_WRITES}")
        if len(data) != count * _MULTI_WRITE.size:
            raise MalformedError(f"{count} writes in {len(data):#x} bytes")
        writes = []
        for offset, region, size, content in _MULTI_WRITE.iter_unpack(data):
            check_multi_count(size)
            writes.append(RegionWrite(region, offset, content[:size]))
        return cls(tuple(writes))


@dataclass(frozen=True, slots=True)
class DmaRead(Message):
    """The server reads guest memory by message."""

    command: ClassVar = Command.DMA_READ
    fixed_size: ClassVar = DMA_ACCESS.size
    address: int
    count: int

    @property
    def amount(self) -> int:
        """How many bytes to read."""
        return self.count

    def pack(self) -> bytes:
        """Write it."""
        return DMA_ACCESS.pack(self.address, self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read it."""
        address, count = read_fixed(DMA_ACCESS, payload)
        return cls(address, count)


@dataclass(frozen=True, slots=True)
class DmaWrite(Message):
    """The server writes guest memory by message."""

    command: ClassVar = Command.DMA_WRITE
    address: int
    data: bytes

    @property
    def amount(self) -> int:
        """How many bytes to write."""
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
class Reset(EmptyMessage):
    """Resets the device."""

    command: ClassVar = Command.DEVICE_RESET


@dataclass(frozen=True, slots=True)
class InvalidRequest(Message):
    """
    A message of the right length that makes no sense: EINVAL is the answer.

    Its descriptors are closed. It is no message that can be sent.
    """

    command: int  # type: ignore[assignment,misc]  # here it is not the class that says which
    reason: str
    """The rule that it breaks."""


@dataclass(frozen=True, slots=True)
class UnknownRequest(Message):
    """
    A command that is not served here: migration, features, or none at all.

    ENOTSUP is the answer.
    """

    max_fds: ClassVar = None
    command: int  # type: ignore[assignment,misc]  # here it is not the class that says which
    payload: bytes

    def pack(self) -> bytes:
        """Write it."""
        return self.payload


#: The class of each command's request.
REQUESTS: dict[int, type[Message]] = {
    request.command: request
    for request in (
        Version,
        DmaMap,
        DmaUnmap,
        GetDeviceInfo,
        GetRegionInfo,
        GetRegionIoFds,
        GetIrqInfo,
        SetIrqs,
        RegionRead,
        RegionWrite,
        RegionWriteMulti,
        DmaRead,
        DmaWrite,
        Reset,
    )
}


def check_argsz(argsz: int, least: int) -> None:
    """Raise :class:`MalformedError` unless *argsz* covers the fixed part."""
    if argsz < least:
        raise MalformedError(f"argsz {argsz:#x}, expected {least:#x} or more")


def check_count(count: int, data: bytes) -> None:
    """Raise :class:`MalformedError` unless *count* says how much data there is."""
    if count != len(data):
        raise MalformedError(f"count {count:#x}, data of {len(data):#x} bytes")


def check_multi_count(count: int) -> None:
    """Raise :class:`MalformedError` unless one write of several can have *count* bytes."""
    if not 0 < count <= MAX_MULTI_DATA:
        raise MalformedError(f"a write of {count:#x} bytes, expected 1 to {MAX_MULTI_DATA}")
