# SPDX-License-Identifier: Apache-2.0
"""A page of ours that a device can reach: the way to hand it data if it has no window."""

from __future__ import annotations

from ramblock.dma.target import DmaTarget, HostRange
from ramblock.hostmem.backing import AnonymousBacking
from ramblock.process import ClosedAtEnd
from ramblock.units import PAGE_SIZE

__all__ = ["BouncePage"]


class BouncePage(ClosedAtEnd):
    """
    One page, mapped for devices at an address outside the guest; also a context manager.

    It takes an entry of the target that no mapper knows of: with a budget to the last entry, leave
    one.

    :param target: Where to map it.
    :param iova: At which address, in bytes; whole pages, and nothing may be mapped there.
    :raises DmaError: The target refused; nothing is held.
    """

    def __init__(self, target: DmaTarget, iova: int) -> None:
        self.iova = iova
        self.size = PAGE_SIZE
        self._target = target
        self._backing = AnonymousBacking(PAGE_SIZE)
        try:
            target.map(iova, HostRange(None, 0, self._backing.address, PAGE_SIZE))
        except BaseException:
            self._backing.close()
            raise
        self._closed = False

    def read(self, size: int) -> bytes:
        """Read from its start."""
        return self._backing.read(0, size)

    def write(self, data: bytes) -> None:
        """Put *data* at its start."""
        self._backing.write(0, data)

    def close(self) -> None:
        """
        Unmap and free it; nothing happens the second time.

        :raises DmaError: The target did not let go, and may still reach the page, which is kept.
        """
        if not self._closed:
            self._target.unmap(self.iova, PAGE_SIZE)
            self._closed = True
            self._backing.close()
