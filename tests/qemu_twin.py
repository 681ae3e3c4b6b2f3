"""
A GuestMemory laid out like a guest of the double, with a device of our own for each of QEMU's.

Both start with all pages private. What the two of ours map has to be the same, whichever the
policy.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from lab.qemu_double import ConfidentialGuest, Region
from ramblock import GuestMemory, Mapper, MappingPolicy, PageState, RamBlock, VirtioMem
from ramblock.dma import DmaTarget, SoftIommu
from ramblock.testing import RecordingTarget
from ramblock.units import PAGE_SIZE

__all__ = ["Twin", "TwinDevice"]

PLUGGABLE = "pluggable"
"""QEMU's name, in the double, for the block behind its virtio-mem device."""


class TwinDevice(NamedTuple):
    """A target of ours; *iommu* is the innermost of it."""

    iommu: SoftIommu
    target: RecordingTarget
    mapper: Mapper

    def pages(self) -> set[int]:
        """Return the numbers of the pages that it reaches."""
        return {
            page
            for mapping in self.iommu.mappings()
            for page in range(mapping.iova // PAGE_SIZE, (mapping.iova + mapping.size) // PAGE_SIZE)
        }


class Twin:
    """
    The same memory in ours.

    :param guest: Asked for its layout once.
    """

    def __init__(self, guest: ConfidentialGuest) -> None:
        self._stack = ExitStack()
        self.memory = GuestMemory()
        self.blocks: dict[str, RamBlock] = {}
        self.virtio_mem: VirtioMem | None = None
        self.regions = guest.memory_regions()
        for name, size in _block_sizes(self.regions).items():
            block = RamBlock.create(name, size, private="stand-in")
            self.blocks[name] = self._stack.enter_context(block)
            if name == PLUGGABLE:
                self.virtio_mem = VirtioMem(block, guest.options.virtio_mem_block)
        for region in self.regions:
            self.memory.map(
                self.blocks[region.name],
                region.start,
                offset=region.offset,
                size=region.end - region.start,
            )

    def attach(
        self,
        policy: MappingPolicy,
        around: Callable[[SoftIommu], DmaTarget] = lambda iommu: iommu,
    ) -> TwinDevice:
        """
        Attach a device.

        :param around: Puts something between the mapper and the IOMMU.
        """
        iommu = SoftIommu()
        target = RecordingTarget(around(iommu))
        return TwinDevice(iommu, target, self.memory.attach(target, policy=policy))

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Convert as the guest asked; raises as GuestMemory.convert does."""
        self.memory.convert(gpa, size, PageState.PRIVATE if private else PageState.SHARED)

    def reset(self) -> None:
        """Reset the guest."""
        assert self.memory.reset() == 0

    def close(self) -> None:
        """Close the blocks."""
        for section in self.memory.sections:
            self.memory.unmap(section)
        self._stack.close()

    def __enter__(self) -> "Twin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _block_sizes(regions: list[Region]) -> dict[str, int]:
    """A block is as large as the farthest part of it that the guest sees."""
    sizes: dict[str, int] = {}
    for region in regions:
        end = region.offset + region.end - region.start
        sizes[region.name] = max(sizes.get(region.name, 0), end)
    return sizes
