# SPDX-License-Identifier: Apache-2.0
"""
The host's side of the guest program: its memory, its vCPU, and its requests.

Its memory is a slot that no :class:`~ramblock.GuestMemory` knows: no device reaches the program,
and a conversion of its pages is a conversion of a hole.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from ramblock.errors import GuestProgramError, UsageError, describe_range
from ramblock.guest.block import RamBlock
from ramblock.guest.memory import GuestMemory
from ramblock.guest_program.image import build_image
from ramblock.guest_program.long_mode import enter_long_mode
from ramblock.guest_program.mailbox import MAILBOX_SIZE, Command, Mailbox, Result
from ramblock.guest_program.program import (
    PORT_CONVERT,
    PORT_EXCEPTION,
    PORT_IDLE,
    ConversionCall,
    assemble,
)
from ramblock.kvm import (
    CpuidTable,
    Exit,
    HypercallExit,
    HypercallResult,
    InterruptedExit,
    IoExit,
    KvmVm,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
)
from ramblock.process import ClosedAtEnd
from ramblock.units import PAGE_SIZE

__all__ = ["GuestEvent", "GuestProgram", "IdleEvent"]

_PAGE_FAULT = 14
# Where x86 processors begin after a reset (Intel SDM, volume 3, 10.1.4).
_RESET_RIP = 0xFFF0


@dataclass(frozen=True, slots=True)
class IdleEvent:
    """The guest has done all its commands and waits for more."""


#: Results of :meth:`GuestProgram.run`.
GuestEvent: TypeAlias = HypercallExit | MemoryFaultExit | IdleEvent


class GuestProgram(ClosedAtEnd):
    """
    A guest that obeys commands. One vCPU; one thread at a time uses it. A context manager.

    :param vm: Where it runs. Its memory slot stays there until :meth:`close`.
    :param cpuid: Its CPUID entries.
    :param base: Guest physical address of its memory, a multiple of the page size, where nothing
        else may be.
    :param reach: Memory that it may touch, as (gpa, size) in bytes; elsewhere it faults.
    :param call: How it asks for conversions. For a hypercall, the exits of the VM are enabled.
    :raises UsageError: Something is out of reach; nothing is held.
    :raises OSError: KVM refused, or the host has no memory; nothing is held.
    """

    def __init__(
        self,
        vm: KvmVm,
        cpuid: CpuidTable,
        *,
        base: int,
        reach: Iterable[tuple[int, int]],
        call: ConversionCall,
    ) -> None:
        self.call = call
        self._asked_by: Exit | None = None
        image = build_image(assemble(call), base, reach)
        size = -(-len(image.content) // PAGE_SIZE) * PAGE_SIZE
        with ExitStack() as resources:
            block = resources.enter_context(RamBlock.create("guest-program", size))
            block.write(0, image.content)
            # A memory of its own: closing the block takes the slot away first, or keeps the pages
            # if that is refused.
            GuestMemory(vm).map(block, base)
            if call is not ConversionCall.DOORBELL:
                vm.enable_map_gpa_range_exits()
            self._vcpu = resources.enter_context(vm.create_vcpu())
            self._vcpu.set_cpuid(cpuid)
            enter_long_mode(self._vcpu, image)
            words = (ctypes.c_uint64 * (MAILBOX_SIZE // 8)).from_address(
                block.address + image.mailbox_offset
            )
            self._mailbox: Mailbox | None = Mailbox(memoryview(words).cast("B").cast("Q"))
            self._block = block
            resources.pop_all()

    # -- commands ----------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many commands can be put now."""
        return self._open_mailbox().room

    def put(self, command: Command) -> None:
        """
        Let the guest do *command* after those before it, once it runs.

        :raises UsageError: There is no room for it, or the program is closed.
        """
        self._open_mailbox().put(command)

    def results(self) -> list[Result]:
        """
        Take the results since the last time, oldest first.

        :raises GuestProgramError: The guest says that it did commands that it was not given.
        :raises UsageError: The program is closed.
        """
        return self._open_mailbox().results()

    def _open_mailbox(self) -> Mailbox:
        # It looks straight at memory that is not mapped any more once the block is closed.
        if self._mailbox is None:
            raise UsageError("the guest program is closed", value=self)
        return self._mailbox

    # -- running -----------------------------------------------------------------------------------

    def run(self) -> GuestEvent:
        """
        Let the guest run until it asks for something.

        :return: A :class:`~ramblock.kvm.HypercallExit`, also where it was a doorbell: it wants a
            conversion, and is told by :meth:`answer`. A :class:`~ramblock.kvm.MemoryFaultExit`: a
            page was not of the kind of its access.
        :raises GuestProgramError: It cannot go on; the text names RIP.
        :raises OSError: KVM cannot run it.
        :raises KeyboardInterrupt: It can be run again.
        """
        while True:
            self._asked_by = exit = self._vcpu.run()
            if isinstance(exit, HypercallExit | MemoryFaultExit):
                return exit
            if isinstance(exit, IoExit) and exit.port == PORT_IDLE:
                return IdleEvent()
            if isinstance(exit, IoExit) and exit.port == PORT_CONVERT:
                return self._read_request()
            if not isinstance(exit, InterruptedExit):
                raise self._failure(exit)

    def answer(self, result: HypercallResult) -> None:
        """
        Answer the guest's request for a conversion; unanswered, it is refused.

        :raises UsageError: It asked for none.
        """
        if isinstance(self._asked_by, HypercallExit):
            self._vcpu.set_hypercall_result(result)
        elif isinstance(self._asked_by, IoExit) and self._asked_by.port == PORT_CONVERT:
            self._vcpu.complete_io(result.to_bytes(self._asked_by.size, "little"))
        else:
            raise UsageError(
                f"the guest program asked for nothing: {self._asked_by!r}", value=result
            )

    def _read_request(self) -> HypercallExit:
        """Read the arguments of a doorbell: they are where the hypercall's would be."""
        registers = self._vcpu.registers
        arguments = (registers.rbx, registers.rcx, registers.rdx, registers.rsi, 0, 0)
        return HypercallExit(nr=registers.rax, args=arguments, long_mode=True)

    def _failure(self, exit: Exit) -> GuestProgramError:
        registers = self._vcpu.registers
        if isinstance(exit, IoExit) and exit.port == PORT_EXCEPTION:
            vector, code, rip, cr2 = registers.rax, registers.rbx, registers.rcx, registers.rdx
            address = cr2 if vector == _PAGE_FAULT else None
            where = "" if address is None else f" at {address:#x}"
            return GuestProgramError(
                f"the guest program got exception {vector}{where}, error code {code:#x},"
                f" RIP {rip:#x}",
                rip=rip,
                vector=vector,
                address=address,
            )
        rip = registers.rip
        if isinstance(exit, MmioExit):
            return GuestProgramError(
                f"the guest program touched {describe_range(exit.gpa, exit.size)},"
                f" where no memory is, RIP {rip:#x}",
                rip=rip,
                address=exit.gpa,
            )
        if isinstance(exit, ShutdownExit):
            if rip == _RESET_RIP:
                # shutdown_interception(), arch/x86/kvm/svm/svm.c: the registers are lost.
                return GuestProgramError(
                    "the guest program ended in a triple fault; its RIP is not known,"
                    " KVM has reset the vCPU"
                )
            return GuestProgramError(
                f"the guest program ended in a triple fault, RIP {rip:#x}", rip=rip
            )
        return GuestProgramError(f"the guest program stopped with {exit!r}, RIP {rip:#x}", rip=rip)

    # -- life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take it out of its VM. Twice is the same as once."""
        self._mailbox = None
        self._vcpu.close()
        self._block.close()

    def __repr__(self) -> str:
        return f"<GuestProgram that asks by {self.call.value}>"
