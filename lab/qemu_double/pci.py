# SPDX-License-Identifier: Apache-2.0
"""PCI as the guest's firmware would do it: find a device, place its registers, switch it on."""

from __future__ import annotations

from collections.abc import Iterator

from lab.qemu_double.guest import ConfidentialGuest

__all__ = ["GuestPciDevice", "find_device"]

_ADDRESS_PORT, _DATA_PORT = 0xCF8, 0xCFC
_ENABLE = 1 << 31
_COMMAND, _BAR0, _CAPABILITIES = 0x04, 0x10, 0x34
_MEMORY_AND_BUS_MASTER = 0x6
_ABSENT = 0xFFFF_FFFF


class GuestPciDevice:
    """A device on bus 0, by device and function number."""

    def __init__(self, guest: ConfidentialGuest, function: int) -> None:
        self.guest = guest
        self._function = function

    def read_config(self, register: int) -> int:
        """Read 32 bits of configuration space."""
        self._select(register)
        return self.guest.port_in(_DATA_PORT)

    def write_config(self, register: int, value: int) -> None:
        """Write them."""
        self._select(register)
        self.guest.port_out(_DATA_PORT, value)

    def place(self, bar: int, address: int) -> None:
        """Let a BAR be at *address*, below 4 GiB, and switch the device on."""
        register = _BAR0 + 4 * bar
        wide = self.read_config(register) & 4
        self.write_config(register, address)
        if wide:
            self.write_config(register + 4, 0)
        self.write_config(_COMMAND, _MEMORY_AND_BUS_MASTER)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Yield the capabilities as (id, register)."""
        register = self.read_config(_CAPABILITIES) & 0xFC
        while register:
            word = self.read_config(register)
            yield word & 0xFF, register
            register = word >> 8 & 0xFC

    def _select(self, register: int) -> None:
        address = _ENABLE | self._function << 8 | register & 0xFC
        self.guest.port_out(_ADDRESS_PORT, address)


def find_device(guest: ConfidentialGuest, vendor: int, device: int) -> GuestPciDevice:
    """
    Find a device on bus 0.

    :raises LookupError: There is none.
    """
    for function in range(256):
        found = GuestPciDevice(guest, function)
        if (ids := found.read_config(0)) not in (0, _ABSENT) and ids == device << 16 | vendor:
            return found
    raise LookupError(f"the guest has no PCI device {vendor:04x}:{device:04x} on bus 0")
