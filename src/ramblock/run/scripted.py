# SPDX-License-Identifier: Apache-2.0
"""A guest that is only a script: the run makes its requests, and accesses its pages for it."""

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

__all__ = ["Guest", "ScriptedGuest", "check_device_data", "is_converted", "reboot"]


class Guest(Protocol):
    """Makes the script's requests, and uses the pages as a driver does."""

    def serve(self, request: Request) -> Outcome:
        """Make one request, with a driver's work around it."""

    def finish(self) -> None:
        """Finish the work after the last request."""


def is_converted(outcome: Outcome) -> bool:
    """Whether the pages are in the state that was asked for."""
    return outcome in (Outcome.DONE, Outcome.UNCHANGED)


def check_device_data(buffer: Buffer, ram: GuestRam, device: Device, verifier: Verifier) -> None:
    """Read the device's last write: it must be there."""
    for offset, data in buffer.written.items():
        if ram.read(buffer.gpa + offset, len(data)) != data:
            verifier.violation(
                ViolationKind.LOST_WRITE, device.target, buffer.gpa + offset, len(data)
            )


def reboot(
    request: Request,
    memory: CountedMemory,
    ram: GuestRam,
    devices: Sequence[Device],
    verifier: Verifier,
) -> Outcome:
    """Take all buffers from the devices, reset the guest, and look for anything of the old one."""
    taken = [(device, device.take_all()) for device in devices]
    outcome = memory.ask(request)
    for device, buffers in taken:
        for buffer in buffers:
            if is_converted(outcome):
                device.taken_away(buffer)
            else:
                device.give(buffer)
    if is_converted(outcome):
        for name, size in ram.not_empty():
            place = next(place for place in ram.places if place.name == name)
            verifier.violation(ViolationKind.SURVIVED, "", place.gpa, size)
    return outcome


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
        """Make one request, with a driver's work around it."""
        if request.action is Action.REBOOT:
            return reboot(request, self._memory, self._ram, self._devices, self._verifier)
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
