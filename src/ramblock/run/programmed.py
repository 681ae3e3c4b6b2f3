# SPDX-License-Identifier: Apache-2.0
"""
A guest on a vCPU of KVM: the guest program makes the requests and touches the pages itself.

Theory of operation. For each request the guest is given commands; it runs until its request comes
out, as one exit, and the request is answered. The guest's later work on the pages is put behind it,
and is done when the guest runs on with the next request: one exit for each. The results are read at
the next exit, in the order of the commands, each with a note of the meaning of a mismatch, and of
the steps that follow once the guest is through with it: a device gets a buffer only after the guest
has touched it.

The guest writes one word at the end of a page (devices write at the start), in pages spread over
the range, the first and the last among them. Where the kernel enforces page attributes it does so
in both states, and:

- its write to a private page stays until the page is shared, and the host does not see it;
- its write to a shared page stays until the page is private, and the host sees it;
- a device's write is there when the guest takes the buffer back.

Where they are only tracked, the guest reaches the shared side in any state, so it touches shared
pages only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from ramblock.discard.attributes import PageState
from ramblock.errors import GuestProgramError, PoisonedError
from ramblock.guest_program import Command, GuestProgram, IdleEvent, Operation, Status
from ramblock.kvm import GuestConversions, HypercallExit
from ramblock.run.counted import CountedMemory
from ramblock.run.device import Buffer, Device
from ramblock.run.guest_script import Action, Request
from ramblock.run.ram import GuestRam
from ramblock.run.scripted import check_device_data, is_converted, reboot
from ramblock.run.tally import Outcome
from ramblock.testing.verifier import Verifier
from ramblock.testing.violations import ViolationKind
from ramblock.uapi.kvm_para import MapGpaRangeBits
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE

__all__ = ["ProgrammedGuest"]

_ENCRYPTED = int(MapGpaRangeBits.KVM_MAP_GPA_RANGE_ENCRYPTED)
_WORD = 8
_AT_END = PAGE_SIZE - _WORD
# Of a range with twice as many pages or more, so many are touched: emulated, each first touch takes
# a third of a millisecond.
_TOUCHES = 64
# Words of neighbouring pages differ, and so do those of one page after each request.
_INCREMENT = 1 << 48 | 1


class _Span(NamedTuple):
    """Words that the guest touches with one command."""

    start: int
    size: int
    stride: int

    @property
    def last(self) -> int:
        """Address of its last word."""
        return self.start + (self.size - 1) // self.stride * self.stride


class _Expected(NamedTuple):
    """The meaning of a command's mismatch, and the steps when the command is done."""

    kind: ViolationKind
    target: str = ""
    then: Callable[[], None] | None = None


def _spans(gpa: int, size: int) -> list[_Span]:
    """Spread words over a range of whole pages, one of them on its last page."""
    stride = max(size // _TOUCHES // PAGE_SIZE, 1) * PAGE_SIZE
    span = _Span(gpa + _AT_END, size - _AT_END, stride)
    last = gpa + size - _WORD
    return [span] if span.last == last else [span, _Span(last, _WORD, PAGE_SIZE)]


def _can_be_said(request: Request) -> bool:
    """Whether a hypercall can carry it: two registers, whole pages or a refused address."""
    fits = 0 <= request.gpa < ADDRESS_LIMIT and 0 <= request.size < ADDRESS_LIMIT
    return fits and bool(request.size % PAGE_SIZE == 0 or request.gpa % PAGE_SIZE)


class ProgrammedGuest:
    """
    The script's requests, made by a vCPU.

    :param program: The program on it.
    :param memory: Whose pages are converted.
    :param ram: The same memory, by address.
    :param devices: Its devices.
    :param enforced: Whether the kernel enforces page attributes.
    """

    def __init__(
        self,
        program: GuestProgram,
        memory: CountedMemory,
        ram: GuestRam,
        devices: Sequence[Device],
        verifier: Verifier,
        *,
        enforced: bool,
    ) -> None:
        self._program = program
        self._memory = memory
        self._conversions = GuestConversions(memory)
        self._ram = ram
        self._devices = devices
        self._verifier = verifier
        self._enforced = enforced
        self._expected: deque[_Expected] = deque()
        self._serial = 0
        # Shared, and the guest has not touched it yet.
        self._not_given: Buffer | None = None
        # The guest's writes to the private pages of a buffer's place, which no other request
        # touches.
        self._private_words: dict[tuple[int, int], int] = {}
        self._shared_words: dict[tuple[int, int], int] = {}

    def serve(self, request: Request) -> Outcome:
        """
        Let the guest make one request, with a driver's work around it.

        :raises GuestProgramError: The guest cannot go on.
        :raises StuckGuestError: It faults for ever.
        """
        if request.action is Action.REBOOT:
            return self._reboot(request)
        if not _can_be_said(request):
            return self._memory.ask(request)
        self._prepare(request)
        pages = -(-request.size // PAGE_SIZE)
        attributes = _ENCRYPTED if request.to is PageState.PRIVATE else 0
        self._put(
            Command(Operation.CONVERT, request.gpa, pages, attributes),
            _Expected(ViolationKind.STATE),
        )
        self._memory.action = request.action
        outcome = self._run_to_request(request)
        if is_converted(outcome):
            self._use(request)
        elif request.action is Action.FREE and request.buffer is not None:
            self._devices[request.buffer.device].give(request.buffer)
        return outcome

    def _reboot(self, request: Request) -> Outcome:
        """Reset the guest; the new one finds nothing where the old one wrote."""
        self._drain()
        outcome = reboot(request, self._memory, self._ram, self._devices, self._verifier)
        if is_converted(outcome):
            for gpa, size in [*self._private_words, *self._shared_words] if self._enforced else ():
                for span in _spans(gpa, size):
                    command = Command(Operation.CHECK, span.start, span.size, 0, span.stride, 0)
                    self._put(command, _Expected(ViolationKind.SURVIVED))
            self._private_words.clear()
            self._shared_words.clear()
            self._not_given = None
            self._drain()
        return outcome

    def finish(self) -> None:
        """Let the guest finish, and read the last results."""
        if not self._memory.poisoned:
            self._drain()

    # -- the vCPU ----------------------------------------------------------------------------------

    def _run_to_request(self, request: Request) -> Outcome:
        """Run until the guest has asked, and answer; it runs on with the next request."""
        # A request that is refused while it is decoded never reaches the memory.
        self._memory.outcome = Outcome.REFUSED
        while True:
            event = self._program.run()
            self._take_results()
            if isinstance(event, HypercallExit):
                with suppress(PoisonedError):  # a VMM stops the vCPU here
                    self._program.answer(self._conversions.answer(event))
                return self._memory.outcome
            if isinstance(event, IdleEvent):
                # KVM has refused it by itself (misaligned, or past the last page), which no exit
                # tells. So must we.
                return self._memory.ask(request)
            self._conversions.memory_fault(event)

    def _drain(self) -> None:
        """Run until every command is done."""
        while True:
            event = self._program.run()
            self._take_results()
            if isinstance(event, IdleEvent):
                return
            if isinstance(event, HypercallExit):
                raise GuestProgramError(
                    f"the guest program asked for what it was not told: {event!r}"
                )
            self._conversions.memory_fault(event)

    def _put(self, command: Command, expected: _Expected) -> None:
        self._program.put(command)
        self._expected.append(expected)

    def _take_results(self) -> None:
        for result in self._program.results():
            expected = self._expected.popleft()
            if result.status == Status.MISMATCH:
                self._verifier.violation(expected.kind, expected.target, result.address, _WORD)
            elif result.status != Status.DONE:
                raise GuestProgramError(
                    f"the guest program ended {result.command!r} with status {result.status:#x}"
                )
            if expected.then is not None:
                expected.then()

    # -- the guest's work on its pages -------------------------------------------------------------

    def _prepare(self, request: Request) -> None:
        """Look, before pages change, whether all is there that has to be."""
        buffer = request.buffer
        if buffer is None:
            return
        place = (buffer.gpa, buffer.size)
        words = self._shared_words
        if request.action is Action.FREE:
            self._take(buffer)
        else:
            words = self._private_words
        if place in words:
            for command in self._touch(Operation.CHECK, *place, words[place]):
                self._put(command, _Expected(ViolationKind.LOST_DATA))

    def _take(self, buffer: Buffer) -> None:
        """
        Take a buffer back from its device.

        The device's write must be there, for guest and host.
        """
        device = self._devices[buffer.device]
        if self._not_given is buffer:
            self._drain()
        device.take(buffer)
        check_device_data(buffer, self._ram, device, self._verifier)
        for offset, data in buffer.written.items():
            word = int.from_bytes(data[:_WORD], "little")
            self._put(
                Command(Operation.CHECK, buffer.gpa + offset, len(data), word, _WORD),
                _Expected(ViolationKind.LOST_WRITE, device.target),
            )

    def _use(self, request: Request) -> None:
        """Use the pages in their new state."""
        private = request.to is PageState.PRIVATE
        buffer = request.buffer
        if private and buffer is not None:
            self._devices[buffer.device].taken_away(buffer)
        if private and not self._enforced:
            if buffer is not None:
                self._ram.use_privately(buffer.gpa)
            return
        if not private:
            self._not_given = buffer
        self._serial += 1
        word, place = self._serial, (request.gpa, request.size)
        if buffer is not None:
            (self._private_words if private else self._shared_words)[place] = word
            (self._shared_words if private else self._private_words).pop(place, None)
        for operation in (Operation.FILL, Operation.CHECK):
            for command in self._touch(operation, *place, word):
                self._put(command, _Expected(ViolationKind.LOST_DATA))
        self._expected[-1] = _Expected(
            ViolationKind.LOST_DATA, then=lambda: self._look(request, word, private=private)
        )

    def _look(self, request: Request, word: int, *, private: bool) -> None:
        """
        Look as the host at the guest's latest write.

        Then the device may have a shared buffer.
        """
        for address, value in self._words(request.gpa, request.size, word):
            seen = self._ram.read(address, _WORD) == value.to_bytes(_WORD, "little")
            if seen is private:
                kind = ViolationKind.PRIVATE_SEEN if private else ViolationKind.HOST_BLIND
                self._verifier.violation(kind, "", address, _WORD)
        if request.buffer is not None and not private:
            self._not_given = None
            self._devices[request.buffer.device].give(request.buffer)

    @staticmethod
    def _touch(operation: Operation, gpa: int, size: int, word: int) -> Iterator[Command]:
        for number, span in enumerate(_spans(gpa, size)):
            yield Command(
                operation, span.start, span.size, word + (number << 32), span.stride, _INCREMENT
            )

    @staticmethod
    def _words(gpa: int, size: int, word: int) -> Iterator[tuple[int, int]]:
        """Yield the first and the last word of each span, as (address, value)."""
        for number, span in enumerate(_spans(gpa, size)):
            first = word + (number << 32)
            steps = (span.last - span.start) // span.stride
            yield span.start, first
            if steps:
                yield span.last, first + steps * _INCREMENT
