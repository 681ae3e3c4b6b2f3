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
    processors: int = 2
    """For the command; the machine may have more."""
    kernel_arguments: tuple[str, ...] = ()

    # QEMU's emulation of SVM loses its way on the first processor while another one loads FPU
    # state: that takes back a flag of the *first* processor, without a lock, in the word that says
    # whether it is in a guest (cpu_clear_ignne() in target/i386/tcg/system/fpu_helper.c, by
    # cpu_set_fpus() for FLDENV, FXRSTOR, XRSTOR; as of 11.1). A VMRUN or #VMEXIT at the same
    # instant is undone by half, and the guest ends with a triple fault, or the VM hangs. So guests
    # are kept off the first processor. Where there is one alone, nobody can be in its way.
    @property
    def vcpus(self) -> int:
        """The machine's processors."""
        return self.processors + (self.processors > 1)

    @property
    def command_processors(self) -> str:
        """Where the command runs, as taskset has it."""
        return f"{self.vcpus - self.processors}-{self.vcpus - 1}"

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
                # Devices that fault in a loop are an interrupt storm of the IOMMU, whose thread
                # does not get to its work meanwhile. After 100,000 the kernel would switch the
                # interrupt off ("nobody cared"), and no later fault would be told.
                "noirqdebug",
            ),
        ),
        Variant(name="no-iommu", about="no IOMMU: what is refused, and how", iommu="none"),
        Variant(
            name="one-vcpu",
            about="VT-d, one processor: nothing may need a second one",
            iommu="intel",
            iommu_options=_INTEL,
            processors=1,
        ),
    )
}
