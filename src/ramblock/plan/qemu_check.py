# SPDX-License-Identifier: Apache-2.0
"""
QEMU's own check, as it does it (hw/vfio/listener.c, vfio_ram_discard_register_listener()).

For every section that has a discard manager QEMU counts its granules, whether they will ever be
mapped or not; to that it adds one mapping for each memory slot that KVM could still have. If that
is more than the container may map it refuses: a warning until 10.1, an error since. The message
begins "possibly running out of DMA mappings".

All memory of a confidential guest has a discard manager, its firmware included. pc.rom, 128 KiB at
0xc0000, adds nothing: it is placed after the check, and covers as much RAM.
tests/qemu/test_limits.py holds the sum against QEMU 11.1.3: it starts the largest guest that passes
here, and refuses the next one.
"""

from __future__ import annotations

import msgspec

from ramblock.plan.guest import Guest
from ramblock.units import MIB, PAGE_SIZE

__all__ = ["FIRMWARE_SIZE", "QemuCheck", "check_as_qemu"]

FIRMWARE_SIZE = 4 * MIB
"""Bytes of what ``-bios`` takes: Debian's OVMF.fd (2025.02-8+deb13u1)."""


class QemuCheck(msgspec.Struct, frozen=True):
    """What QEMU adds up."""

    granules: int
    """Pages of all sections with a discard manager, the firmware's among them."""
    memslots: int
    listeners: int
    """Sections with a discard manager."""
    needed: int
    """``granules + memslots - listeners``."""
    limit: int
    passes: bool


def check_as_qemu(
    guest: Guest, limit: int, memslots: int, *, firmware: int = FIRMWARE_SIZE
) -> QemuCheck:
    """
    Do the check for a guest on a container that may map *limit* times.

    Page attributes change by 4 KiB, so blocks of virtio-mem are counted in pages too.

    :param firmware: Bytes of the guest's firmware.
    """
    sections = [*guest.sections(), firmware]
    granules = sum(size // PAGE_SIZE for size in sections)
    needed = granules + memslots - len(sections)
    # QEMU adds up in 32 bits: from 16 TiB on the sum wraps around, and a guest may pass that should
    # not.
    passes = needed % (1 << 32) <= limit
    return QemuCheck(granules, memslots, len(sections), needed, limit, passes)
