"""Each message against its bytes, written out by hand from the specification's tables."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.vfio_user.capabilities import Capabilities
from ramblock.dma.vfio_user.messages import (
    DeviceInfoReply,
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    DmaWriteReply,
    GetDeviceInfo,
    GetIrqInfo,
    GetRegionInfo,
    GetRegionIoFds,
    IrqInfoReply,
    MalformedError,
    Message,
    RegionInfoReply,
    RegionIoFdsReply,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
    RegionWriteReply,
    Reset,
    ResetReply,
    SetIrqs,
    SetIrqsReply,
    Version,
    VersionReply,
)
from ramblock.dma.vfio_user.numbers import Command, command_name
from ramblock.dma.vfio_user.replies import REPLIES, check_answer
from ramblock.dma.vfio_user.requests import REQUESTS


def words(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def longs(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


JSON = Capabilities().pack()

# A byte less than these has to be refused.
CASES: list[tuple[Message, bytes]] = [
    (Version(0, 1, Capabilities()), struct.pack("=HH", 0, 1) + JSON),
    (VersionReply(0, 0, Capabilities()), struct.pack("=HH", 0, 0) + JSON),
    (DmaMap(3, 0x1000, 0x2000, 0x3000), words(32, 3) + longs(0x1000, 0x2000, 0x3000)),
    (DmaMapReply(), b""),
    (DmaUnmap(2, 0x2000, 0x3000), words(24, 2) + longs(0x2000, 0x3000)),
    (DmaUnmapReply(0, 0x2000, 0x3000), words(24, 0) + longs(0x2000, 0x3000)),
    (GetDeviceInfo(), words(16, 0, 0, 0)),
    (DeviceInfoReply(16, 3, 9, 5), words(16, 3, 9, 5)),
    (GetRegionInfo(32, 7), words(32, 0, 7, 0) + longs(0, 0)),
    (RegionInfoReply(32, 7, 1, 0, 0x1000, 0x2000), words(32, 7, 1, 0) + longs(0x1000, 0x2000)),
    (GetRegionIoFds(16, 2), words(16, 0, 2, 0)),
    (RegionIoFdsReply(16, 0, 2, 0), words(16, 0, 2, 0)),
    (GetIrqInfo(16, 2), words(16, 0, 2, 0)),
    (IrqInfoReply(16, 1, 2, 8), words(16, 1, 2, 8)),
    (SetIrqs(1 | 32, 2, 3, 4), words(20, 33, 2, 3, 4)),
    (SetIrqs(2 | 32, 0, 0, 3, b"\1\0\1"), words(23, 34, 0, 0, 3) + b"\1\0\1"),
    (SetIrqsReply(), b""),
    (RegionRead(7, 0x10, 4), longs(0x10) + words(7, 4)),
    (RegionReadReply(7, 0x10, b"abcd"), longs(0x10) + words(7, 4) + b"abcd"),
    (RegionWrite(7, 0x10, b"abc"), longs(0x10) + words(7, 3) + b"abc"),
    (RegionWriteReply(7, 0x10, 3), longs(0x10) + words(7, 3)),
    (RegionWriteMulti(()), longs(0)),
    (
        RegionWriteMulti((RegionWrite(1, 2, b"x"), RegionWrite(3, 4, b"12345678"))),
        longs(2, 2) + words(1, 1) + b"x" + bytes(7) + longs(4) + words(3, 8) + b"12345678",
    ),
    (RegionWriteMultiReply(2), longs(2)),
    (DmaRead(0x10, 4), longs(0x10, 4)),
    (DmaReadReply(0x10, b"abcd"), longs(0x10, 4) + b"abcd"),
    (DmaWrite(0x10, b"abc"), longs(0x10, 3) + b"abc"),
    (DmaWriteReply(0x10, 3), longs(0x10, 3)),
    (Reset(), b""),
    (ResetReply(), b""),
]
IDS = [f"{type(message).__name__}-{number}" for number, (message, _) in enumerate(CASES)]


@pytest.mark.parametrize(("message", "payload"), CASES, ids=IDS)
def test_bytes_of_a_message(message: Message, payload: bytes) -> None:
    assert message.pack() == payload
    assert type(message).unpack(payload) == message


@pytest.mark.parametrize(("message", "payload"), CASES, ids=IDS)
def test_a_byte_too_few_or_too_many(message: Message, payload: bytes) -> None:
    """
    More is ignored where no byte of it means anything.

    As libvfio-user does it, whose handlers compare with "less than" (lib/libvfio-user.c).
    """
    if type(message).fixed_size is not None or (isinstance(message, SetIrqs) and not message.data):
        assert type(message).unpack(payload + b"\0") == message
    else:
        with pytest.raises(MalformedError):
            type(message).unpack(payload + b"\0")
    for size in range(len(payload)):
        if size == 4 and isinstance(message, Version | VersionReply):
            # It may end behind its numbers.
            assert type(message).unpack(payload[:size]).capabilities == Capabilities()
        elif not (size == 12 and isinstance(message, DmaWriteReply)):  # that is its other width
            with pytest.raises(MalformedError):
                type(message).unpack(payload[:size])


def test_every_command_has_its_request_and_its_reply() -> None:
    unserved = {Command.DEVICE_FEATURE, Command.MIG_DATA_READ, Command.MIG_DATA_WRITE}
    assert set(REQUESTS) == set(REPLIES) == set(Command) - unserved
    assert {type(message) for message, _ in CASES} == {*REQUESTS.values(), *REPLIES.values()}
    assert command_name(2) == "DMA_MAP"
    assert command_name(99) == "command 99"


def test_capabilities_of_a_region_are_kept() -> None:
    payload = words(48, 15, 1, 32) + longs(0x1000, 0) + bytes(range(16))
    reply = RegionInfoReply.unpack(payload)
    assert reply.capabilities == bytes(range(16))
    assert reply.pack() == payload
    # They did not fit what the request had room for.
    assert RegionInfoReply.unpack(words(48, 15, 1, 32) + longs(0x1000, 0)).argsz == 48


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (DmaMap, words(31, 3) + longs(0, 0, 0)),
        (DmaUnmap, words(23, 0) + longs(0, 0)),
        (GetDeviceInfo, words(15, 0, 0, 0)),
        (GetRegionInfo, words(31, 0, 0, 0) + longs(0, 0)),
        (GetRegionIoFds, words(15, 0, 0, 0)),
        (GetIrqInfo, words(15, 0, 0, 0)),
        (SetIrqs, words(19, 1, 0, 0, 0)),
        (SetIrqs, words(24, 2, 0, 0, 3) + words(0)),
        (SetIrqs, words(20, 2, 0, 0, 0xFFFF_FFFF)),
        (RegionWrite, longs(0) + words(0, 0xFFFF_FFFF) + b"abc"),
        (RegionReadReply, longs(0) + words(0, 0) + b"abc"),
        (DmaWrite, longs(0, 1 << 63) + b"abc"),
        (DmaWrite, longs(0, 3 | 1 << 32) + b"abc"),
        (RegionWriteMulti, longs(1 << 63)),
        (RegionWriteMulti, longs(201) + bytes(201 * 24)),
        (RegionWriteMulti, longs(1) + longs(0) + words(0, 9) + bytes(8)),
        (RegionWriteMulti, longs(1) + longs(0) + words(0, 0) + bytes(8)),
        (RegionWriteMulti, longs(2) + longs(0) + words(0, 1) + bytes(8)),
    ],
)
def test_counts_that_do_not_fit(kind: type[Message], payload: bytes) -> None:
    with pytest.raises(MalformedError):
        kind.unpack(payload)


@pytest.mark.parametrize(
    "message",
    [
        RegionWriteMulti((RegionWrite(0, 0, bytes(9)),)),
        RegionWriteMulti((RegionWrite(0, 0, b""),)),
        RegionWriteMulti((RegionWrite(0, 0, b"x"),) * 201),
    ],
)
def test_what_cannot_be_written_in_one_message(message: Message) -> None:
    with pytest.raises(MalformedError):
        message.pack()


@pytest.mark.parametrize(
    ("request_message", "reply"),
    [
        (Version(0, 0, Capabilities()), VersionReply(1, 0, Capabilities())),
        (Version(0, 0, Capabilities()), VersionReply(0, 1, Capabilities())),
        (DmaUnmap(0, 0x1000, 0x1000), DmaUnmapReply(0, 0x2000, 0x1000)),
        (GetRegionInfo(32, 1), RegionInfoReply(32, 0, 2, 0, 0, 0)),
        (GetRegionIoFds(16, 1), RegionIoFdsReply(16, 0, 2, 0)),
        (GetIrqInfo(16, 1), IrqInfoReply(16, 0, 2, 0)),
        (RegionRead(1, 0, 4), RegionReadReply(1, 0, bytes(5))),
        (RegionRead(1, 0, 4), RegionReadReply(2, 0, bytes(4))),
        (RegionRead(1, 0, 4), RegionReadReply(1, 4, bytes(4))),
        (RegionWrite(1, 0, bytes(4)), RegionWriteReply(1, 0, 5)),
        (RegionWriteMulti((RegionWrite(1, 0, b"x"),)), RegionWriteMultiReply(2)),
        (DmaRead(0, 4), DmaReadReply(1, bytes(4))),
        (DmaRead(0, 4), DmaReadReply(0, bytes(5))),
        (DmaRead(0, 4), DmaReadReply(0, bytes(3))),
        (DmaWrite(0, bytes(4)), DmaWriteReply(0, 3)),
    ],
)
def test_replies_that_answer_something_else(request_message: Message, reply: Message) -> None:
    with pytest.raises(MalformedError):
        check_answer(request_message, reply)


@pytest.mark.parametrize(
    ("request_message", "reply"),
    [
        (Version(0, 1, Capabilities()), VersionReply(0, 0, Capabilities(max_msg_fds=0))),
        # How much was unmapped is for the client to judge.
        (DmaUnmap(0, 0x1000, 0x2000), DmaUnmapReply(0, 0x1000, 0x1000)),
        (RegionRead(1, 0, 4), RegionReadReply(1, 0, bytes(3))),
        (DmaRead(0, 4), DmaReadReply(0, bytes(4))),
        (GetDeviceInfo(), DeviceInfoReply(16, 0, 0, 0)),
    ],
)
def test_replies_that_answer(request_message: Message, reply: Message) -> None:
    check_answer(request_message, reply)


def test_the_answer_to_a_dma_write_in_either_width() -> None:
    assert DmaWriteReply.unpack(longs(0x10) + words(4)) == DmaWriteReply(0x10, 4)


@given(st.sampled_from([*REQUESTS.values(), *REPLIES.values()]), st.binary(max_size=300))
def test_any_payload_is_a_message_or_malformed(kind: type[Message], payload: bytes) -> None:
    try:
        message = kind.unpack(payload)
    except MalformedError:
        return
    assert kind.unpack(message.pack()) == message
