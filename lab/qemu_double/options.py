# SPDX-License-Identifier: Apache-2.0
"""The machine that QEMU is asked to be, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = ["GIB", "KIB", "MIB", "GuestOptions", "Technology"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Technology(Enum):
    """What QEMU takes the host for; the value is the object that makes a guest confidential."""

    # The position of the bit "encrypted" is held against CPUID 0x8000001f, which has none here: 0.
    SNP = "sev-snp-guest,id=cgs,cbitpos=0,reduced-phys-bits=1,sev-device=/dev/null"
    TDX = "tdx-guest,id=cgs"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """
    A confidential guest.

    :raises ValueError: A size is no multiple of a page, the NUMA nodes' sizes are not the
        memory's, or a TDX guest is to be reset.
    """

    technology: Technology = Technology.SNP
    memory: int = 64 * MIB
    """Bytes of RAM at address 0."""
    nodes: tuple[int, ...] = ()
    """Bytes of each NUMA node, with a backend for each; empty: one backend for all."""
    processors: int = 1
    virtio_mem: int = 0
    """Bytes that can be plugged; 0: there is no virtio-mem device."""
    virtio_mem_block: int = 2 * MIB
    root_ports: int = 0
    """Slots for devices that come later."""
    resets: bool = False
    """Whether a reset starts the guest anew; otherwise it ends QEMU. Not with TDX."""
    tracing: tuple[str, ...] = ()
    """QEMU's options for its trace, instead of the double's own: then ``log`` stays empty."""
    more: tuple[str, ...] = ()
    """Other arguments of QEMU's."""

    def __post_init__(self) -> None:
        for size in (self.memory, *self.nodes, self.virtio_mem):
            if size < 0 or size % (4 * KIB):
                raise ValueError(f"{size:#x} bytes of memory: expected a multiple of 4 KiB")
        if self.resets and self.technology is Technology.TDX:
            # QEMU 11.1.3 says "unable to rebuild guest" before it has asked KVM for anything.
            raise ValueError("a TDX guest of the double cannot be reset")
        if self.nodes and sum(self.nodes) != self.memory:
            raise ValueError(
                f"the nodes have {sum(self.nodes):#x} bytes, and the memory {self.memory:#x}"
            )

    def arguments(self, firmware: Path) -> list[str]:
        """Return QEMU's arguments, without those of the devices."""
        return [
            *(
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-smp",
                str(self.processors),
                "-bios",
                str(firmware),
            ),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-object", self.technology.value),
            *self._memory(),
            *([] if self.resets else ["-no-reboot"]),
            *(
                word
                for number in range(self.root_ports)
                for word in ("-device", f"pcie-root-port,id=slot{number},chassis={number + 1}")
            ),
            *self.more,
        ]

    def _memory(self) -> Iterator[str]:
        machine = "q35,confidential-guest-support=cgs,smm=off,kernel-irqchip=split"
        # virtio-mem's region lies behind the RAM; QEMU wants to know how much there can ever be, in
        # whole GiB here.
        pluggable = f",maxmem={-(-(self.memory + self.virtio_mem) // GIB) + 1}G,slots=2"
        yield from ("-m", f"{self.memory >> 10}K" + (pluggable if self.virtio_mem else ""))
        if self.nodes:
            for number, size in enumerate(self.nodes):
                yield from ("-object", _backend(f"node{number}", size))
                yield from ("-numa", f"node,memdev=node{number}")
            yield from ("-machine", machine)
        else:
            yield from ("-object", _backend("ram", self.memory))
            yield from ("-machine", f"{machine},memory-backend=ram")
        if self.virtio_mem:
            yield from ("-object", _backend("pluggable", self.virtio_mem))
            yield from (
                "-device",
                f"virtio-mem-pci,id=vmem,memdev=pluggable,block-size={self.virtio_mem_block}",
            )


def _backend(name: str, size: int) -> str:
    # Shared, because a vfio-user server maps it; a private one has another way to free its pages.
    return f"memory-backend-memfd,id={name},size={size},share=on"
