# SPDX-License-Identifier: Apache-2.0
"""
The memory that a vCPU shares with its user (``struct kvm_run``), as exits and their answers.

It makes no system call: a buffer of the right size is all it needs.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable

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
from ramblock.uapi.kvm import KVM_EXIT_IO_OUT, ExitReason, KvmRun

__all__ = ["RunPage"]

# KVM_RUN fails with one of these at KVM_EXIT_MEMORY_FAULT; with any other errno the exit reason
# means nothing.
_MEMORY_FAULT_ERRNOS = frozenset({errno.EFAULT, EHWPOISON})

# KVM_EXIT_HYPERCALL_LONG_MODE, Documentation/virt/kvm/api.rst; the header has no name for it.
_LONG_MODE = 1 << 0


class RunPage:
    """
    Reads exits from a run page and writes answers into it.

    :param buffer: Writable, at least as large as ``struct kvm_run``; the mapping of a vCPU, or
        bytes of a test.
    """

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._buffer = buffer
        self._run = KvmRun.from_buffer(buffer)

    def request_exit(self, *, wanted: bool) -> None:
        """
        Let KVM_RUN complete the pending exit and return at once with EINTR.

        Or take that back.
        """
        self._run.immediate_exit = wanted

    def forget_exit(self) -> None:
        """Clear the exit reason: a KVM_RUN that fails without setting it is not the exit before."""
        self._run.exit_reason = ExitReason.KVM_EXIT_UNKNOWN

    def read_exit(self, error: int | None = None) -> Exit | None:
        """
        Tell why KVM_RUN came back.

        :param error: The errno of KVM_RUN; None: it succeeded.
        :return: None: it failed, and not in a way that is an exit.
        """
        if error is None:
            return _READERS.get(self._run.exit_reason, _unknown)(self._run, self._buffer)
        if error in (errno.EINTR, errno.EAGAIN):
            return InterruptedExit()
        faulted = self._run.exit_reason == ExitReason.KVM_EXIT_MEMORY_FAULT
        if faulted and error in _MEMORY_FAULT_ERRNOS:
            fault = self._run.memory_fault
            return MemoryFaultExit(gpa=fault.gpa, size=fault.size, flags=fault.flags, errno=error)
        return None

    def answer_read(self, exit: IoExit | MmioExit, data: bytes) -> None:
        """
        Give the guest the data of its read.

        :raises UsageError: *exit* is a write, or *data* has not the size that it reads; nothing is
            answered.
        """
        size = exit.size * exit.count if isinstance(exit, IoExit) else exit.size
        if exit.write or len(data) != size:
            expected = "no answer, it is a write" if exit.write else f"{size} bytes"
            raise UsageError(
                f"{type(exit).__name__} answered with {len(data)} bytes, expected {expected}",
                value=data,
                expected=expected,
            )
        if isinstance(exit, IoExit):
            start = self._run.io.data_offset
            self._buffer[start : start + size] = data
        else:
            self._run.mmio.data[:size] = list(data)

    def answer_hypercall(self, result: int) -> None:
        """Give the guest the result of its hypercall."""
        self._run.hypercall.ret = result

    def release(self) -> None:
        """
        Let go of the buffer, so that it can be unmapped.

        Nothing else may be called after that but this again.
        """
        vars(self).pop("_run", None)
        vars(self).pop("_buffer", None)


def _io(run: KvmRun, buffer: mmap.mmap | bytearray) -> IoExit:
    io = run.io
    write = io.direction == KVM_EXIT_IO_OUT
    start, size = io.data_offset, io.size * io.count
    data = bytes(buffer[start : start + size]) if write else b""
    return IoExit(port=io.port, size=io.size, count=io.count, write=write, data=data)


def _mmio(run: KvmRun, _: object) -> MmioExit:
    mmio = run.mmio
    size = min(mmio.len, len(mmio.data))
    data = bytes(mmio.data[:size]) if mmio.is_write else b""
    return MmioExit(gpa=mmio.phys_addr, size=size, write=bool(mmio.is_write), data=data)


def _hypercall(run: KvmRun, _: object) -> HypercallExit:
    call = run.hypercall
    a, b, c, d, e, f = call.args
    return HypercallExit(
        nr=call.nr, args=(a, b, c, d, e, f), long_mode=bool(call.flags & _LONG_MODE)
    )


def _internal_error(run: KvmRun, _: object) -> InternalErrorExit:
    internal = run.internal
    count = min(internal.ndata, len(internal.data))
    return InternalErrorExit(suberror=internal.suberror, data=tuple(internal.data[:count]))


def _fail_entry(run: KvmRun, _: object) -> FailEntryExit:
    entry = run.fail_entry
    return FailEntryExit(reason=entry.hardware_entry_failure_reason, cpu=entry.cpu)


def _unknown(run: KvmRun, _: object) -> UnknownExit:
    return UnknownExit(reason=run.exit_reason)


_READERS: dict[int, Callable[[KvmRun, mmap.mmap | bytearray], Exit]] = {
    ExitReason.KVM_EXIT_IO: _io,
    ExitReason.KVM_EXIT_MMIO: _mmio,
    ExitReason.KVM_EXIT_HYPERCALL: _hypercall,
    ExitReason.KVM_EXIT_HLT: lambda *_: HaltExit(),
    ExitReason.KVM_EXIT_SHUTDOWN: lambda *_: ShutdownExit(),
    ExitReason.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    ExitReason.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    ExitReason.KVM_EXIT_INTR: lambda *_: InterruptedExit(),
}
