# SPDX-License-Identifier: Apache-2.0
"""A guest that is only a script: its requests are made directly, and what it would do with its pages the run does for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ramblock.discard.attributes import PageState
from ramblock.run.counted import CountedMemory
from ramblock.run.device import Buffer, Device
from ramblock.run.guest_script import Action, Request
from ramblock.run.ram import GuestRam
from ramblock.run.tally import Outcome
from ramblock.testing.verifier import Verifier
from ramblock.testing.violations import ViolationKind

__all__ = ["Guest", "ScriptedGuest", "check_device_data", "is_converted"]


class Guest(Protocol):
    """Whatever makes the script's requests, and uses the pages as a driver does."""

    def serve(self, request: Request) -> Outcome:
        """Do what a driver does around one request, and the request."""

    def finish(self) -> None:
        """Do what is left to do after the last request."""


def is_converted(outcome: Outcome) -> bool:
    """Whether the pages are in the state that was asked for."""
    return outcome in (Outcome.DONE, Outcome.UNCHANGED)


def check_device_data(buffer: Buffer, ram: GuestRam, device: Device, verifier: Verifier) -> None:
    """Read what the device wrote last: it must be there."""
    for offset, data in buffer.written.items():
        if ram.read(buffer.gpa + offset, len(data)) != data:
            verifier.violation(
                ViolationKind.LOST_WRITE, device.target, buffer.gpa + offset, len(data)
            )


class ScriptedGuest:
    """
    The script alone.

    :param memory: Whose pages it converts.
    :param ram: The same memory, by address.
    :param devices: Its devices.
    """

    def __init__(
        self,
        memory: CountedMemory,
        ram: GuestRam,
        devices: Sequence[Device],
        verifier: Verifier,
    ) -> None:
        self._memory = memory
        self._ram = ram
        self._devices = devices
        self._verifier = verifier

    def serve(self, request: Request) -> Outcome:
        """Do what a driver does around one request, and the request."""
        buffer = request.buffer
        if request.action is Action.FREE and buffer is not None:
            device = self._devices[buffer.device]
            device.take(buffer)
            check_device_data(buffer, self._ram, device, self._verifier)
        outcome = self._memory.ask(request)
        if buffer is None:
            return outcome
        device = self._devices[buffer.device]
        converted = is_converted(outcome)
        if request.to is PageState.PRIVATE and converted:
            self._ram.use_privately(buffer.gpa)
            device.taken_away(buffer)
        elif converted or request.action is Action.FREE:
            device.give(buffer)
        return outcome

    def finish(self) -> None:
        """Nothing is left to do."""
