# SPDX-License-Identifier: Apache-2.0
"""
Where a guest's memory is.

::

    0            low, at most 2 GiB                                 (NUMA node 0)
    4 GiB - 4M   the BIOS: ordinary RAM, read-only for devices
    4 GiB        high0, high1: the rest, in two halves              (NUMA nodes 0 and 1)

As on QEMU's q35 machine (hw/i386/pc_q35.c); the high part lies on two nodes, so that a conversion
can span two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ramblock.units import GIB, MIB

__all__ = ["BlockPlace", "first_free", "plan_layout"]

_ALIGN = 2 * MIB


class BlockPlace(NamedTuple):
    """One block of the guest."""

    name: str
    gpa: int
    size: int
    confidential: bool

    @property
    def end(self) -> int:
        """First guest address behind it."""
        return self.gpa + self.size


def plan_layout(memory: int, bios: int) -> list[BlockPlace]:
    """
    Lay out a guest.

    :param memory: In bytes; a rest below a 2 MiB page goes to the last block.
    :param bios: In bytes; 0: none.
    :return: Blocks, ascending by guest address.
    """
    low = min(memory // 2 // _ALIGN * _ALIGN, 2 * GIB)
    high = memory - low
    node0 = high // 2 // _ALIGN * _ALIGN
    places = [BlockPlace("low", 0, low, confidential=True)]
    if bios:
        places.append(BlockPlace("bios", 4 * GIB - bios, bios, confidential=False))
    places.append(BlockPlace("high0", 4 * GIB, node0, confidential=True))
    places.append(BlockPlace("high1", 4 * GIB + node0, high - node0, confidential=True))
    return places


def first_free(places: Sequence[BlockPlace]) -> int:
    """Find an address behind all of *places*, a multiple of 2 MiB."""
    return -(-max(place.end for place in places) // _ALIGN) * _ALIGN
