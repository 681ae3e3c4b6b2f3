"""The mailbox: commands in, results out, and a guest that writes what it likes into it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.errors import GuestProgramError, UsageError
from ramblock.guest_program.mailbox import (
    COMMAND_SHIFT,
    MAILBOX_SIZE,
    RING_COMMANDS,
    Command,
    Field,
    HeaderField,
    Mailbox,
    Operation,
    Status,
)
from ramblock.units import PAGE_SIZE

words = st.integers(0, (1 << 64) - 1)


class Guest:
    """The other side, in Python."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(MAILBOX_SIZE)).cast("Q")
        self.mailbox = Mailbox(self.memory)

    def read(self, field: HeaderField) -> int:
        return self.memory[field // 8]

    def _slot(self, number: int) -> int:
        return (PAGE_SIZE + (number % RING_COMMANDS << COMMAND_SHIFT)) // 8

    def command(self, number: int) -> tuple[int, ...]:
        start = self._slot(number)
        return tuple(self.memory[start : start + 6])

    def finish(self, status: int, found: int = 0, address: int = 0) -> None:
        head = self.read(HeaderField.HEAD)
        start = self._slot(head)
        for field, value in (
            (Field.STATUS, status),
            (Field.FOUND, found),
            (Field.ADDRESS, address),
        ):
            self.memory[start + field // 8] = value
        self.memory[HeaderField.HEAD // 8] = head + 1


def test_a_command_arrives_and_its_result_comes_back() -> None:
    guest = Guest()
    command = Command(Operation.CHECK, 1 << 32, 4096, 7, 8, 1)
    guest.mailbox.put(command)
    assert guest.read(HeaderField.TAIL) == 1
    assert guest.command(0) == command
    assert guest.mailbox.results() == []
    guest.finish(Status.MISMATCH, 9, (1 << 32) + 8)
    assert guest.mailbox.results() == [(command, Status.MISMATCH, 9, (1 << 32) + 8)]
    assert guest.mailbox.results() == []


@given(commands=st.lists(st.tuples(words, words, words), max_size=50), rounds=st.integers(1, 5))
def test_results_belong_to_their_commands_round_after_round(
    commands: list[tuple[int, int, int]], rounds: int
) -> None:
    guest = Guest()
    guest.mailbox._written = guest.mailbox._read = RING_COMMANDS - 5  # the ring's end is near
    guest.memory[HeaderField.HEAD // 8] = RING_COMMANDS - 5
    for _ in range(rounds):
        for operation, gpa, size in commands:
            guest.mailbox.put(Command(operation, gpa, size))
        for operation, gpa, size in commands:
            assert guest.command(guest.read(HeaderField.HEAD))[:3] == (operation, gpa, size)
            guest.finish(Status.DONE, gpa, size)
        results = guest.mailbox.results()
        assert [(result.command[:3], result.address) for result in results] == [
            (command, command[2]) for command in commands
        ]


def test_the_result_of_an_earlier_command_does_not_show() -> None:
    guest = Guest()
    for _ in range(RING_COMMANDS):
        guest.mailbox.put(Command(Operation.CHECK, 0, 8, 0, 8))
        guest.finish(Status.MISMATCH, 1, 2)
    guest.mailbox.results()
    guest.mailbox.put(Command(Operation.CHECK, 0, 8, 0, 8))
    guest.memory[HeaderField.HEAD // 8] += 1  # it did not even look at it
    ((_, status, found, address),) = guest.mailbox.results()
    assert (status, found, address) == (0, 0, 0)


def test_numbers_are_cut_to_64_bits() -> None:
    guest = Guest()
    guest.mailbox.put(Command(1 << 64, -4096, (1 << 65) - 1))
    assert guest.command(0)[:3] == (0, (1 << 64) - 4096, (1 << 64) - 1)


def test_an_answer_of_kvm_itself_is_negative() -> None:
    guest = Guest()
    for operation in (Operation.CONVERT, Operation.CHECK):
        guest.mailbox.put(Command(operation, 0, 1))
        guest.finish(Status.DONE, (1 << 64) - 22)
    assert [result.found for result in guest.mailbox.results()] == [-22, (1 << 64) - 22]


def test_a_full_ring_is_refused() -> None:
    guest = Guest()
    for _ in range(RING_COMMANDS):
        guest.mailbox.put(Command(Operation.CONVERT, 0, 1))
    assert guest.mailbox.room == 0
    with pytest.raises(UsageError, match=f"{RING_COMMANDS} commands are waiting"):
        guest.mailbox.put(Command(Operation.CONVERT, 0, 1))
    guest.finish(Status.DONE)
    assert len(guest.mailbox.results()) == 1
    assert guest.mailbox.room == 1


@pytest.mark.parametrize("head", [3, (1 << 64) - 1])
def test_a_guest_that_claims_more_than_it_was_told_is_not_believed(head: int) -> None:
    guest = Guest()
    guest.mailbox.put(Command(Operation.CONVERT, 0, 1))
    guest.mailbox.put(Command(Operation.CONVERT, 0, 1))
    guest.memory[HeaderField.HEAD // 8] = head
    with pytest.raises(
        GuestProgramError, match=f"finished {head:#x} commands, expected 0x0 to 0x2"
    ):
        guest.mailbox.results()


def test_a_guest_cannot_take_a_command_back() -> None:
    guest = Guest()
    guest.mailbox.put(Command(Operation.CONVERT, 0, 1))
    guest.finish(Status.DONE)
    guest.mailbox.results()
    guest.memory[HeaderField.HEAD // 8] = 0
    with pytest.raises(GuestProgramError, match="expected 0x1 to 0x1"):
        guest.mailbox.results()
