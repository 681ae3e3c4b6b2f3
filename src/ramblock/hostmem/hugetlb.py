# SPDX-License-Identifier: Apache-2.0
"""The host's pools of huge pages, and what is wrong with them (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ramblock.hostmem.host_facts import NODES
from ramblock.units import GIB, KIB, format_size

__all__ = ["HugePagePool", "describe_shortage", "lacking_on"]

_POOLS = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePagePool:
    """One size of huge pages, on the whole host or on one node. Counts are in pages."""

    page_size: int
    """In bytes."""
    node: int | None
    """None: the whole host."""
    path: Path
    """Its directory."""
    total: int
    """Pages that there are, surplus ones included."""
    free: int
    """Of them, pages that nobody uses."""
    reserved: int
    """Of the free ones, those that are promised to somebody. Only the whole host keeps count."""

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
        return cls(
            page_size=page_size,
            node=node,
            path=path,
            total=_count(path, "nr_hugepages"),
            free=_count(path, "free_hugepages"),
            reserved=_count(path, "resv_hugepages"),
        )

    def advise(self, lacking: int) -> str:
        """Say how *lacking* pages more can be had."""
        advice = f"as root: echo {self.total + lacking} > {self.path}/nr_hugepages"
        if self.page_size >= GIB:
            advice += (
                ", or at boot, before memory is in pieces: hugepagesz=1G hugepages="
                f"{self.total + lacking}"
            )
        return advice

    def __str__(self) -> str:
        where = "" if self.node is None else f" on node {self.node}"
        promised = f", {self.reserved} of them promised" if self.reserved else ""
        return (
            f"the pool of {format_size(self.page_size)} pages{where} has {self.total},"
            f" {self.free} free{promised}"
        )


def _count(path: Path, name: str) -> int:
    try:
        return int((path / name).read_text())
    except FileNotFoundError:
        return 0  # the pool of a node has no resv_hugepages


def describe_shortage(size: int, page_size: int, nodes: frozenset[int] | None = None) -> str:
    """
    Say what a block of *size* bytes lacks, and what to do.

    :param nodes: Where the pages have to come from; None: anywhere.
    """
    places = [None] if nodes is None else sorted(nodes)
    try:
        pools = [
            pool for node in places if (pool := HugePagePool.read(page_size, node)) is not None
        ]
    except OSError as error:
        return f"the pool of {format_size(page_size)} pages cannot be read: {error.strerror}"
    if not pools:
        there = sorted(
            int(path.name.removeprefix("hugepages-").removesuffix("kB")) * KIB
            for path in _POOLS.glob("hugepages-*kB")
        )
        sizes = ", ".join(map(format_size, there)) or "none at all"
        return f"this host has no pool of {format_size(page_size)} pages (it has: {sizes})"
    needed = size // page_size
    lacking = max(needed - sum(pool.available for pool in pools), 0)
    state = "; ".join(map(str, pools))
    shortage = f"pages needed: {needed}, but {state}"
    return f"{shortage}; {pools[0].advise(lacking)}" if lacking else shortage


def lacking_on(nodes: frozenset[int], size: int, page_size: int) -> int:
    """
    Tell how many huge pages *nodes* lack for *size* bytes, if the pool cannot grow by itself.

    A mapping reserves pages of the host, not of a node: without this the first touch of a page that its node does not
    have would be a SIGBUS.
    """
    whole = HugePagePool.read(page_size)
    if whole is None:
        return 0
    may_grow = max(
        _count(whole.path, "nr_overcommit_hugepages") - _count(whole.path, "surplus_hugepages"), 0
    )
    pools = [HugePagePool.read(page_size, node) for node in nodes]
    free = sum(pool.free for pool in pools if pool is not None)
    return max(size // page_size - free - may_grow, 0)
