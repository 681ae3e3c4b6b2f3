# SPDX-License-Identifier: Apache-2.0
"""The description of host memory for a block (QEMU: HostMemoryBackend, backends/hostmem.c)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TypeAlias

from ramblock.errors import UsageError
from ramblock.hostmem.backing import AnonymousBacking, MemfdBacking, SharedBacking
from ramblock.hostmem.host_calls import populate
from ramblock.hostmem.host_facts import (
    available_bytes,
    available_on,
    describe_shortage,
    lacking_on,
    nodes_with_memory,
)
from ramblock.hostmem.numa import NumaBinding, NumaPolicy, list_nodes
from ramblock.units import GIB, MIB, PAGE_SIZE, check_range, format_size

# The last offset into a file that there is: loff_t is signed.
_SIZE_LIMIT = (1 << 63) - 1
#: Called after each piece, with the bytes so far and the bytes in total.
Progress: TypeAlias = Callable[[int, int], object]

# Ctrl-C waits for one piece: tens of milliseconds for this much, and a huge page at least.
_PIECE = 64 * MIB


class BackendKind(Enum):
    """The origin of host memory."""

    MEMFD = "memfd"  #: Shared memory behind a descriptor, which other processes can map.
    ANONYMOUS = "anonymous"  #: Private anonymous memory, without a descriptor.
    HUGETLB = "hugetlb"  #: A memfd of huge pages from the host's pool.


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemoryBackend:
    """
    The memory to take from the host.

    :raises UsageError: Size or page size do not fit the kind, or the binding is none.
    """

    size: int  #: In bytes; a multiple of the page size.
    kind: BackendKind = BackendKind.MEMFD
    page_size: int = PAGE_SIZE  #: In bytes; for hugetlb 2 MiB or 1 GiB.
    #: Take all of it at once, not page by page at the first touch. A later free is free all the
    #: same.
    prealloc: bool = False
    #: The nodes of its pages, the later ones too; None: the process's own policy.
    numa: NumaBinding | None = None

    def __post_init__(self) -> None:
        what = f"{self.kind.value} memory"
        # hugetlb: the page sizes of x86-64 (arch/x86/mm/hugetlbpage.c).
        allowed = (2 * MIB, GIB) if self.kind is BackendKind.HUGETLB else (PAGE_SIZE,)
        if self.page_size not in allowed:
            expected = " or ".join(map(hex, allowed))
            text = f"{what} with pages of {self.page_size:#x} bytes, expected {expected}"
            raise UsageError(text, value=self.page_size, expected=expected)
        check_range(0, self.size, limit=_SIZE_LIMIT, align=self.page_size, what=what)
        if self.numa is not None and not isinstance(self.numa, NumaBinding):
            text = f"{self.numa!r} is not a NUMA binding"
            raise UsageError(text, value=self.numa, expected="a NumaBinding")

    def allocate(self, name: str, *, progress: Progress | None = None) -> SharedBacking:
        """
        Take the memory. After an error nothing is held.

        :param progress: With *prealloc*: called piece by piece, with the bytes so far and in total.
        :raises UsageError: This host has no memory on one of the nodes.
        :raises OSError: The host does not have it; the text says how much it has, and the cure.
        :raises BaseException: From *progress*, or Ctrl-C.
        """
        # The nodes that all of it has to come from; None: any will do.
        nodes: frozenset[int] | None = None
        if self.numa is not None:
            self.numa.check()
            bound = self.numa.policy is NumaPolicy.BIND
            nodes = self.numa.nodes if bound and self.numa.nodes != nodes_with_memory() else None
        what = f"{self.kind.value} memory {name!r} of {format_size(self.size)}"
        # A shortage would end in the OOM killer or in a SIGBUS, which nobody can handle. This looks
        # at the host's memory, not at the limit of a control group, which may be less.
        hint: Callable[[], str] = str
        if self.kind is BackendKind.HUGETLB:
            hint = partial(describe_shortage, self.size, self.page_size, nodes)
            if nodes is not None and lacking_on(nodes, self.size, self.page_size):
                raise OSError(errno.ENOMEM, f"{what}: {hint()}")
        elif self.prealloc:
            available = available_bytes() if nodes is None else available_on(nodes)
            if available is not None and available < self.size:
                where = "this host" if nodes is None else f"NUMA {list_nodes(nodes)}"
                text = f"{what}: {where} has {format_size(available)} available at most"
                raise OSError(errno.ENOMEM, text)
        backing: SharedBacking
        if self.kind is BackendKind.ANONYMOUS:
            backing = AnonymousBacking(self.size)
        else:
            backing = MemfdBacking(name, self.size, self.page_size)
        try:
            if self.numa is not None:
                self.numa.apply(backing.address, self.size)
            if self.prealloc:
                preallocate(backing, what, progress, hint=hint)
        except BaseException:
            backing.close()
            raise
        return backing


def preallocate(
    backing: SharedBacking,
    what: str,
    progress: Progress | None = None,
    *,
    hint: Callable[[], str] = str,
) -> None:
    """
    Put a page everywhere in *backing*; the pages so far stay if something is raised.

    :param hint: Adds to the message the cause, and the cure.
    :raises OSError: ENOMEM, and how much could be had.
    """
    done, total = 0, backing.size
    while done < total:
        size = min(max(_PIECE, backing.page_size), total - done)
        try:
            populate(backing.address + done, size)
        except OSError as error:
            there = backing.allocated_bytes()
            had = format_size(done if there is None else there)
            # EFAULT is a page that cannot be had too: without this call it would be a SIGBUS later.
            number = errno.ENOMEM if error.errno == errno.EFAULT else error.errno
            cause = os.strerror(error.errno or 0)
            text = f"{what}: only {had} of {format_size(total)} could be had: {cause}"
            raise OSError(number, "; ".join(filter(None, (text, hint())))) from error
        done += size
        if progress is not None:
            progress(done, total)
