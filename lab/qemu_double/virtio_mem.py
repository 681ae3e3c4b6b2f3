# SPDX-License-Identifier: Apache-2.0
"""
The guest's driver for virtio-mem, in which each access goes through the firmware.

By virtio 1.2, 4.1.4 and 5.15. It takes one page, which it has made shared, for the queue. It polls:
there are no interrupts.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from lab.qemu_double.guest import ConfidentialGuest
from lab.qemu_double.pci import find_device

__all__ = ["Answer", "VirtioMemConfig", "VirtioMemDriver"]

_VENDOR, _DEVICE = 0x1AF4, 0x1058
_BAR, _BAR_ADDRESS = 4, 0xFE00_0000
_VENDOR_SPECIFIC = 9
_COMMON, _NOTIFY, _CONFIG = 1, 2, 4  # cfg_type
_FEATURE_SELECT, _FEATURE, _DRIVER_SELECT, _DRIVER_FEATURE = 0x00, 0x04, 0x08, 0x0C
_STATUS, _QUEUE_SELECT, _QUEUE_SIZE, _QUEUE_ENABLE = 0x14, 0x16, 0x18, 0x1C
_QUEUE_DESCRIPTORS, _QUEUE_DRIVER, _QUEUE_DEVICE = 0x20, 0x28, 0x30
_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8
_NEXT, _WRITE = 1 << 32, 2 << 32  # flags of a descriptor, beside its length
_SIZE = 4
_POLLS = 200


class Answer(Enum):
    """What the device says to a request (VIRTIO_MEM_RESP_*)."""

    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class VirtioMemConfig(NamedTuple):
    """The device's configuration, in bytes."""

    block_size: int
    address: int
    region_size: int
    usable: int
    plugged: int
    requested: int


class VirtioMemDriver:
    """
    Drives the one virtio-mem device of a guest.

    :param queue: A page for the queue, which is made shared.
    :raises RuntimeError: The device does not take the driver.
    """

    def __init__(self, guest: ConfidentialGuest, queue: int) -> None:
        self._guest = guest
        self._descriptors, self._available = queue, queue + 0x100
        self._used, self._request, self._answer = queue + 0x200, queue + 0x400, queue + 0x480
        self._index = 0
        device = find_device(guest, _VENDOR, _DEVICE)
        device.place(_BAR, _BAR_ADDRESS)
        places = {}
        for kind, register in device.capabilities():
            if kind == _VENDOR_SPECIFIC and device.read_config(register + 4) & 0xFF == _BAR:
                offset = device.read_config(register + 8)
                places[device.read_config(register) >> 24] = _BAR_ADDRESS + offset
        self._common, self._notify, self._config = (
            places[kind] for kind in (_COMMON, _NOTIFY, _CONFIG)
        )
        if answer := guest.convert(queue, 4096, private=False):
            raise RuntimeError(f"the queue at {queue:#x} was not made shared: {answer}")
        self._negotiate()
        self._start_queue()

    def _negotiate(self) -> None:
        write = self._guest.write
        common = self._common
        for status in (0, _ACKNOWLEDGE, _ACKNOWLEDGE | _DRIVER):
            write(common + _STATUS, status, 1)
        for half in (0, 1):
            write(common + _FEATURE_SELECT, half, 4)
            offered = self._guest.read(common + _FEATURE, 4)
            write(common + _DRIVER_SELECT, half, 4)
            # Those of the device itself, and VIRTIO_F_VERSION_1 with VIRTIO_F_ACCESS_PLATFORM,
            # which a confidential guest needs.
            write(common + _DRIVER_FEATURE, offered & 3, 4)
        write(common + _STATUS, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK, 1)
        if not self._guest.read(common + _STATUS, 4) & _FEATURES_OK:
            raise RuntimeError("the virtio-mem device does not take the features")

    def _start_queue(self) -> None:
        write = self._guest.write
        common = self._common
        write(common + _QUEUE_SELECT, 0, 2)
        write(common + _QUEUE_SIZE, _SIZE, 2)
        for register, address in (
            (_QUEUE_DESCRIPTORS, self._descriptors),
            (_QUEUE_DRIVER, self._available),
            (_QUEUE_DEVICE, self._used),
        ):
            write(common + register, address & 0xFFFF_FFFF, 4)
            write(common + register + 4, address >> 32, 4)
        write(common + _QUEUE_ENABLE, 1, 2)
        write(self._available, 1, 4)  # no interrupts
        write(self._used, 0, 4)
        write(common + _STATUS, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK, 1)

    def config(self) -> VirtioMemConfig:
        """Read the device's configuration."""
        offsets = (0, 16, 24, 32, 40, 48)
        halves = [
            (self._guest.read(self._config + at, 4), self._guest.read(self._config + at + 4, 4))
            for at in offsets
        ]
        return VirtioMemConfig(*(low | high << 32 for low, high in halves))

    def request_size(self, size: int) -> None:
        """Have QEMU ask the guest for *size* bytes; the device refuses to plug more."""
        self._guest.qmp.execute("qom-set", path="vmem", property="requested-size", value=size)

    def plug(self, address: int, blocks: int = 1) -> Answer:
        """Ask for blocks to be plugged."""
        return self._ask(0, address, blocks)

    def unplug(self, address: int, blocks: int = 1) -> Answer:
        """Ask for blocks to be unplugged."""
        return self._ask(1, address, blocks)

    def unplug_all(self) -> Answer:
        """Ask for all to be unplugged."""
        return self._ask(2, 0, 0)

    def _ask(self, kind: int, address: int, blocks: int) -> Answer:
        guest = self._guest
        for offset, word in enumerate((kind, address, blocks)):
            guest.write(self._request + 8 * offset, word)
        guest.write(self._answer, 0xFFFF)
        guest.write(self._answer + 8, 0)
        guest.write(self._descriptors, self._request)
        guest.write(self._descriptors + 8, 24 | _NEXT | 1 << 48)
        guest.write(self._descriptors + 16, self._answer)
        guest.write(self._descriptors + 24, 10 | _WRITE)
        guest.write(self._available + 4 + 2 * (self._index % _SIZE), 0, 2)
        self._index = self._index + 1 & 0xFFFF
        guest.write(self._available + 2, self._index, 2)
        guest.write(self._notify, 0, 2)
        for _ in range(_POLLS):
            if guest.read(self._used, 4) >> 16 == self._index:
                return Answer(guest.read(self._answer) & 0xFFFF)
        raise TimeoutError("the virtio-mem device does not answer")
