"""
The run's side of a guest on a vCPU, against a guest in Python whose memory can be made to lie.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from doubles import RecordingVm
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.errors import GuestProgramError
from ramblock.guest_program import Command, GuestProgram, IdleEvent, Operation, Result, Status
from ramblock.kvm import HypercallExit, HypercallResult, MemoryFaultExit
from ramblock.run.counted import CountedMemory
from ramblock.run.device import Buffer, Device
from ramblock.run.guest_script import Action, Request
from ramblock.run.layout import BlockPlace
from ramblock.run.programmed import ProgrammedGuest
from ramblock.run.ram import GuestRam
from ramblock.run.tally import Outcome
from ramblock.testing import Region, Verifier, ViolationKind
from ramblock.trace.writer import TraceWriter
from ramblock.units import MIB, PAGE_SIZE

SIZE = 4 * MIB
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


class PythonGuest:
    """
    What the guest program does, on two memories.

    The next words it reads or writes can go wrong.
    """

    def __init__(self, memory: GuestMemory, block: RamBlock) -> None:
        self.memory = memory
        self.block = block
        self.private: dict[int, int] = {}
        self.commands: deque[Command] = deque()
        self.finished: list[Result] = []
        self.asked: Command | None = None
        self.exits = 0
        self.log: list[Command] = []
        #: Private pages are not private: they are written to the shared side.
        self.leaks = False
        #: Shared pages are not shared: they are written somewhere else.
        self.blind = False
        #: The first access to a page faults.
        self.fault: MemoryFaultExit | None = None
        #: What KVM refuses without asking anybody.
        self.refuses = 0
        self.status = Status.DONE

    def put(self, command: Command) -> None:
        self.commands.append(command)

    def results(self) -> list[Result]:
        finished, self.finished = self.finished, []
        return finished

    def answer(self, result: HypercallResult) -> None:
        assert self.asked is not None
        self.finished.append(Result(self.asked, Status.DONE, result, 0))
        self.asked = None

    def run(self) -> HypercallExit | MemoryFaultExit | IdleEvent:
        self.exits += 1
        assert self.asked is None, "not answered"
        if self.fault is not None:
            fault, self.fault = self.fault, None
            return fault
        while self.commands:
            command = self.commands.popleft()
            self.log.append(command)
            if command.operation != Operation.CONVERT:
                self.finished.append(self._touch(command))
            elif self.refuses:
                self.refuses -= 1
                self.finished.append(Result(command, Status.DONE, -errno.EINVAL, 0))
            else:
                self.asked = command
                arguments = (command.gpa, command.size, command.value, 0, 0, 0)
                return HypercallExit(nr=12, args=arguments, long_mode=True)
        return IdleEvent()

    def _touch(self, command: Command) -> Result:
        word = command.value
        for address in range(command.gpa, command.gpa + command.size, command.stride):
            if command.operation == Operation.FILL:
                self._write(address, word)
            elif (found := self._read(address)) != word:
                return Result(command, Status.MISMATCH, found, address)
            word += command.increment
        return Result(command, self.status, 0, 0)

    def _is_private(self, address: int) -> bool:
        return self.memory.state(address) is PRIVATE

    def _write(self, address: int, word: int) -> None:
        private = self._is_private(address)
        if private or self.blind:
            self.private[address] = word
        if (not private and not self.blind) or (private and self.leaks):
            self.block.write(address, word.to_bytes(8, "little"))

    def _read(self, address: int) -> int:
        if self._is_private(address) or self.blind:
            return self.private.get(address, 0)
        return int.from_bytes(self.block.read(address, 8), "little")


class QuietDevice(Device):
    """One whose thread is not started; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(0, "iommu0", 1, 1.0)
        self.events: list[str] = []

    def give(self, buffer: Buffer) -> None:
        super().give(buffer)
        self.events.append("give")

    def take(self, buffer: Buffer) -> None:
        super().take(buffer)
        self.events.append("take")

    def taken_away(self, buffer: Buffer) -> None:
        self.events.append("taken away")


class Rig:
    def __init__(self, resources: ExitStack, *, enforced: bool) -> None:
        place = BlockPlace("ram", 0, SIZE, confidential=True)
        self.verifier = Verifier([Region(0, SIZE, confidential=True)], ["iommu0"])
        self.vm = RecordingVm()
        self.memory = CountedMemory(self.vm, self.verifier, TraceWriter(None))
        block = resources.enter_context(RamBlock.create("ram", SIZE, private="stand-in"))
        self.memory.map(block, 0)
        ram = GuestRam([place])
        ram.blocks["ram"] = block
        ram.private["ram"] = self  # type: ignore[assignment]  # it has use()
        self.block = block
        self.used: list[int] = []
        self.device = QuietDevice()
        self.program = PythonGuest(self.memory, block)
        self.guest = ProgrammedGuest(
            cast("GuestProgram", self.program),
            self.memory,
            ram,
            [self.device],
            self.verifier,
            enforced=enforced,
        )

    def use(self, offset: int) -> None:
        self.used.append(offset)

    def ask(
        self,
        to: PageState,
        *,
        gpa: int = 16 * PAGE_SIZE,
        size: int = 4 * PAGE_SIZE,
        buffer: Buffer | None = None,
    ) -> Outcome:
        action = Action.HOSTILE
        if buffer is not None:
            gpa, size = buffer.gpa, buffer.size
            action = Action.ALLOC if to is SHARED else Action.FREE
        return self.guest.serve(Request(gpa, size, to, action, buffer))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as resources:
        yield Rig(resources, enforced=True)


@pytest.fixture
def tracked() -> Iterator[Rig]:
    with ExitStack() as resources:
        yield Rig(resources, enforced=False)


def buffer() -> Buffer:
    return Buffer(32 * PAGE_SIZE, 8 * PAGE_SIZE, 0)


def test_one_exit_for_each_request(rig: Rig) -> None:
    for _ in range(5):
        assert rig.ask(SHARED) is Outcome.DONE
        assert rig.ask(PRIVATE) is Outcome.DONE
    assert rig.program.exits == 10
    rig.guest.finish()
    assert rig.program.exits == 11
    assert rig.verifier.clean
    assert rig.memory.tally.outcomes == {Outcome.DONE: 10}


def test_first_and_last_page_are_touched_and_not_too_many_between(rig: Rig) -> None:
    for pages in (1, 2, 63, 64, 65, 127, 128, 200, 512):
        size = pages * PAGE_SIZE
        rig.program.log.clear()
        rig.ask(SHARED, gpa=0, size=size)
        rig.guest.finish()
        touched = [
            address
            for command in rig.program.log
            if command.operation == Operation.FILL
            for address in range(command.gpa, command.gpa + command.size, command.stride)
        ]
        assert touched[0] // PAGE_SIZE == 0
        assert touched[-1] // PAGE_SIZE == pages - 1
        assert all(address % PAGE_SIZE == PAGE_SIZE - 8 for address in touched)
        assert (
            len(set(touched))
            == len(touched)
            == len(range(0, pages, max(pages // 64, 1))) + ((pages - 1) % max(pages // 64, 1) != 0)
        )
    assert rig.verifier.clean


def test_a_device_gets_a_buffer_only_when_the_guest_has_touched_it(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    assert rig.device.events == []
    rig.ask(SHARED)
    assert rig.device.events == ["give"]
    rig.ask(PRIVATE, buffer=shared)
    assert rig.device.events == ["give", "take", "taken away"]


def test_a_buffer_that_is_freed_at_once_is_given_first(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    rig.ask(PRIVATE, buffer=shared)
    assert rig.device.events == ["give", "take", "taken away"]
    assert rig.verifier.clean


def test_what_a_device_wrote_is_looked_for_by_guest_and_host(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    rig.ask(SHARED)
    word = (0x1234_5678_9ABC_DEF0).to_bytes(8, "little")
    shared.written[PAGE_SIZE] = word * 8
    rig.block.write(shared.gpa + PAGE_SIZE, word * 7)  # the last word is missing
    rig.ask(PRIVATE, buffer=shared)
    assert rig.verifier.counts == {ViolationKind.LOST_WRITE: 2}
    assert {violation.gpa for violation in rig.verifier.violations()} == {shared.gpa + PAGE_SIZE}


def test_private_data_that_the_host_sees_is_a_violation(rig: Rig) -> None:
    rig.program.leaks = True
    rig.ask(SHARED)
    rig.ask(PRIVATE)
    rig.guest.finish()
    assert rig.verifier.counts.keys() == {ViolationKind.PRIVATE_SEEN}


def test_shared_data_that_the_host_does_not_see_is_a_violation(rig: Rig) -> None:
    rig.program.blind = True
    rig.ask(SHARED)
    rig.guest.finish()
    assert rig.verifier.counts.keys() == {ViolationKind.HOST_BLIND}


def test_private_data_that_is_gone_when_the_buffer_is_shared_is_a_violation(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    rig.ask(PRIVATE, buffer=shared)
    rig.guest.finish()
    rig.program.private.clear()
    again = buffer()
    rig.ask(SHARED, buffer=again)
    assert rig.verifier.counts == {ViolationKind.LOST_DATA: 1}


def test_shared_data_that_is_gone_when_the_buffer_is_taken_back_is_a_violation(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    rig.guest.finish()
    rig.block.write(shared.gpa, bytes(shared.size))
    rig.ask(PRIVATE, buffer=shared)
    assert rig.verifier.counts == {ViolationKind.LOST_DATA: 1}


def test_a_refused_free_gives_the_buffer_back(rig: Rig) -> None:
    shared = buffer()
    rig.ask(SHARED, buffer=shared)
    rig.ask(SHARED)
    calls = iter([True])
    rig.vm.refuse = lambda call: call[0] == "private" and next(calls, False)
    assert rig.ask(PRIVATE, buffer=shared) is Outcome.ROLLED_BACK
    assert rig.device.events == ["give", "take", "give"]
    rig.ask(PRIVATE, buffer=shared)
    rig.guest.finish()
    assert rig.device.events == ["give", "take", "give", "take", "taken away"]
    assert rig.verifier.clean


def test_where_attributes_are_only_tracked_private_pages_are_left_alone(tracked: Rig) -> None:
    shared = buffer()
    tracked.ask(SHARED, buffer=shared)
    tracked.ask(PRIVATE, buffer=shared)
    tracked.ask(PRIVATE)
    tracked.guest.finish()
    touched = [command for command in tracked.program.log if command.operation != Operation.CONVERT]
    assert {command.gpa // PAGE_SIZE for command in touched} == {shared.gpa // PAGE_SIZE}
    assert tracked.used == [shared.gpa]
    assert tracked.device.events == ["give", "take", "taken away"]
    assert tracked.program.private == {}


def test_what_kvm_refuses_itself_is_counted_as_refused(rig: Rig) -> None:
    rig.program.refuses = 1
    assert rig.ask(SHARED, gpa=5, size=100) is Outcome.REFUSED
    assert rig.memory.tally.reasons == {"not aligned to pages": 1}
    assert rig.ask(SHARED) is Outcome.DONE


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(-PAGE_SIZE, PAGE_SIZE), (1 << 64, PAGE_SIZE), (0, -1), (0, 1 << 64), (0, 100)],
)
def test_what_no_hypercall_can_say_is_asked_without_the_guest(
    rig: Rig, gpa: int, size: int
) -> None:
    assert rig.ask(SHARED, gpa=gpa, size=size) is Outcome.REFUSED
    assert rig.program.exits == 0
    assert rig.memory.tally.requests == 1


def test_a_memory_fault_is_an_implicit_conversion(rig: Rig) -> None:
    rig.program.fault = MemoryFaultExit(gpa=0, size=PAGE_SIZE, flags=0, errno=errno.EFAULT)
    rig.ask(SHARED)
    assert rig.memory.state(0) is SHARED
    rig.program.fault = MemoryFaultExit(gpa=0, size=PAGE_SIZE, flags=8, errno=errno.EFAULT)
    rig.guest.finish()
    assert rig.memory.state(0) is PRIVATE


def test_a_status_that_cannot_be_ends_the_run(rig: Rig) -> None:
    rig.program.status = cast("Any", 99)
    rig.ask(SHARED)
    with pytest.raises(GuestProgramError, match="with status 0x63"):
        rig.guest.finish()


def test_a_request_that_was_not_told_ends_the_run(rig: Rig) -> None:
    rig.program.put(Command(Operation.CONVERT, 0, 1))
    with pytest.raises(GuestProgramError, match="asked for what it was not told"):
        rig.guest.finish()
