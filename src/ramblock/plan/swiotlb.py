# SPDX-License-Identifier: Apache-2.0
"""
The size of a confidential Linux guest's bounce buffers on x86: its largest piece of shared memory.

mem_encrypt_setup_arch() takes 6 % of RAM, at least 64 MiB and at most 1 GiB
(arch/x86/mm/mem_encrypt.c). Since Linux 6.0 the pool is divided into areas, one for each possible
processor, and rounded up to a power of two for it (swiotlb_adjust_nareas() in kernel/dma/swiotlb.c:
"SWIOTLB bounce buffer size roundup to"). So the 6 % are the least.
"""

from __future__ import annotations

from ramblock.plan.span import Span
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE

__all__ = ["SLAB", "least_of_areas", "swiotlb_bytes"]

_LEAST, _MOST = 64 * MIB, GIB
#: The unit of ``swiotlb=`` on the kernel's command line (IO_TLB_SIZE).
SLAB = 2 * KIB
_SEGMENT = 128 * SLAB


def swiotlb_bytes(memory: int, vcpus: int) -> Span:
    """
    Size the pool of a guest with *memory* bytes.

    At least 6 %, in whole pages; the expected size is that of a kernel since 6.0.
    """
    exact = min(max(memory * 6 // 100, _LEAST), _MOST)
    segments = -(-exact // _SEGMENT)
    areas = _power_of_two(vcpus)
    rounded = _power_of_two(max(segments, areas)) * _SEGMENT
    # The kernel halves it until there is room for it.
    rounded = min(rounded, 1 << ((memory // 2).bit_length() - 1))
    return Span(exact // PAGE_SIZE * PAGE_SIZE, rounded, rounded)


def least_of_areas(vcpus: int) -> int:
    """Tell how many bytes the areas of so many processors need."""
    return _power_of_two(vcpus) * _SEGMENT


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
