# SPDX-License-Identifier: Apache-2.0
"""The host's pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ramblock.hostmem.host_facts import NODES
from ramblock.units import GIB, KIB, format_size

_POOLS = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True, slots=True)
class HugePagePool:
    """One size of huge pages, on the whole host or on one node. Counts are in pages."""

    page_size: int  #: In bytes.
    node: int | None  #: None: the whole host.
    path: Path  #: Its directory.
    total: int  #: All pages, surplus ones included.
    free: int  #: Of them, pages that nobody uses.
    reserved: int  #: Of the free ones, those that are promised; only the whole host keeps count.

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return max(self.free - self.reserved, 0)

    @classmethod
    def read(cls, page_size: int, node: int | None = None) -> HugePagePool | None:
        """Look at the pool now; None: the host has none of that size."""
        base = _POOLS if node is None else NODES / f"node{node}/hugepages"
        path = base / f"hugepages-{page_size // KIB}kB"
        if not path.is_dir():
            return None
        counts = [_count(path, name) for name in ("nr", "free", "resv")]
        return cls(page_size, node, path, *counts)

    def advise(self, lacking: int) -> str:
        """Say how *lacking* pages more can be had."""
        wanted = self.total + lacking
        advice = f"as root: echo {wanted} > {self.path}/nr_hugepages"
        if self.page_size >= GIB:
            at_boot = f"hugepagesz=1G hugepages={wanted}"
            advice += f", or at boot, before memory is in pieces: {at_boot}"
        return advice

    def __str__(self) -> str:
        where = "" if self.node is None else f" on node {self.node}"
        promised = f", {self.reserved} of them promised" if self.reserved else ""
        pool = f"the pool of {format_size(self.page_size)} pages{where}"
        return f"{pool} has {self.total}, {self.free} free{promised}"


def _count(path: Path, name: str) -> int:
    try:
        return int((path / f"{name}_hugepages").read_text())
    except FileNotFoundError:
        return 0  # the pool of a node has no resv_hugepages


def describe_shortage(size: int, page_size: int, nodes: frozenset[int] | None = None) -> str:
    """Say how far the pools of *nodes* (None: any) fall short of *size* bytes, and the cure."""
    places = [None] if nodes is None else sorted(nodes)
    wanted = f"pool of {format_size(page_size)} pages"
    try:
        pools = [pool for node in places if (pool := HugePagePool.read(page_size, node))]
    except OSError as error:
        return f"the {wanted} cannot be read: {error.strerror}"
    if not pools:
        names = [path.name for path in _POOLS.glob("hugepages-*kB")]
        there = sorted(int(name.removeprefix("hugepages-")[:-2]) * KIB for name in names)
        sizes = ", ".join(map(format_size, there)) or "none at all"
        return f"this host has no {wanted} (it has: {sizes})"
    needed = size // page_size
    lacking = max(needed - sum(pool.available for pool in pools), 0)
    shortage = f"pages needed: {needed}, but {'; '.join(map(str, pools))}"
    return f"{shortage}; {pools[0].advise(lacking)}" if lacking else shortage


def lacking_on(nodes: frozenset[int], size: int, page_size: int) -> int:
    """Tell how many huge pages *nodes* lack for *size* bytes, even if the pool grows by itself."""
    # A mapping reserves pages of the host, not of a node: without this the first touch of a page
    # that its node does not have would be a SIGBUS.
    whole = HugePagePool.read(page_size)
    if whole is None:
        return 0
    may_grow = max(_count(whole.path, "nr_overcommit") - _count(whole.path, "surplus"), 0)
    pools = [HugePagePool.read(page_size, node) for node in nodes]
    free = sum(pool.free for pool in pools if pool is not None)
    return max(size // page_size - free - may_grow, 0)
