# SPDX-License-Identifier: Apache-2.0
"""The probe as a VMM sees it: a PCI device with config space and one small BAR, by messages."""

from __future__ import annotations

import errno

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
    SetIrqsReply,
)
from ramblock.probe.config_space import CONFIG_SIZE, ConfigSpace
from ramblock.probe.engine import DmaEngine, ReachesMemory
from ramblock.uapi.vfio import DeviceFlags, PciRegion, RegionFlags
from ramblock.vfio.probe_registers import BAR_SIZE

__all__ = ["ProbeDevice"]

# VFIO_PCI_NUM_REGIONS and VFIO_PCI_NUM_IRQS (include/uapi/linux/vfio.h); the last region is VGA's.
_REGIONS = 9
_IRQS = 5
_INFO_SIZE, _REGION_INFO_SIZE, _IRQ_INFO_SIZE = 16, 32, 16
_READ_WRITE = RegionFlags.VFIO_REGION_INFO_FLAG_READ | RegionFlags.VFIO_REGION_INFO_FLAG_WRITE


class ProbeDevice:
    """
    Answers everything but DMA_MAP and DMA_UNMAP.

    :param memory: Its engine's access to the client's memory.
    """

    def __init__(self, memory: ReachesMemory) -> None:
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

    def carry_out(self, message: Message) -> Message | int:
        """Carry out a request; the answer, or the errno of a refusal."""
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
            case SetIrqs(index=index, count=0) if index < _IRQS:
                return SetIrqsReply()
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
            case GetDeviceInfo() | GetRegionInfo() | GetIrqInfo() | SetIrqs():
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
        content.write(message.offset, message.data)
        return 0
