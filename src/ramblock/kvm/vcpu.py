# SPDX-License-Identifier: Apache-2.0
"""One virtual processor: its registers, running it, and getting it to stop."""

from __future__ import annotations

import mmap
import os
import threading

from ramblock.errors import UsageError
from ramblock.kvm.cpuid import CpuidTable
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.exits import Exit, HypercallExit, InterruptedExit, IoExit, MmioExit
from ramblock.kvm.hypercall import HypercallResult
from ramblock.kvm.kick import discard_kick, enter_thread, send_kick, set_mask
from ramblock.kvm.run_page import RunPage
from ramblock.process import ClosedAtEnd
from ramblock.uapi import ioctl
from ramblock.uapi.kvm import (
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KvmRegs,
    KvmSregs,
)

__all__ = ["Vcpu"]


class Vcpu(ClosedAtEnd):
    """
    A vCPU, made by :meth:`KvmVm.create_vcpu`.

    One thread at a time runs it; any thread may kick or close it.

    The first run in a thread blocks SIGRTMIN there, which is the kick, for good.
    """

    def __init__(self, descriptor: Descriptor, id: int, *, run_size: int, keeps: object) -> None:
        self.id = id
        # The slots: the kernel keeps them as long as the vCPU is open, so the guest's memory has to
        # live as long.
        self._keeps = keeps
        self._descriptor = descriptor
        try:
            self._mapping = mmap.mmap(descriptor.fd, run_size, mmap.MAP_SHARED)
        except BaseException:
            descriptor.close()
            raise
        self._page = RunPage(self._mapping)
        self._closing = False
        # Held while it runs.
        self._run_lock = threading.Lock()
        # Held for moments. Reentrant: the handler of a signal may kick while its own thread is
        # entering or leaving.
        self._kick_lock = threading.RLock()
        self._runner: int | None = None
        # Who is inside run(); and whether a kick's signal is on its way: they queue, and one is
        # enough.
        self._user: int | None = None
        self._signalled = False
        self._mask: frozenset[int] | None = None
        # The last exit that was handed out, and whether it was answered.
        self._exit: Exit | None = None
        self._answered = False

    @property
    def fd(self) -> int:
        """
        Its descriptor.

        :raises UsageError: It is closed.
        """
        return self._descriptor.fd

    # -- state -------------------------------------------------------------------------------------

    @property
    def registers(self) -> KvmRegs:
        """A copy of the general purpose registers; assign it to set them."""
        registers = KvmRegs()
        self._descriptor.call(KVM_GET_REGS, "KVM_GET_REGS", registers)
        return registers

    @registers.setter
    def registers(self, registers: KvmRegs) -> None:
        self._descriptor.call(KVM_SET_REGS, "KVM_SET_REGS", registers)

    @property
    def special_registers(self) -> KvmSregs:
        """A copy of segments, tables and control registers; assign it to set them."""
        registers = KvmSregs()
        self._descriptor.call(KVM_GET_SREGS, "KVM_GET_SREGS", registers)
        return registers

    @special_registers.setter
    def special_registers(self, registers: KvmSregs) -> None:
        self._descriptor.call(KVM_SET_SREGS, "KVM_SET_SREGS", registers)

    def set_cpuid(self, table: CpuidTable) -> None:
        """
        Set the answers of CPUID, before the first run; otherwise there are none.

        :param table: From :meth:`Kvm.supported_cpuid`.
        """
        self._descriptor.call(KVM_SET_CPUID2, "KVM_SET_CPUID2", table)

    # -- running -----------------------------------------------------------------------------------

    def run(self) -> Exit:
        """
        Enter the guest until it needs something.

        The request of the exit before this one is completed first. A read that was not answered
        reads as ones, as on an empty bus; a hypercall that was not answered is refused (EINVAL). So
        it is with an exit that the caller lost to Ctrl-C.

        :return: :class:`InterruptedExit` after a kick, also one that came while nobody ran it, and
            after any signal.
        :raises UsageError: It is closed.
        :raises OSError: KVM cannot run it.
        :raises KeyboardInterrupt: Or the exception of a signal's handler. It can be run again.
        """
        with self._run_lock:
            if self._closing:
                raise UsageError(f"{self._descriptor.name} is closed", value=self.id)
            try:
                self._user = threading.get_ident()
                return self._run()
            finally:
                self._user = None
                if (
                    self._closing
                ):  # by a signal's handler in this thread, which could not wait for it
                    self._release()

    def _run(self) -> Exit:
        self._refuse_unanswered()
        error = self._enter()
        exit = self._page.read_exit(error)
        if exit is None:
            assert error is not None  # only a failure can be no exit
            raise OSError(error, f"{self._descriptor.name}: KVM_RUN: {os.strerror(error)}")
        if isinstance(exit, InterruptedExit):
            self._consume_kick()
        self._exit = exit
        return exit

    def _enter(self) -> int | None:
        """Call KVM_RUN; return its errno, None if it succeeded."""
        mask = enter_thread()
        if mask != self._mask:
            set_mask(self._descriptor, mask)
            self._mask = mask
        fd = self._descriptor.fd
        self._page.forget_exit()
        self._exit = None
        self._answered = False
        try:
            self._runner = threading.get_ident()
            ioctl.call(fd, KVM_RUN)
        except OSError as error:
            return error.errno
        finally:
            # A bare assignment, before which Ctrl-C cannot strike; then the kicks that are on their
            # way have been sent. So none goes to a thread that has ended.
            self._runner = None
            with self._kick_lock:
                pass
        return None

    def _consume_kick(self) -> None:
        with self._kick_lock:
            self._page.request_exit(wanted=False)
            discard_kick()
            self._signalled = False

    def _refuse_unanswered(self) -> None:
        """Fail closed: KVM itself presets success for a hypercall, and stale data for a read."""
        if self._answered:
            return
        # The page knows of an exit that was interrupted on its way out of here.
        exit = self._exit or self._page.read_exit()
        if isinstance(exit, HypercallExit):
            self._page.answer_hypercall(HypercallResult.EINVAL)
        elif isinstance(exit, IoExit | MmioExit) and not exit.write:
            count = exit.count if isinstance(exit, IoExit) else 1
            self._page.answer_read(exit, b"\xff" * (exit.size * count))

    def complete_io(self, data: bytes) -> None:
        """
        Give the guest the data of a read, after an :class:`IoExit` or :class:`MmioExit`.

        :param data: Little-endian; ``size * count`` bytes for port I/O, ``size`` bytes for MMIO.
        :raises UsageError: The last exit is none of these, or *data* has another size; nothing is
            answered.
        """
        exit = self._exit
        if not isinstance(exit, IoExit | MmioExit):
            raise UsageError(
                f"{self._descriptor.name}: {exit!r} reads nothing",
                value=exit,
                expected="after an IoExit or MmioExit",
            )
        with self._kick_lock:
            self._check_open()
            self._page.answer_read(exit, data)
        self._answered = True

    def set_hypercall_result(self, result: HypercallResult) -> None:
        """
        Answer the guest's hypercall, after a :class:`HypercallExit`.

        :raises UsageError: The last exit is none, or *result* is not one that KVM takes; nothing is
            answered.
        """
        if not isinstance(self._exit, HypercallExit) or not isinstance(result, HypercallResult):
            raise UsageError(
                f"{self._descriptor.name}: {result!r} is no answer to {self._exit!r}",
                value=result,
                expected="a HypercallResult after a HypercallExit",
            )
        with self._kick_lock:
            self._check_open()
            self._page.answer_hypercall(result)
        self._answered = True

    def _check_open(self) -> None:
        if self._mapping.closed:
            raise UsageError(f"{self._descriptor.name} is closed", value=self.id)

    # -- stopping ----------------------------------------------------------------------------------

    def kick(self) -> None:
        """
        Make the run that is under way, or else the next one, return :class:`InterruptedExit`.

        From any thread.

        A kick is never lost, but several may become one. On a closed vCPU nothing happens.
        """
        with self._kick_lock:
            if self._mapping.closed or self._descriptor.closed:
                return
            self._page.request_exit(wanted=True)
            if self._runner is None or self._runner == threading.get_ident() or self._signalled:
                return
            send_kick(self._runner)
            self._signalled = True

    def close(self) -> None:
        """
        Close it, and unmap its shared page; a thread that runs it is kicked out first.

        Twice is the same as once.

        From a signal's handler in the thread that runs it, it is closed when that run returns.

        :raises OSError: EAGAIN: the kick cannot be sent, because the user's signals have used up
            RLIMIT_SIGPENDING. Nothing is closed, and the guest runs.
        """
        self._closing = True
        self.kick()
        if self._user == threading.get_ident():
            return
        with self._run_lock:
            self._release()

    def _release(self) -> None:
        with self._kick_lock:
            if self._mapping.closed:
                return
            self._descriptor.close()
            self._page.release()
            self._mapping.close()

    def __repr__(self) -> str:
        return f"<Vcpu {self.id}{', closed' if self._descriptor.closed else ''}>"
