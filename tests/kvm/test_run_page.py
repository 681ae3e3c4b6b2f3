"""Exits and answers, on a run page made of bytes."""

import errno
import mmap
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.errors import UsageError
from ramblock.kvm.exits import (
    EHWPOISON,
    Exit,
    FailEntryExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    UnknownExit,
)
from ramblock.kvm.run_page import RunPage
from ramblock.uapi.kvm import ExitReason, KvmRun

DATA = 4096  # where KVM puts the data of port I/O (KVM_PIO_PAGE_OFFSET)
SIZE = 3 * 4096


def page(reason: int, fill: Callable[[KvmRun], object] = lambda _: None) -> bytearray:
    """Make a run page as KVM would leave it."""
    buffer = bytearray(SIZE)
    run = KvmRun.from_buffer(buffer)
    run.exit_reason = reason
    fill(run)
    return buffer


def io_page(*, write: bool, size: int = 1, count: int = 1, data: bytes = b"") -> bytearray:
    def fill(run: KvmRun) -> None:
        run.io.direction, run.io.size, run.io.port = write, size, 0x3F8
        run.io.count, run.io.data_offset = count, DATA

    buffer = page(ExitReason.KVM_EXIT_IO, fill)
    buffer[DATA : DATA + len(data)] = data
    return buffer


def mmio_page(*, write: bool, size: int, data: bytes = b"") -> bytearray:
    def fill(run: KvmRun) -> None:
        run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEE0_0000, size, write
        run.mmio.data[: len(data)] = list(data)

    return page(ExitReason.KVM_EXIT_MMIO, fill)


def fill_hypercall(run: KvmRun) -> None:
    run.hypercall.nr, run.hypercall.flags = 12, 1
    for index in range(6):
        run.hypercall.args[index] = index << 60 | index


def fill_internal(run: KvmRun) -> None:
    run.internal.suberror, run.internal.ndata = 1, 2
    run.internal.data[0], run.internal.data[1], run.internal.data[2] = 7, 8, 9


def fill_fail_entry(run: KvmRun) -> None:
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x8000_0021, 3


def fault_page(flags: int = 8) -> bytearray:
    def fill(run: KvmRun) -> None:
        run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size = flags, 0x5000, 0x1000

    return page(ExitReason.KVM_EXIT_MEMORY_FAULT, fill)


@pytest.mark.parametrize(
    ("buffer", "expected"),
    [
        (
            io_page(write=True, size=2, count=3, data=b"abcdefXX"),
            IoExit(port=0x3F8, size=2, count=3, write=True, data=b"abcdef"),
        ),
        (
            io_page(write=False, size=4, data=b"stale"),
            IoExit(port=0x3F8, size=4, count=1, write=False, data=b""),
        ),
        (
            mmio_page(write=True, size=4, data=b"abcdefgh"),
            MmioExit(gpa=0xFEE0_0000, size=4, write=True, data=b"abcd"),
        ),
        (
            mmio_page(write=False, size=8, data=b"stale"),
            MmioExit(gpa=0xFEE0_0000, size=8, write=False, data=b""),
        ),
        (
            page(ExitReason.KVM_EXIT_HYPERCALL, fill_hypercall),
            HypercallExit(
                nr=12,
                args=(0, 1 << 60 | 1, 2 << 60 | 2, 3 << 60 | 3, 4 << 60 | 4, 5 << 60 | 5),
                long_mode=True,
            ),
        ),
        (page(ExitReason.KVM_EXIT_HLT), HaltExit()),
        (page(ExitReason.KVM_EXIT_SHUTDOWN), ShutdownExit()),
        (page(ExitReason.KVM_EXIT_INTR), InterruptedExit()),
        (
            page(ExitReason.KVM_EXIT_INTERNAL_ERROR, fill_internal),
            InternalErrorExit(suberror=1, data=(7, 8)),
        ),
        (
            page(ExitReason.KVM_EXIT_FAIL_ENTRY, fill_fail_entry),
            FailEntryExit(reason=0x8000_0021, cpu=3),
        ),
        (page(ExitReason.KVM_EXIT_UNKNOWN), UnknownExit(reason=0)),
        (page(24), UnknownExit(reason=24)),
        # A memory fault comes with an errno, always: without one it is none.
        (fault_page(), UnknownExit(reason=39)),
    ],
)
def test_exit_is_read(buffer: bytearray, expected: Exit) -> None:
    assert RunPage(buffer).read_exit() == expected


@pytest.mark.parametrize("error", [errno.EFAULT, EHWPOISON])
def test_memory_fault_carries_its_errno(error: int) -> None:
    assert RunPage(fault_page(flags=0x18)).read_exit(error) == MemoryFaultExit(
        gpa=0x5000, size=0x1000, flags=0x18, errno=error
    )


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOEXEC, errno.EIO])
def test_other_errno_is_no_memory_fault(error: int) -> None:
    # "userspace should assume kvm_run.exit_reason is stale/undefined for all other error numbers"
    assert RunPage(fault_page()).read_exit(error) is None


def test_exit_reason_of_an_earlier_run_is_no_memory_fault() -> None:
    run_page = RunPage(fault_page())
    run_page.forget_exit()
    assert run_page.read_exit(errno.EFAULT) is None


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("buffer", [fault_page(), io_page(write=True, data=b"x")])
def test_signal_is_an_interrupt_whatever_the_page_says(buffer: bytearray, error: int) -> None:
    assert RunPage(buffer).read_exit(error) == InterruptedExit()


@given(
    head=st.binary(min_size=304, max_size=304),
    reason=st.sampled_from(ExitReason) | st.integers(0, (1 << 32) - 1),
    error=st.sampled_from([None, errno.EINTR, errno.EFAULT, EHWPOISON, errno.EINVAL]),
)
def test_any_bytes_give_an_exit(head: bytes, reason: int, error: int | None) -> None:
    buffer = bytearray(head.ljust(SIZE, b"\0"))
    KvmRun.from_buffer(buffer).exit_reason = reason
    found = RunPage(buffer).read_exit(error)
    if error is None:
        assert found is not None
    if isinstance(found, IoExit | MmioExit):
        assert len(found.data) <= SIZE


def test_read_of_a_port_is_answered() -> None:
    buffer = io_page(write=False, size=2, count=2, data=b"........")
    run_page = RunPage(buffer)
    found = run_page.read_exit()
    assert isinstance(found, IoExit)
    run_page.answer_read(found, b"wxyz")
    assert buffer[DATA : DATA + 8] == b"wxyz...."


def test_read_of_mmio_is_answered() -> None:
    buffer = mmio_page(write=False, size=4, data=b"........")
    run_page = RunPage(buffer)
    found = run_page.read_exit()
    assert isinstance(found, MmioExit)
    run_page.answer_read(found, b"wxyz")
    assert bytes(KvmRun.from_buffer(buffer).mmio.data) == b"wxyz...."


@pytest.mark.parametrize("data", [b"", b"wxy", b"wxyz!"])
@pytest.mark.parametrize(
    "buffer", [io_page(write=False, size=2, count=2), mmio_page(write=False, size=4)]
)
def test_answer_of_another_size_is_refused(buffer: bytearray, data: bytes) -> None:
    run_page = RunPage(buffer)
    found = run_page.read_exit()
    assert isinstance(found, IoExit | MmioExit)
    before = bytes(buffer)
    with pytest.raises(UsageError, match="4 bytes") as caught:
        run_page.answer_read(found, data)
    assert caught.value.expected == "4 bytes"
    assert buffer == before


@pytest.mark.parametrize(
    "buffer", [io_page(write=True, data=b"x"), mmio_page(write=True, size=1, data=b"x")]
)
def test_write_is_not_answered(buffer: bytearray) -> None:
    run_page = RunPage(buffer)
    found = run_page.read_exit()
    assert isinstance(found, IoExit | MmioExit)
    with pytest.raises(UsageError, match="it is a write"):
        run_page.answer_read(found, b"y")


def test_hypercall_is_answered() -> None:
    buffer = page(ExitReason.KVM_EXIT_HYPERCALL, fill_hypercall)
    RunPage(buffer).answer_hypercall(22)
    assert KvmRun.from_buffer(buffer).hypercall.ret == 22
    assert KvmRun.from_buffer(buffer).hypercall.args[5] == 5 << 60 | 5


def test_exit_is_requested_and_taken_back() -> None:
    buffer = page(0)
    run_page = RunPage(buffer)
    run_page.request_exit(wanted=True)
    assert KvmRun.from_buffer(buffer).immediate_exit == 1
    run_page.request_exit(wanted=False)
    assert not any(buffer)


def test_released_page_can_be_unmapped() -> None:
    mapping = mmap.mmap(-1, SIZE)
    run_page = RunPage(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    run_page.release()
    mapping.close()
