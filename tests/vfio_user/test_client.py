"""The client as a DMA target, against a server in the same process that behaves, or does not."""

import errno
import gc
import logging
import mmap
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

from descriptors import open_descriptors
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.dma.soft import FaultRecord
from ramblock.dma.vfio_user import Capabilities, Outgoing, Reply, Request
from ramblock.dma.vfio_user.header import Header
from ramblock.dma.vfio_user.messages import (
    DeviceInfoReply,
    DmaMap,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    DmaWriteReply,
    ErrorReply,
    Message,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
    Reset,
    UnknownRequest,
    Version,
)
from ramblock.errors import (
    BusyError,
    ConversionError,
    DmaError,
    IommuFault,
    PoisonedError,
    RemoteProtocolError,
    UsageError,
)
from ramblock.hostmem import BackendKind, HostMemoryBackend
from ramblock.hostmem.host_calls import address_of
from ramblock.testing.conformance import check_target
from ramblock.units import MIB, PAGE_SIZE
from require import require_hugetlb
from vfio_user_server import Hook, RemoteIommu, Server, served

P = PAGE_SIZE
BASE = 1 << 32
NO_FDS = Capabilities(max_msg_fds=0)


@pytest.fixture(autouse=True)
def no_descriptor_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    before = open_descriptors()
    yield
    if "poisons" in request.node.name:
        return  # the pages are kept
    assert open_descriptors() == before


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", 16 * P) as block:
        yield block


def part(block: RamBlock, first: int, count: int = 1) -> HostRange:
    return HostRange(block.fd, first * P, block.address + first * P, count * P)


def on(kind: type[Message], answer: "Message | int | Outgoing | Hook") -> Hook:
    """Answers requests of one kind like this, and all others as usual."""

    def hook(server: Server, request: Request) -> Message | int | Outgoing | None:
        if not isinstance(request.message, kind):
            return None
        return answer(server, request) if callable(answer) else answer

    return hook


def die(server: Server, _request: Request) -> None:
    server.die()


def stay_silent(server: Server, _request: Request) -> None:
    server.awake.clear()
    server.awake.wait()


def all_kinds(iommu: RemoteIommu, block: RamBlock) -> None:
    """One call of each kind that a hook is for."""
    iommu.map(BASE, part(block, 0))
    iommu.unmap(BASE, P)
    iommu.target.reset()


def again_and_again(call: Callable[[], object]) -> None:
    while True:
        call()


# -- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [Capabilities(max_msg_fds=1), NO_FDS], ids=["fd", "no fd"])
def test_it_is_a_target_like_any_other(capabilities: Capabilities) -> None:
    made: list[RemoteIommu] = []

    def make() -> RemoteIommu:
        made.append(RemoteIommu(capabilities=capabilities))
        return made[-1]

    check_target(make, device=lambda iommu: iommu, examples=50)
    assert all(iommu.target.violations == 0 for iommu in made)


def test_capabilities_are_the_servers() -> None:
    theirs = Capabilities(max_dma_maps=17, pgsizes=0x20_1000)
    with served(capabilities=theirs) as iommu:
        found = iommu.capabilities
        assert (found.page_size, found.max_mappings, found.cut, found.exact) == (P, 17, False, True)


@pytest.mark.parametrize("capabilities", [Capabilities(max_msg_fds=1), NO_FDS], ids=["fd", "no fd"])
def test_dma_through_a_window(block: RamBlock, capabilities: Capabilities) -> None:
    with served(capabilities=capabilities) as iommu:
        iommu.map(BASE, part(block, 3, 2))
        iommu.map(BASE + 2 * P, part(block, 9), writable=False)
        block.write(3 * P, b"from the guest")
        assert iommu.read(BASE, 14) == b"from the guest"
        iommu.write(BASE + 2 * P - 5, b"there")
        assert block.read(5 * P - 5, 5) == b"there"
        with pytest.raises(IommuFault):
            iommu.write(BASE + 2 * P, b"x")
        window = iommu.server.windows[BASE]
        assert len(window.fds) == capabilities.max_msg_fds
        assert window.offset == (3 * P if capabilities.max_msg_fds else 0)


def test_anonymous_memory_goes_without_descriptor() -> None:
    mapping = mmap.mmap(-1, P)
    with served() as iommu:
        iommu.map(BASE, HostRange(None, 0, address_of(mapping), P))
        iommu.write(BASE + 5, b"hello")
        assert mapping[5:10] == b"hello"
        assert iommu.read(BASE + 4, 7) == b"\0hello\0"
        iommu.unmap(BASE, P)
    gc.collect()
    mapping.close()


@require_hugetlb
def test_huge_pages_by_message() -> None:
    backend = HostMemoryBackend(size=2 * MIB, kind=BackendKind.HUGETLB, page_size=2 * MIB)
    with RamBlock.from_backend("ram", backend) as block, served(capabilities=NO_FDS) as iommu:
        iommu.map(BASE, HostRange(block.fd, 0, block.address, 2 * MIB))
        iommu.write(BASE + 7, b"huge")
        assert iommu.read(BASE + 7, 4) == block.read(7, 4) == b"huge"


def test_thousands_of_windows(block: RamBlock) -> None:
    with served() as iommu:
        for number in range(3000):
            iommu.map(BASE + number * P, part(block, number % 16))
        assert len(iommu.mappings()) == 3000
        for number in range(0, 3000, 2):
            assert iommu.unmap(BASE + number * P, P) == P
        assert len(iommu.mappings()) == 1500
        # The rest is the close's.
        iommu.target.close()
        assert iommu.target.mappings() == []
        iommu.server.join()
        assert iommu.server.windows == {}
        assert iommu.server.error is None


def test_the_device(block: RamBlock) -> None:
    with served(capabilities=Capabilities(max_data_xfer_size=16)) as iommu:
        target = iommu.target
        assert target.device_info() == DeviceInfoReply(16, 2, 2, 0)
        assert [region.size for region in target.regions()] == [0x1000, 0]
        data = bytes(range(100))
        target.region_write(0, 8, data)
        assert target.region_read(0, 0, 200) == bytes(8) + data + bytes(92)
        assert (
            max(len(one.data) for one in iommu.server.requests if isinstance(one, RegionWrite))
            == 16
        )
        target.reset()
        assert iommu.server.resets == 1
        for bad in ((0, -1, 4), (0, 0, 0), (0, 1 << 64, 1)):
            with pytest.raises(UsageError):
                target.region_read(*bad)
        with pytest.raises(UsageError):
            target.region_write(0, 0, b"")
        with pytest.raises(DmaError, match="the server refused REGION_READ") as caught:
            target.region_read(1, 0, 4)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(DmaError) as caught:
            target.region_read(1 << 32, 0, 4)
        assert caught.value.errno == errno.EINVAL
        assert not caught.value.in_doubt
        assert repr(target) == "<VfioUserTarget at a socket, connected>"


@pytest.mark.parametrize(
    ("hook", "call", "number"),
    [
        (on(RegionRead, RegionReadReply(0, 0, b"abc")), "region_read(0, 0, 4)", errno.EIO),
        (on(RegionWrite, RegionWriteReply(0, 0, 0)), "region_write(0, 0, b'abcd')", errno.EIO),
        (
            lambda server, request: (
                DeviceInfoReply(16, 2, 1 << 31, 0)
                if "DeviceInfo" in repr(request.message)
                else None
            ),
            "regions()",
            errno.EPROTO,
        ),
    ],
)
def test_devices_that_answer_nonsense(hook: Hook, call: str, number: int) -> None:
    with served(hook=hook) as iommu:
        with pytest.raises(DmaError) as caught:
            eval(f"target.{call}", {"target": iommu.target})
        assert caught.value.errno == number


def test_a_server_that_takes_no_data() -> None:
    ours, theirs = socket.socketpair()
    server = Server(theirs, capabilities=Capabilities(max_data_xfer_size=0))
    with pytest.raises(RemoteProtocolError, match="no room for a byte"):
        VfioUserTarget(ours)
    server.join()


# -- refusals, which change nothing ----------------------------------------------------------------


def test_what_is_refused_on_this_side(block: RamBlock) -> None:
    with served(capabilities=Capabilities(max_dma_maps=2, pgsizes=4 * P)) as iommu:
        good = part(block, 0, 4)

        def fails(number: int, what: str, *arguments: object) -> None:
            with pytest.raises(DmaError) as caught:
                getattr(iommu.target, what)(*arguments)
            assert caught.value.errno == number
            assert not caught.value.in_doubt

        for iova in (-4 * P, P, 1 << 64, (1 << 64) - P):
            fails(errno.EINVAL, "map", iova, good)
            fails(errno.EINVAL, "unmap", iova, 4 * P)
        for size in (0, P, -4 * P):
            fails(errno.EINVAL, "unmap", 0, size)
        fails(errno.EINVAL, "map", 0, HostRange(block.fd, -1, block.address, 4 * P))
        fails(errno.EBADF, "map", 0, HostRange(9999, 0, block.address, 4 * P))
        assert iommu.mappings() == []
        iommu.map(BASE, part(block, 0, 8))
        fails(errno.EEXIST, "map", BASE + 4 * P, good)
        for iova, size in (
            (BASE, 4 * P),
            (BASE + 4 * P, 4 * P),
            (BASE - 4 * P, 12 * P),
            (0, 4 * P),
        ):
            fails(errno.ENOENT, "unmap", iova, size)
        iommu.map(0, good)
        fails(errno.ENOSPC, "map", 2 * BASE, good)
        asked = [one for one in iommu.server.requests if isinstance(one, DmaMap | DmaUnmap)]
        assert len(asked) == 2
        assert iommu.unmap(BASE, 8 * P) == 8 * P


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOENT, 4095])
def test_what_the_server_refuses(block: RamBlock, number: int) -> None:
    refused: list[type[Message]] = [DmaMap]

    def hook(server: Server, request: Request) -> int | None:
        return number if type(request.message) in refused else None

    with served(hook=hook) as iommu:
        with pytest.raises(DmaError, match="the server refused DMA_MAP") as caught:
            iommu.map(BASE, part(block, 0))
        error = caught.value
        assert (error.errno, error.iova, error.size, error.in_doubt) == (number, BASE, P, False)
        assert iommu.mappings() == []
        refused[0] = DmaUnmap
        iommu.map(BASE, part(block, 0))
        with pytest.raises(DmaError, match="the server refused DMA_UNMAP") as caught:
            iommu.unmap(BASE, P)
        assert (caught.value.errno, caught.value.in_doubt) == (number, False)
        assert len(iommu.mappings()) == 1
        refused.clear()
        assert iommu.unmap(BASE, P) == P


def test_a_server_that_does_not_say_why(block: RamBlock) -> None:
    def refuse(server: Server, request: Request) -> Outgoing:
        # Connection.error() does not send that.
        answer = server.link.connection.error(request, 1)
        header = Header.unpack(answer.data)._replace(errno=0)
        return Outgoing(answer.message_id, header.pack())

    with served(hook=on(DmaMap, refuse)) as iommu:
        with pytest.raises(DmaError, match="did not say why") as caught:
            iommu.map(BASE, part(block, 0))
        assert caught.value.errno is None
        assert not caught.value.in_doubt


# -- what leaves it open what happened -------------------------------------------------------------


def in_doubt(iommu: RemoteIommu, block: RamBlock, number: int) -> None:
    """Every call says so, at once; closing is quiet."""
    started = monotonic()
    for call in (
        lambda: iommu.target.map(2 * BASE, part(block, 1)),
        lambda: iommu.target.unmap(BASE, P),
        iommu.target.device_info,
    ):
        with pytest.raises(DmaError, match="is lost") as caught:
            call()
        assert caught.value.in_doubt
        assert caught.value.errno == number
        assert caught.value.__cause__ is iommu.target.failure
    assert monotonic() - started < 5
    assert repr(iommu.target) == "<VfioUserTarget at a socket, failed>"


@pytest.mark.parametrize("kind", [DmaMap, DmaUnmap, Reset])
def test_a_server_that_dies_instead_of_answering(block: RamBlock, kind: type[Message]) -> None:
    with served(hook=on(kind, die)) as iommu:
        started = monotonic()
        with pytest.raises(DmaError) as caught:
            all_kinds(iommu, block)
        assert caught.value.in_doubt
        assert caught.value.errno == errno.ECONNRESET
        assert monotonic() - started < 5
        in_doubt(iommu, block, errno.ECONNRESET)


def test_a_server_that_dies_between_calls(block: RamBlock) -> None:
    with served() as iommu:
        iommu.map(BASE, part(block, 0))
        iommu.server.die()
        iommu.server.join()
        with pytest.raises(DmaError) as caught:
            again_and_again(iommu.target.reset)
        assert caught.value.in_doubt


@pytest.mark.parametrize("kind", [DmaMap, DmaUnmap, Reset])
def test_a_server_that_does_not_answer(block: RamBlock, kind: type[Message]) -> None:
    with served(hook=on(kind, stay_silent), timeout=0.3) as iommu:
        with pytest.raises(DmaError) as caught:
            all_kinds(iommu, block)
        assert caught.value.in_doubt
        assert caught.value.errno == errno.ETIMEDOUT
        in_doubt(iommu, block, errno.ETIMEDOUT)
        # It answers after all. Nobody is there to hear it.
        iommu.server.awake.set()
        in_doubt(iommu, block, errno.ETIMEDOUT)


def test_a_server_that_does_not_read(block: RamBlock) -> None:
    with served(timeout=0.3) as iommu:
        iommu.server.awake.clear()
        with pytest.raises(DmaError) as caught:
            again_and_again(lambda: iommu.target.region_write(0, 0, bytes(1 << 20)))
        assert caught.value.errno == errno.ETIMEDOUT
        in_doubt(iommu, block, errno.ETIMEDOUT)


@pytest.mark.parametrize("size", [0, P, 3 * P, 1 << 63])
def test_an_unmap_of_another_size(block: RamBlock, size: int) -> None:
    def hook(server: Server, request: Request) -> Message | None:
        done = server.carry_out(request)
        assert isinstance(done, DmaUnmapReply)
        return DmaUnmapReply(done.flags, done.address, size)

    with served(hook=on(DmaUnmap, hook)) as iommu:
        iommu.map(BASE, part(block, 0, 2))
        with pytest.raises(DmaError) as caught:
            iommu.unmap(BASE, 2 * P)
        assert caught.value.in_doubt
        assert caught.value.errno == errno.EPROTO
        assert "not 0x2000" in str(caught.value.__cause__)
        in_doubt(iommu, block, errno.EPROTO)


def raw(command: int, payload: bytes = b"", **fields: int) -> "Hook":
    """An answer as no connection would make it."""

    def hook(server: Server, request: Request) -> Outgoing:
        values = {"flags": 1, "message_id": request.message_id, **fields}
        header = Header(command=command, size=16 + len(payload), **values)
        return Outgoing(request.message_id, header.pack() + payload)

    return hook


@pytest.mark.parametrize(
    "answer",
    [
        raw(2),
        raw(3, bytes(23)),
        raw(3, bytes(24)),
        raw(3, message_id=4711),
        raw(99, flags=7),
    ],
)
def test_a_server_that_breaks_the_protocol(block: RamBlock, answer: Hook) -> None:
    with served(hook=on(DmaUnmap, answer)) as iommu:
        iommu.map(BASE, part(block, 0))
        with pytest.raises(DmaError) as caught:
            iommu.unmap(BASE, P)
        assert caught.value.in_doubt
        assert isinstance(caught.value.__cause__, RemoteProtocolError)
        in_doubt(iommu, block, errno.EPROTO)


@pytest.mark.parametrize(("command", "payload"), [(13, b""), (1, bytes(4)), (11, bytes(3))])
def test_a_command_that_makes_no_sense(block: RamBlock, command: int, payload: bytes) -> None:
    """The server is told EINVAL, and the client goes on."""

    def hook(server: Server, request: Request) -> None:
        server.link.send(Outgoing(7, Header(7, command, 16 + len(payload)).pack() + payload), 20)

    with served(hook=on(Reset, hook)) as iommu:
        iommu.target.reset()
        iommu.map(BASE, part(block, 0))
        assert iommu.unmap(BASE, P) == P
        assert iommu.target.violations == 1
        assert iommu.target.failure is None


def test_refusals_with_a_payload_and_answers_without(block: RamBlock) -> None:
    """
    libvfio-user has them: handle_region_access() with do_reply(), and handle_request() of a device
    without DMA (lib/libvfio-user.c).
    """

    def hook(server: Server, request: Request) -> Message | int | Outgoing | None:
        if isinstance(request.message, RegionRead):
            return raw(9, bytes(20), flags=0x21, errno=errno.EINVAL)(server, request)
        if isinstance(request.message, DmaUnmap):
            server.carry_out(request)
            return raw(3)(server, request)
        return None

    with served(hook=hook) as iommu:
        memory = GuestMemory()
        memory.map(block, BASE)
        mapper = memory.attach(iommu.target)
        with pytest.raises(DmaError, match="the server refused REGION_READ") as caught:
            iommu.target.region_read(0, 0, 4)
        assert caught.value.errno == errno.EINVAL
        memory.detach(mapper)
        assert iommu.mappings() == []
        assert iommu.target.failure is None
        assert not memory.poisoned


def test_a_refusal_that_may_be_the_limit(block: RamBlock) -> None:
    """libvfio-user: lib/dma.c, dma_controller_add_region(), "hit max regions"."""
    match = "libvfio-user says so too at its limit of windows"
    with served(hook=on(DmaMap, errno.EINVAL)) as iommu, pytest.raises(DmaError, match=match):
        iommu.map(BASE, part(block, 0))


def test_all_who_wait_hear_of_it(block: RamBlock) -> None:
    with served(hook=on(Reset, stay_silent), timeout=20) as iommu, ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(iommu.target.reset) for _ in range(8)]
        sleep(0.05)
        iommu.server.die()
        for future in waiting:
            with pytest.raises(DmaError) as caught:
                future.result()
            assert caught.value.in_doubt


def test_a_mistake_of_our_own_is_no_hang(
    block: RamBlock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served() as iommu:
        monkeypatch.setattr(iommu.target._memory, "remove", None)
        iommu.map(BASE, part(block, 0))
        with pytest.raises(DmaError) as caught:
            iommu.unmap(BASE, P)
        assert caught.value.in_doubt
        assert "TypeError" in caplog.text
        caplog.clear()  # what failed holds on to the conversation


# -- what the server asks for ----------------------------------------------------------------------


def ask(server: Server, message: Message) -> Message | ErrorReply:
    """From the server's own thread, in the middle of a request."""
    server.link.send(server.link.connection.request(message), 20)
    reply = server.link.receive(20)
    assert isinstance(reply, Reply)
    with reply:
        return reply.message


def test_it_is_served_until_the_unmap_is_answered(block: RamBlock) -> None:
    seen: list[Message | ErrorReply] = []

    def hook(server: Server, request: Request) -> None:
        seen.append(ask(server, DmaWrite(BASE, b"new")))
        seen.append(ask(server, DmaRead(BASE, 5)))

    block.write(0, b"old!!")
    with served(hook=on(DmaUnmap, hook)) as iommu:
        iommu.map(BASE, part(block, 0))
        iommu.unmap(BASE, P)
        assert seen == [DmaWriteReply(BASE, 3), DmaReadReply(BASE, b"new!!")]
        assert iommu.target.violations == 0
        assert iommu.server.ask(DmaRead(BASE, 5)) == ErrorReply(11, errno.EFAULT)
        assert iommu.target.violations == 1
        assert iommu.target.violation_records == (FaultRecord(BASE, 5, write=False),)


def test_it_is_served_from_the_map_on(block: RamBlock) -> None:
    seen: list[Message | ErrorReply] = []

    def hook(server: Server, request: Request) -> int:
        seen.append(ask(server, DmaRead(BASE, 3)))
        return errno.EPERM

    block.write(0, b"now")
    with served(hook=on(DmaMap, hook)) as iommu:
        with pytest.raises(DmaError):
            iommu.map(BASE, part(block, 0))
        assert seen == [DmaReadReply(BASE, b"now")]
        # But not after a map that was refused.
        assert isinstance(iommu.server.ask(DmaRead(BASE, 3)), ErrorReply)
        assert iommu.target.violations == 1


@pytest.mark.parametrize(
    ("asked", "served_"),
    [
        (DmaRead(BASE, 2 * P), True),
        (DmaRead(BASE + P - 1, 2), True),
        (DmaRead(BASE, 0), True),
        (DmaWrite(BASE + P - 4, b"last"), True),
        (DmaWrite(BASE + P - 4, b"over!"), False),
        (DmaWrite(BASE + P, b"x"), False),
        (DmaRead(BASE + P, P + 1), False),
        (DmaRead(BASE - 1, 1), False),
        (DmaRead(BASE - 1, 2), False),
        (DmaRead(BASE + 2 * P, 1), False),
        (DmaRead(BASE, 5 * P), False),
        (DmaRead((1 << 64) - 1, 2), False),
        (DmaRead((1 << 64) - P, P), True),
        (DmaWrite((1 << 64) - P, b"x"), True),
        (DmaRead(0, 1), False),
    ],
)
def test_what_may_be_reached(block: RamBlock, asked: DmaRead | DmaWrite, served_: bool) -> None:
    with served() as iommu:
        iommu.map(BASE, part(block, 2))
        iommu.map(BASE + P, part(block, 1), writable=False)
        iommu.map(BASE + 4 * P, part(block, 4))
        iommu.map((1 << 64) - P, part(block, 0))
        before = block.read(0, 16 * P)
        answer = iommu.server.ask(asked)
        assert iommu.target.violations == (not served_)
        if not served_:
            assert answer == ErrorReply(asked.command, errno.EFAULT)
            assert block.read(0, 16 * P) == before
        elif isinstance(asked, DmaRead):
            where = {BASE: 2 * P, (1 << 64) - P: 0}
            whole = before[2 * P : 3 * P] + before[P : 2 * P]
            offset = asked.address - BASE
            expected = whole[offset : offset + asked.count] if offset < 2 * P else before[:P]
            assert where
            assert answer == DmaReadReply(asked.address, expected)
        else:
            assert answer == DmaWriteReply(asked.address, asked.amount)


def test_other_requests_of_the_server(block: RamBlock) -> None:
    with served() as iommu:
        assert iommu.server.ask(UnknownRequest(99, b"?")) == ErrorReply(99, errno.ENOTSUP)
        assert iommu.target.violations == 0


def test_a_write_that_wants_no_answer(block: RamBlock) -> None:
    def hook(server: Server, request: Request) -> None:
        for address in (BASE, 0):
            message = DmaWrite(address, b"posted")
            server.link.send(server.link.connection.request(message, no_reply=True), 20)

    with served(hook=on(Reset, hook)) as iommu:
        iommu.map(BASE, part(block, 0))
        iommu.target.reset()
        iommu.target.reset()
        assert block.read(0, 6) == b"posted"
        assert iommu.target.violations == 2


@pytest.mark.parametrize("capabilities", [Capabilities(max_msg_fds=1), NO_FDS], ids=["fd", "no fd"])
def test_a_file_that_is_made_shorter(capabilities: Capabilities) -> None:
    fd = os.memfd_create("short")
    try:
        os.ftruncate(fd, 2 * P)
        with served(capabilities=capabilities) as iommu:
            iommu.map(BASE, HostRange(fd, 0, 0, 2 * P))
            os.ftruncate(fd, P)
            for asked in (DmaRead(BASE, 2 * P), DmaRead(BASE + P, 1)):
                assert iommu.server.ask(asked) == ErrorReply(11, errno.EFAULT)
            assert iommu.target.violations == 0
    finally:
        os.close(fd)


def test_memory_that_is_gone() -> None:
    """
    No descriptor, and an address where nothing is: an error for the server, not a signal for this
    process.
    """
    with served() as iommu:
        iommu.map(BASE, HostRange(None, 0, P, P))
        assert iommu.server.ask(DmaRead(BASE, 8)) == ErrorReply(11, errno.EFAULT)
        assert iommu.server.ask(DmaWrite(BASE, b"x")) == ErrorReply(12, errno.EFAULT)


def test_a_flood_of_violations(block: RamBlock, caplog: pytest.LogCaptureFixture) -> None:
    with served() as iommu:
        for number in range(2000):
            iommu.server.ask(DmaRead(number, 1))
        assert iommu.target.violations == 2000
        assert len(iommu.target.violation_records) == 1024
        assert len(caplog.records) == 4
        assert caplog.records[0].message == (
            "server reads [0x0, 0x1): 0x0 may not be reached (number 1 of its kind)"
        )


def test_a_server_that_asks_and_never_listens(block: RamBlock) -> None:
    """Its answers do not pile up here; and the one who waits gets out in time."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(20)

        def negotiate() -> None:
            message = theirs.recv(4096)
            header = Header.unpack(message)
            payload = struct.pack("=HH", 0, 0)
            theirs.sendall(Header(header.message_id, 1, 20, 1).pack() + payload)

        thread = threading.Thread(target=negotiate)
        thread.start()
        target = VfioUserTarget(ours, timeout=0.5)
        thread.join()
        theirs.settimeout(0.2)
        request = Header(1, 11, 32).pack() + struct.pack("=QQ", 0, 0)
        with pytest.raises(TimeoutError):
            again_and_again(lambda: theirs.send(request * 64))
        assert target._talk._link.unsent < 2 << 20
        with pytest.raises(DmaError) as caught:
            target.map(BASE, part(block, 0))
        assert caught.value.errno == errno.ETIMEDOUT
        target.close()


def test_a_call_from_the_thread_that_would_have_to_do_it(block: RamBlock) -> None:
    caught: list[Exception] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for call in (iommu.target.reset, lambda: iommu.unmap(BASE, P)):
                try:
                    call()
                except Exception as error:
                    caught.append(error)

    handler = Handler()
    logger = logging.getLogger("ramblock.dma.vfio_user.serving")
    logger.addHandler(handler)
    try:
        with served() as iommu:
            iommu.map(BASE, part(block, 0))
            iommu.server.ask(DmaRead(0, 1))
            assert [type(error) for error in caught] == [BusyError, BusyError]
            iommu.unmap(BASE, P)
    finally:
        logger.removeHandler(handler)


# -- threads, Ctrl-C, the end ----------------------------------------------------------------------


def test_several_threads(block: RamBlock) -> None:
    with served() as iommu, ThreadPoolExecutor(6) as threads:

        def work(number: int) -> None:
            base = BASE * (number + 1)
            for turn in range(100):
                iommu.map(base, part(block, turn % 16))
                assert len(iommu.target.region_read(0, 0, number + 1)) == number + 1
                iommu.unmap(base, P)

        list(threads.map(work, range(6)))
        assert iommu.mappings() == []


def interrupt(server: Server, request: Request) -> None:
    """Ctrl-C while the client waits for the answer to this, which comes later."""
    server.hook = None
    os.kill(os.getpid(), signal.SIGINT)
    sleep(0.1)


@pytest.mark.parametrize("kind", [DmaMap, DmaUnmap, Reset])
def test_ctrl_c_while_waiting(block: RamBlock, kind: type[Message]) -> None:
    with served(hook=on(kind, interrupt)) as iommu:
        with pytest.raises(KeyboardInterrupt):
            all_kinds(iommu, block)
        # The answer that nobody waited for is not taken for another's.
        assert iommu.target.device_info().num_regions == 2
        assert len(iommu.mappings()) == (kind is DmaMap)
        with suppress(DmaError):
            iommu.unmap(BASE, P)
        iommu.map(BASE, part(block, 1))
        iommu.unmap(BASE, P)
        assert iommu.mappings() == []


@pytest.mark.parametrize("kind", [DmaMap, DmaUnmap])
def test_ctrl_c_in_a_conversion(kind: type[Message]) -> None:
    with served() as iommu, RamBlock.create("ram", 16 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(iommu)
        memory.convert(BASE, 4 * P, PageState.SHARED)
        iommu.server.hook = on(kind, interrupt)
        to = PageState.SHARED if kind is DmaMap else PageState.PRIVATE
        offset = 4 * P if kind is DmaMap else 0
        with pytest.raises(KeyboardInterrupt):
            memory.convert(BASE + offset, 4 * P, to)
        # It waited until the conversion was done.
        assert not memory.poisoned
        assert [mapping.iova for mapping in iommu.mappings()] == [
            BASE + page * P for page in (range(8) if kind is DmaMap else ())
        ]
        memory.convert(BASE, 8 * P, PageState.PRIVATE)
        assert iommu.mappings() == []


def test_a_server_that_dies_in_a_conversion_poisons() -> None:
    with served() as iommu, RamBlock.create("ram", 16 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(iommu.target)
        memory.convert(BASE, 4 * P, PageState.SHARED)
        iommu.server.hook = on(DmaUnmap, die)
        with pytest.raises(PoisonedError):
            memory.convert(BASE, 4 * P, PageState.PRIVATE)
        assert memory.poisoned
        assert memory.in_doubt() == [(BASE, P, iommu.target)]
        with pytest.raises(PoisonedError):
            memory.convert(BASE + 4 * P, P, PageState.SHARED)


def test_a_server_that_is_gone_before_the_conversion_poisons() -> None:
    with served() as iommu, RamBlock.create("ram", 16 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(iommu.target)
        memory.convert(BASE, 4 * P, PageState.SHARED)
        iommu.server.die()
        iommu.server.join()
        with pytest.raises(PoisonedError):
            memory.convert(BASE, 4 * P, PageState.PRIVATE)


def test_a_refusal_is_put_back() -> None:
    number = 0

    def hook(server: Server, request: Request) -> int | None:
        nonlocal number
        number += 1
        return errno.ENOMEM if number == 3 else None

    with served() as iommu, RamBlock.create("ram", 16 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(iommu.target)
        iommu.server.hook = on(DmaMap, hook)
        with pytest.raises(ConversionError) as caught:
            memory.convert(BASE, 4 * P, PageState.SHARED)
        assert caught.value.rolled_back
        assert iommu.mappings() == []
        memory.convert(BASE, 4 * P, PageState.SHARED)
        assert len(iommu.mappings()) == 4


@pytest.mark.parametrize("knows_all", [True, False])
def test_closing(block: RamBlock, knows_all: bool) -> None:
    def hook(server: Server, request: Request) -> Message | None:
        if request.message != DmaUnmap(2, 0, 0) or not knows_all:
            return None
        for window in server.windows.values():
            window.fds.close()
        server.windows.clear()
        return DmaUnmapReply(2, 0, 0)

    iommu = RemoteIommu(hook=hook)
    for number in range(5):
        iommu.map(BASE + number * P, part(block, number))
    iommu.target.close()
    iommu.target.close()
    iommu.server.join()
    assert iommu.server.windows == {}
    unmapped = [one for one in iommu.server.requests if isinstance(one, DmaUnmap)]
    # Where the server does not know an unmap of all, which the specification has not, one by one.
    one_by_one = [] if knows_all else [DmaUnmap(0, BASE + number * P, P) for number in range(5)]
    assert unmapped == [DmaUnmap(2, 0, 0), *one_by_one]
    assert iommu.target.closed
    assert iommu.target.failure is None
    assert repr(iommu.target) == "<VfioUserTarget at a socket, closed>"
    with pytest.raises(DmaError, match="the target was closed") as caught:
        iommu.map(BASE, part(block, 0))
    assert caught.value.errno == errno.EBADF
    assert not caught.value.in_doubt


def test_closing_where_the_server_does_not_let_go(block: RamBlock) -> None:
    iommu = RemoteIommu(hook=on(DmaUnmap, errno.EBUSY))
    iommu.map(BASE, part(block, 0))
    with pytest.raises(DmaError) as caught:
        iommu.target.close()
    assert caught.value.errno == errno.EBUSY
    assert iommu.target.closed
    iommu.server.join()


def test_a_target_that_nobody_holds(block: RamBlock) -> None:
    iommu = RemoteIommu()
    iommu.map(BASE, part(block, 0))
    server = iommu.server
    del iommu
    gc.collect()
    server.join()
    assert server.error is None


# -- the beginning ---------------------------------------------------------------------------------


def test_over_a_path(tmp_path: Path, block: RamBlock) -> None:
    path = tmp_path / "device.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        servers: list[Server] = []
        thread = threading.Thread(target=lambda: servers.append(Server(listener.accept()[0])))
        thread.start()
        target = VfioUserTarget(path)
        thread.join()
        target.map(BASE, part(block, 0))
        block.write(0, b"by path")
        assert servers[0].read(BASE, 7) == b"by path"
        assert repr(target) == f"<VfioUserTarget at {path}, connected>"
        target.close()
        servers[0].join()


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with pytest.raises(DmaError, match=f"vfio-user server at {path}: No such file") as caught:
        VfioUserTarget(path)
    assert not caught.value.in_doubt
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with pytest.raises(DmaError) as caught:
            VfioUserTarget(str(path))
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_version_that_is_refused() -> None:
    ours, theirs = socket.socketpair()
    server = Server(theirs, hook=on(Version, errno.EINVAL))
    with pytest.raises(DmaError, match="the server refused VERSION") as caught:
        VfioUserTarget(ours)
    assert caught.value.errno == errno.EINVAL
    server.join()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, DmaError),
        (b"", DmaError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError),
        (Header(0, 1, 20, 1).pack() + struct.pack("=HH", 1, 0), RemoteProtocolError),
        (Header(0, 1, 20, 1).pack(), RemoteProtocolError),
    ],
    ids=["silent", "closes", "speaks something else", "wrong version", "half an answer"],
)
def test_servers_that_are_none(answer: bytes | None, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()

    def answer_it() -> None:
        with theirs:
            theirs.recv(4096)
            if answer is None:
                sleep(0.3)
            else:
                theirs.sendall(answer)

    thread = threading.Thread(target=answer_it)
    thread.start()
    with pytest.raises(error):
        VfioUserTarget(ours, timeout=0.1 if answer is None else 5)
    thread.join()
    assert ours.fileno() == -1
