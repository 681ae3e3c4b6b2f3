# SPDX-License-Identifier: Apache-2.0
"""
The memory between host and guest program: a ring of commands with room for their results.

::

    header     HEAD  commands that the guest has finished
               TAIL  commands that the host has written
    ring       RING_COMMANDS slots of 128 bytes, used in turn; commands HEAD to TAIL are waiting

Both numbers only grow; each side writes one of them. All fields are 64 bits wide. The guest is not
trusted: a number here may be anything, and the host uses it for nothing but its report.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import NamedTuple

from ramblock.errors import GuestProgramError, UsageError
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE

__all__ = [
    "COMMAND_SHIFT",
    "MAILBOX_SIZE",
    "RING_COMMANDS",
    "Command",
    "Field",
    "HeaderField",
    "Mailbox",
    "Operation",
    "Result",
    "Status",
]

_WORD = 8
_MASK = ADDRESS_LIMIT - 1
# One buffer of 2 MiB can have a check for each of its 512 pages.
RING_COMMANDS = 2048
COMMAND_SHIFT = 7
_COMMAND_SIZE = 1 << COMMAND_SHIFT
#: Bytes of header and ring.
MAILBOX_SIZE = PAGE_SIZE + RING_COMMANDS * _COMMAND_SIZE


class HeaderField(IntEnum):
    """Offsets in the header, in bytes."""

    HEAD = 0
    TAIL = 8


class Field(IntEnum):
    """Offsets in a command, in bytes; the last three are its result."""

    OPERATION = 0
    GPA = 8
    SIZE = 16
    VALUE = 24
    STRIDE = 32
    INCREMENT = 40
    STATUS = 48
    FOUND = 56
    ADDRESS = 64


class Operation(IntEnum):
    """Commands to the guest."""

    CONVERT = 1
    """Ask for a conversion of SIZE pages at GPA with the attribute word VALUE."""
    FILL = 2
    """Write a word every STRIDE bytes: VALUE, then INCREMENT more each time."""
    CHECK = 3
    """Read the same words and compare; the first that differs ends it."""


class Status(IntEnum):
    """How a command ended, as the guest program says it."""

    DONE = 1
    MISMATCH = 2
    """CHECK read something else: FOUND at ADDRESS."""
    REFUSED = 3
    """Not a command that can be carried out: unknown, no size, or a stride below one word."""


class Command(NamedTuple):
    """
    One command.

    It is written as it is, with each number cut to 64 bits: tests send nonsense too.
    """

    operation: int
    gpa: int
    size: int
    """In bytes; for CONVERT in pages."""
    value: int = 0
    stride: int = 0
    increment: int = 0


class Result(NamedTuple):
    """The guest program's result of a command."""

    command: Command
    status: int
    """A :class:`Status`, if the guest program is sane."""
    found: int
    """
    CONVERT: the answer it got, negative where KVM itself refused.

    CHECK: the word that differs.
    """
    address: int
    """CHECK: where that word is."""


class Mailbox:
    """
    The host's side.

    :param memory: The guest's memory from the header on, writable, in 64-bit words; MAILBOX_SIZE
        bytes.
    """

    def __init__(self, memory: memoryview[int]) -> None:
        self._memory = memory
        self._written = 0
        self._read = 0
        self._waiting: deque[Command] = deque()

    @property
    def room(self) -> int:
        """How many commands can be put now."""
        return RING_COMMANDS - (self._written - self._read)

    def put(self, command: Command) -> None:
        """
        Let the guest do *command*, after those before it.

        :raises UsageError: No room: results have to be taken first.
        """
        if not self.room:
            raise UsageError(
                f"{RING_COMMANDS} commands are waiting",
                value=command,
                expected="results() to be taken first",
            )
        start = self._slot(self._written)
        words = (*command, 0, 0, 0)
        for offset, word in zip(range(start, start + len(words)), words, strict=True):
            self._memory[offset] = word & _MASK
        self._waiting.append(command)
        self._written += 1
        self._memory[HeaderField.TAIL // _WORD] = self._written

    def results(self) -> list[Result]:
        """
        Take the results of the commands that were finished since the last time, oldest first.

        :raises GuestProgramError: The guest says that it finished commands that it was not given.
        """
        finished = self._memory[HeaderField.HEAD // _WORD]
        if not self._read <= finished <= self._written:
            raise GuestProgramError(
                f"the guest program says that it finished {finished:#x} commands,"
                f" expected {self._read:#x} to {self._written:#x}"
            )
        results = []
        while self._read < finished:
            start = self._slot(self._read) + Field.STATUS // _WORD
            status, found, address = self._memory[start : start + 3]
            command = self._waiting.popleft()
            results.append(Result(command, status, _signed(found, command), address))
            self._read += 1
        return results

    @staticmethod
    def _slot(number: int) -> int:
        """Where command *number* is, in words."""
        return (PAGE_SIZE + number % RING_COMMANDS * _COMMAND_SIZE) // _WORD


def _signed(found: int, command: Command) -> int:
    """Read an answer of KVM as the negative number that it may be."""
    if command.operation == Operation.CONVERT and found >= ADDRESS_LIMIT // 2:
        return found - ADDRESS_LIMIT
    return found
