# SPDX-License-Identifier: Apache-2.0
"""A description of host memory from which a block is made (QEMU: HostMemoryBackend, backends/hostmem.c)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ramblock.errors import UsageError
from ramblock.memory.backing import AnonymousBacking, MemfdBacking, SharedBacking
from ramblock.units import GIB, MIB, PAGE_SIZE, check_range

__all__ = ["BackendKind", "HostMemoryBackend"]

#: hugetlb page sizes of x86-64 (arch/x86/mm/hugetlbpage.c).
HUGE_PAGE_SIZES = (2 * MIB, GIB)

# The last offset into a file that there is: loff_t is signed.
_SIZE_LIMIT = (1 << 63) - 1


class BackendKind(Enum):
    """Where host memory comes from."""

    MEMFD = "memfd"
    """Shared memory behind a descriptor, which device servers in other processes can map."""
    ANONYMOUS = "anonymous"
    """Private anonymous memory, without a descriptor."""
    HUGETLB = "hugetlb"
    """A memfd of huge pages from the host's pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemoryBackend:
    """
    What memory to take from the host.

    :raises UsageError: Size or page size do not fit the kind.
    """

    size: int
    """In bytes; a multiple of the page size."""
    kind: BackendKind = BackendKind.MEMFD
    page_size: int = PAGE_SIZE
    """In bytes; for hugetlb 2 MiB or 1 GiB."""

    def __post_init__(self) -> None:
        allowed = HUGE_PAGE_SIZES if self.kind is BackendKind.HUGETLB else (PAGE_SIZE,)
        if self.page_size not in allowed:
            expected = " or ".join(f"{size:#x}" for size in allowed)
            raise UsageError(
                f"{self.kind.value} memory with pages of {self.page_size:#x} bytes, expected {expected}",
                value=self.page_size,
                expected=expected,
            )
        check_range(
            0,
            self.size,
            limit=_SIZE_LIMIT,
            align=self.page_size,
            what=f"{self.kind.value} memory",
        )

    def allocate(self, name: str) -> SharedBacking:
        """
        Take the memory.

        :raises OSError: The host does not have it; the text says what was asked for. Nothing is held.
        """
        if self.kind is BackendKind.ANONYMOUS:
            return AnonymousBacking(self.size)
        return MemfdBacking(name, self.size, self.page_size)
