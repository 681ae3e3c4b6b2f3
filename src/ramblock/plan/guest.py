# SPDX-License-Identifier: Apache-2.0
"""The guest that is planned for: its memory, its devices, its system and load."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ramblock.errors import UsageError
from ramblock.plan.span import Span
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE, format_size

__all__ = ["LEAST_MEMORY", "Guest", "OsProfile", "Pluggable", "Profile", "Technology"]

#: Below it the smallest SWIOTLB pool does not fit.
LEAST_MEMORY = 256 * MIB
#: Guest physical addresses have at most 52 bits.
_MOST_MEMORY = 1 << 52
# QEMU's q35 machine places all memory below 4 GiB where it fits there, else 2 GiB
# (hw/i386/pc_q35.c).
_FITS_LOW = 0xB0000000
_LOW_MEMORY = 2 * GIB
_SMALLEST_BLOCK = 4 * KIB
_MOST_VCPUS = 4096  # KVM_MAX_VCPUS, arch/x86/include/asm/kvm_host.h
_MOST_NODES = 128  # MAX_NODES, include/system/numa.h of QEMU
_MOST_CONVERSIONS = 10**12


class Technology(StrEnum):
    """Whose confidential guest it is; it decides in which pieces a conversion reaches the VMM."""

    TDX = "tdx"
    SNP = "snp"

    @property
    def slice_size(self) -> int:
        """
        Most bytes of a guest's request that one conversion has.

        TDX: KVM hands a MapGPA over in pieces of 2 MiB (TDX_MAP_GPA_MAX_LEN,
        arch/x86/kvm/vmx/tdx.c). SNP: a guest of Linux asks for 64 entries of at most 2 MiB at once
        (VMGEXIT_PSC_MAX_ENTRY, arch/x86/include/asm/sev.h), and KVM joins those that are
        neighbours.
        """
        return 2 * MIB if self is Technology.TDX else 128 * MIB


class Profile(StrEnum):
    """The kind of an assigned device."""

    NIC = "nic"
    NVME = "nvme"
    GPU_CC = "gpu-cc"
    NONE = "none"


class OsProfile(StrEnum):
    """
    Ways of the guest's system with its memory.

    The first two exclude each other, and so do the others.
    """

    SWIOTLB = "linux-swiotlb"
    SWIOTLB_DYNAMIC = "linux-swiotlb-dynamic"
    LAZY_ACCEPT = "lazy-accept"
    EAGER_ACCEPT = "eager-accept"


class Pluggable(msgspec.Struct, frozen=True):
    """A virtio-mem device."""

    size: int
    """Most that can be plugged, in bytes."""
    block_size: int = 2 * MIB


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A confidential guest. Sizes are in bytes.

    Everything else that is not said here is the default of Linux 7.3 and of QEMU's q35 machine.
    """

    memory: int
    vcpus: int = 4
    numa_nodes: int = 1
    devices: tuple[Profile, ...] = ()
    os: tuple[OsProfile, ...] = (OsProfile.SWIOTLB,)
    technology: Technology = Technology.TDX
    virtio_mem: Pluggable | None = None
    backing_page: int = PAGE_SIZE
    """Page size of the host's shared memory: a huge page is held while any of it is shared."""
    conversions: int = 10_000
    """After boot, how many conversions are looked at: they fragment."""
    rate: Span | None = None
    """Conversions per second after boot; None: the devices' suggestion."""

    def check(self) -> None:
        """
        Check the values against each other.

        :raises UsageError: One makes no sense; the text names it and the expected values.
        """
        if not LEAST_MEMORY <= self.memory <= _MOST_MEMORY or self.memory % PAGE_SIZE:
            raise UsageError(
                f"memory of {format_size(self.memory)} ({self.memory:#x})",
                value=self.memory,
                expected=f"whole pages, {format_size(LEAST_MEMORY)} to {format_size(_MOST_MEMORY)}",
            )
        for name, number, least, most in (
            ("vCPUs", self.vcpus, 1, _MOST_VCPUS),
            ("NUMA nodes", self.numa_nodes, 1, _MOST_NODES),
            ("conversions", self.conversions, 0, _MOST_CONVERSIONS),
        ):
            if not least <= number <= most:
                raise UsageError(
                    f"{number} {name}", value=number, expected=f"{least:,} to {most:,}"
                )
        if len(self.os) != len({_question(profile) for profile in self.os}):
            raise UsageError(
                f"profiles {', '.join(self.os)} of the guest's system exclude each other",
                value=self.os,
                expected="one of linux-swiotlb and linux-swiotlb-dynamic,"
                " one of lazy-accept and eager-accept",
            )
        if self.backing_page not in (PAGE_SIZE, 2 * MIB, GIB):
            raise UsageError(
                f"pages of {format_size(self.backing_page)}",
                value=self.backing_page,
                expected="4K, 2M or 1G",
            )
        self._check_virtio_mem()

    def _check_virtio_mem(self) -> None:
        device = self.virtio_mem
        if device is None:
            return
        block = device.block_size
        if block < _SMALLEST_BLOCK or block & (block - 1):
            raise UsageError(
                f"virtio-mem with blocks of {block:#x}",
                value=block,
                expected="a power of two, at least 4K",
            )
        if device.size <= 0 or device.size % block or self.most_memory > _MOST_MEMORY:
            raise UsageError(
                f"virtio-mem of {device.size:#x} with blocks of {block:#x}",
                value=device.size,
                expected=f"whole blocks, and at most {format_size(_MOST_MEMORY)} with the memory",
            )

    @property
    def dynamic_swiotlb(self) -> bool:
        """Whether the bounce buffers grow while the guest runs (CONFIG_SWIOTLB_DYNAMIC)."""
        return OsProfile.SWIOTLB_DYNAMIC in self.os

    @property
    def eager_accept(self) -> bool:
        """Whether all memory is accepted at boot."""
        return OsProfile.EAGER_ACCEPT in self.os

    @property
    def most_memory(self) -> int:
        """Bytes that can be there at all, virtio-mem's among them."""
        return self.memory + (self.virtio_mem.size if self.virtio_mem else 0)

    def sections(self) -> list[int]:
        """
        Sizes of the parts of the guest's addresses that have RAM, in bytes, ascending.

        Each node has a backend of its own, one after the other; the hole below 4 GiB divides one.
        """
        low = self.memory if self.memory < _FITS_LOW else _LOW_MEMORY
        share = self.memory // self.numa_nodes // PAGE_SIZE * PAGE_SIZE
        nodes = {share * number for number in range(1, self.numa_nodes)}
        ends = sorted({low, self.memory, *nodes} - {0})
        parts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if self.virtio_mem is not None:
            parts.append(self.virtio_mem.size)
        return parts


def _question(profile: OsProfile) -> str:
    """Name the options of a profile."""
    return "swiotlb" if "swiotlb" in profile else "accept"
