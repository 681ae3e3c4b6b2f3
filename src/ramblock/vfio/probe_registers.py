# SPDX-License-Identifier: Apache-2.0
"""
The device of ``ramblock probe``, as its driver sees it: a small engine that does DMA at once.

All registers are little-endian, in BAR 0. The engine runs within the write of the command: when the
write is answered, the transfer is over, and the result register has its outcome.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["BAR_SIZE", "DATA", "DATA_SIZE", "DEVICE", "MAGIC", "VENDOR", "Command", "Register"]

#: QEMU's edu has this vendor as well; the PCI-SIG has given it to nobody.
VENDOR = 0x1234
DEVICE = 0x7262
BAR_SIZE = 0x1000
#: Value of the magic register: "RBLK".
MAGIC = 0x4B4C4252
#: Start of the data window: data to write to memory, and data read from it.
DATA = 0x800
DATA_SIZE = 0x800


class Register(IntEnum):
    """Offsets in BAR 0; 32 bits wide, but for the address, which has 64."""

    MAGIC = 0x00
    VERSION = 0x04
    ADDRESS = 0x08
    LENGTH = 0x10
    COMMAND = 0x14
    RESULT = 0x18
    """
    0: done.

    Else an errno: EFAULT: not mapped, EINVAL: length or command cannot be, EIO: the memory did not
    answer.
    """


class Command(IntEnum):
    """Commands of the command register."""

    READ = 1
    """From memory into the data window."""
    WRITE = 2
    """From the data window to memory."""
