# SPDX-License-Identifier: Apache-2.0
"""
QEMU's confidential-guest path on an ordinary machine: a test peer of ramblock.

An unchanged QEMU runs its own conversion of pages, its own discard manager and its own VFIO
listeners. Two things stand in for the rest: a library preloaded into QEMU that presents KVM's
SEV-SNP and TDX interfaces on a KVM without them (``shim/``), and a firmware of 64 KiB that takes
orders over COM1 (``firmware.S``). ``docs/qemu-without-snp.rst`` says what this shows, and what it
does not.

    from lab.qemu_double import MIB, Double, GuestOptions

    with Double() as double:
        device = double.vfio_user_device()
        guest = double.guest(GuestOptions(memory=64 * MIB), device)
        guest.convert(2 * MIB, 64 << 10, private=False)
        print(device.reaches(2 * MIB), *guest.log.new())
"""

from lab.qemu_double.assigned import AssignedDevice, Container, GuestTestdev
from lab.qemu_double.double import Double
from lab.qemu_double.faults import Call
from lab.qemu_double.guest import ConfidentialGuest, GuestStopped, QemuEnded, Region, Way
from lab.qemu_double.log import QemuLog, TraceLine
from lab.qemu_double.options import GIB, KIB, MIB, GuestOptions, Technology
from lab.qemu_double.vfio_user import VfioUserDevice
from lab.qemu_double.virtio_mem import Answer, VirtioMemDriver

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Answer",
    "AssignedDevice",
    "Call",
    "ConfidentialGuest",
    "Container",
    "Double",
    "GuestOptions",
    "GuestStopped",
    "GuestTestdev",
    "QemuEnded",
    "QemuLog",
    "Region",
    "Technology",
    "TraceLine",
    "VfioUserDevice",
    "VirtioMemDriver",
    "Way",
]
