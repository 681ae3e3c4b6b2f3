# SPDX-License-Identifier: Apache-2.0
"""A description of host memory from which a block is made (QEMU: HostMemoryBackend, backends/hostmem.c)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from ramblock.errors import UsageError
from ramblock.hostmem.backing import AnonymousBacking, MemfdBacking, SharedBacking
from ramblock.hostmem.host_facts import available_bytes, available_on, nodes_with_memory
from ramblock.hostmem.hugetlb import describe_shortage, lacking_on
from ramblock.hostmem.numa import NumaBinding, NumaPolicy, list_nodes
from ramblock.hostmem.prealloc import Progress, preallocate
from ramblock.units import GIB, MIB, PAGE_SIZE, check_range, format_size

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

    :raises UsageError: Size or page size do not fit the kind, or the binding is none.
    """

    size: int
    """In bytes; a multiple of the page size."""
    kind: BackendKind = BackendKind.MEMFD
    page_size: int = PAGE_SIZE
    """In bytes; for hugetlb 2 MiB or 1 GiB."""
    prealloc: bool = False
    """Take all of it at once, and not page by page when it is touched. What is freed later is free all the same."""
    numa: NumaBinding | None = None
    """Which nodes the pages come from, those that are taken later too; None: the process's own policy."""

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
        if self.numa is not None and not isinstance(self.numa, NumaBinding):
            raise UsageError(
                f"{self.numa!r} is not a NUMA binding", value=self.numa, expected="a NumaBinding"
            )

    def allocate(self, name: str, *, progress: Progress | None = None) -> SharedBacking:
        """
        Take the memory.

        :param progress: With *prealloc*: called with the bytes that are there and the bytes in total, piece by piece.
        :raises UsageError: This host has no memory on one of the nodes; nothing is held.
        :raises OSError: The host does not have it; the text says what was asked for, what there is, and what can be done.
            Nothing is held.
        :raises BaseException: What *progress* raised, or Ctrl-C. Nothing is held.
        """
        if self.numa is not None:
            self.numa.check()
        what = f"{self.kind.value} memory {name!r} of {format_size(self.size)}"
        self._check_available(what)
        backing: SharedBacking
        if self.kind is BackendKind.ANONYMOUS:
            backing = AnonymousBacking(self.size)
        else:
            backing = MemfdBacking(name, self.size, self.page_size)
        try:
            if self.numa is not None:
                self.numa.apply(backing.address, self.size)
            if self.prealloc:
                preallocate(backing, what, progress, hint=self._hint)
        except BaseException:
            backing.close()
            raise
        return backing

    @property
    def _only_on(self) -> frozenset[int] | None:
        """The nodes that all of it has to come from; None: any will do."""
        if self.numa is None or self.numa.policy is not NumaPolicy.BIND:
            return None
        return None if self.numa.nodes == nodes_with_memory() else self.numa.nodes

    def _check_available(self, what: str) -> None:
        """
        Refuse what could only end in the OOM killer or in a SIGBUS: neither is an error that anybody can handle.

        It looks at the host's memory, not at the limit of a control group, which may be less.
        """
        nodes = self._only_on
        if self.kind is BackendKind.HUGETLB:
            if nodes is not None and lacking_on(nodes, self.size, self.page_size):
                raise OSError(errno.ENOMEM, f"{what}: {self._hint()}")
            return
        if not self.prealloc:
            return
        available = available_bytes() if nodes is None else available_on(nodes)
        if available is not None and available < self.size:
            where = "this host" if nodes is None else f"NUMA {list_nodes(nodes)}"
            raise OSError(
                errno.ENOMEM, f"{what}: {where} has {format_size(available)} available at most"
            )

    def _hint(self) -> str:
        if self.kind is not BackendKind.HUGETLB:
            return ""
        return describe_shortage(self.size, self.page_size, self._only_on)
