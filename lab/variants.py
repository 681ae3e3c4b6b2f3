# SPDX-License-Identifier: Apache-2.0
"""
The machines that the lab can be, as data.

What a test runs against inside one of them are the test's own parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VARIANTS", "Variant"]

# Interrupt remapping needs the split irqchip; q35 is the machine that has an emulated IOMMU.
_MACHINE = ("-machine", "q35,kernel-irqchip=split", "-cpu", "max")
# edu: DMA in both directions, on a timer. iommu-testdev: DMA at once, on a register access. The
# mask is edu's own: IOVAs above 256 MiB, its default, would be cut off.
_DEVICES = ("-device", "edu,dma_mask=0xffffffffffff", "-device", "iommu-testdev")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One machine."""

    name: str
    about: str
    """What it is for, in a few words."""
    iommu: str
    """``intel``, ``amd`` or ``none``: the guest gets it as RAMBLOCK_LAB_IOMMU."""
    iommu_options: tuple[str, ...] = ()
    vcpus: int = 2
    kernel_arguments: tuple[str, ...] = ()

    @property
    def qemu_options(self) -> tuple[str, ...]:
        """The machine's options for QEMU, besides those for processors, memory and console."""
        return (*_MACHINE, *self.iommu_options, *_DEVICES)


_INTEL = ("-device", "intel-iommu,intremap=on,caching-mode=off")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="intel-iommu",
            about="VT-d, two processors: where everything is tested",
            iommu="intel",
            iommu_options=_INTEL,
        ),
        Variant(
            name="amd-iommu",
            about="AMD-Vi, two processors",
            iommu="amd",
            iommu_options=("-device", "amd-iommu,dma-remap=on"),
            # The emulated AMD-Vi remaps no interrupts for VFIO; without this, attaching a device is
            # EPERM.
            kernel_arguments=(
                "iommufd.allow_unsafe_interrupts=1",
                "vfio_iommu_type1.allow_unsafe_interrupts=1",
            ),
        ),
        Variant(name="no-iommu", about="no IOMMU: what is refused, and how", iommu="none"),
        Variant(
            name="one-vcpu",
            about="VT-d, one processor: nothing may need a second one",
            iommu="intel",
            iommu_options=_INTEL,
            vcpus=1,
        ),
    )
}
