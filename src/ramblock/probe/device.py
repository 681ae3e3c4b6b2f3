# SPDX-License-Identifier: Apache-2.0
"""The probe as a VMM sees it: a PCI device with config space and one small BAR, by messages."""

from __future__ import annotations

import errno
from collections.abc import Callable

from ramblock.dma.vfio_user.messages import (
    DeviceInfoReply,
    GetDeviceInfo,
    GetIrqInfo,
    GetRegionInfo,
    IrqInfoReply,
    Message,
    RegionInfoReply,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
    RegionWriteReply,
    Reset,
    ResetReply,
    SetIrqs,
)
from ramblock.dma.vfio_user.numbers import IrqSetFlags
from ramblock.probe.config_space import CONFIG_SIZE, ConfigSpace
from ramblock.probe.engine import DmaEngine, ReachesMemory
from ramblock.probe.windows import Note, Rule, RuleBroken
from ramblock.uapi.vfio import DeviceFlags, PciRegion, RegionFlags
from ramblock.vfio.probe_registers import BAR_SIZE

__all__ = ["ProbeDevice"]

# VFIO_PCI_NUM_REGIONS and VFIO_PCI_NUM_IRQS (include/uapi/linux/vfio.h); the last region is VGA's.
_REGIONS = 9
_IRQS = 5
_IRQ_DATA = int(IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD)
_IRQ_ACTIONS = int(IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER)
_IRQ_FLAGS = _IRQ_DATA | _IRQ_ACTIONS
# VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX.
_SINGLE_IRQS = (3, 4)
# Offsets of the header where no register begins (libvfio-user: lib/pci.c,
# pci_config_space_size_for_reg()).
_INSIDE_REGISTERS = frozenset(range(0x40)) - {
    0x00, 0x04, 0x06, 0x08, 0x09, 0x0C, 0x0D, 0x0E, 0x0F, *range(0x10, 0x34, 4), 0x34,
    0x3C, 0x3D, 0x3E, 0x3F,
}  # fmt: skip
_INFO_SIZE, _REGION_INFO_SIZE, _IRQ_INFO_SIZE = 16, 32, 16
_READ_WRITE = RegionFlags.VFIO_REGION_INFO_FLAG_READ | RegionFlags.VFIO_REGION_INFO_FLAG_WRITE


class ProbeDevice:
    """
    Answers everything but DMA_MAP and DMA_UNMAP.

    :param memory: Its engine's access to the client's memory.
    :param note: Told of a request that is carried out and that others may refuse.
    """

    def __init__(self, memory: ReachesMemory, note: Callable[[Note, str], object]) -> None:
        self._note = note
        self._config = ConfigSpace()
        self._engine = DmaEngine(memory)
        self._regions: dict[int, tuple[int, ConfigSpace | DmaEngine]] = {
            PciRegion.VFIO_PCI_BAR0_REGION_INDEX: (BAR_SIZE, self._engine),
            PciRegion.VFIO_PCI_CONFIG_REGION_INDEX: (CONFIG_SIZE, self._config),
        }

    @property
    def bus_master(self) -> bool:
        """Whether the driver allows DMA."""
        return self._config.bus_master

    def carry_out(self, message: Message, fds: int = 0) -> Message | int:
        """
        Carry out a request; the answer, or the errno of a refusal.

        :param fds: How many descriptors came along.
        :raises RuleBroken: It could not be carried out by any device.
        """
        match message:
            case GetDeviceInfo():
                flags = DeviceFlags.VFIO_DEVICE_FLAGS_RESET | DeviceFlags.VFIO_DEVICE_FLAGS_PCI
                return DeviceInfoReply(_INFO_SIZE, flags, _REGIONS, _IRQS)
            case GetRegionInfo(index=index) if index < _REGIONS:
                size, _ = self._regions.get(index, (0, None))
                access = _READ_WRITE if size else 0
                return RegionInfoReply(_REGION_INFO_SIZE, access, index, 0, size, 0)
            case GetIrqInfo(index=index) if index < _IRQS:
                return IrqInfoReply(_IRQ_INFO_SIZE, 0, index, 0)  # it has no interrupts
            case SetIrqs():
                _check_irqs(message, fds)
                return errno.EINVAL  # it has none
            case RegionRead(region=region, offset=offset, count=count):
                return self._read(region, offset, count)
            case RegionWrite():
                return self._write(message) or RegionWriteReply(
                    message.region, message.offset, len(message.data)
                )
            case RegionWriteMulti(writes=writes):
                for write in writes:
                    number = self._write(write)
                    if number:
                        return number
                return RegionWriteMultiReply(len(writes))
            case Reset():
                self._config.reset()
                self._engine.reset()
                return ResetReply()
            case GetRegionInfo() | GetIrqInfo():
                return errno.EINVAL
        return errno.ENOTSUP

    def _read(self, region: int, offset: int, count: int) -> Message | int:
        size, content = self._regions.get(region, (0, None))
        if content is None or offset + count > size:
            return errno.EINVAL
        return RegionReadReply(region, offset, content.read(offset, count))

    def _write(self, message: RegionWrite) -> int:
        size, content = self._regions.get(message.region, (0, None))
        if content is None or message.offset + len(message.data) > size:
            return errno.EINVAL
        if content is self._config and message.offset in _INSIDE_REGISTERS:
            self._note(Note.CONFIG_WRITE, f"{len(message.data)} bytes at {message.offset:#x}")
        content.write(message.offset, message.data)
        return 0


def _check_irqs(message: SetIrqs, fds: int) -> None:
    """Check what libvfio-user checks (lib/irq.c, device_set_irqs_validate()), and Linux."""
    flags, count = message.flags, message.count
    if flags & ~_IRQ_FLAGS:
        raise RuleBroken(Rule.UNKNOWN, errno.EINVAL, f"flags {flags:#x} of SET_IRQS")
    action, data = flags & _IRQ_ACTIONS, flags & _IRQ_DATA
    if action.bit_count() != 1 or data.bit_count() != 1:
        text = f"flags {flags:#x}: not one action and one kind of data"
    elif fds and (data != IrqSetFlags.DATA_EVENTFD or fds != count):
        text = f"{fds} descriptors for {count} interrupts, flags {flags:#x}"
    elif not count and (
        message.start or flags != IrqSetFlags.ACTION_TRIGGER | IrqSetFlags.DATA_NONE
    ):
        text = f"no interrupts from {message.start} on, flags {flags:#x}"
    elif message.index in _SINGLE_IRQS and (action != IrqSetFlags.ACTION_TRIGGER or count > 1):
        text = f"interrupt {message.index} is one, and cannot be masked: flags {flags:#x}"
    else:
        return
    raise RuleBroken(Rule.INTERRUPTS, errno.EINVAL, text)
