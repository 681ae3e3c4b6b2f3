# SPDX-License-Identifier: Apache-2.0
"""
The host's own account of its memory in /proc and /sys: nodes, available memory, huge pages.

Pools of huge pages: Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ramblock.units import GIB, KIB, format_size

#: Documentation/ABI/stable/sysfs-devices-node
NODES = Path("/sys/devices/system/node")
_PROC = Path("/proc")
_POOLS = Path("/sys/kernel/mm/hugepages")


def parse_list(text: str) -> frozenset[int]:
    """Read numbers as the kernel lists them: ``0-3,8``."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def nodes_with_memory() -> frozenset[int] | None:
    """Tell which NUMA nodes have memory; None on a kernel that knows no nodes."""
    try:
        return parse_list((NODES / "has_memory").read_text())
    except OSError:
        return None


def allowed_nodes() -> frozenset[int] | None:
    """Tell from which nodes this process may take memory (its cpuset); None: not told."""
    allowed = _read(_PROC / "self/status").get("Mems_allowed_list")
    return None if allowed is None else parse_list(allowed)


def available_bytes() -> int | None:
    """Tell the most that can be had without harm to others, swap included; None: not told."""
    facts = _read(_PROC / "meminfo")
    # MemAvailable is the kernel's own estimate (Documentation/filesystems/proc.rst).
    return _sum(facts, "MemAvailable", "SwapFree") if "MemAvailable" in facts else None


def available_on(nodes: frozenset[int]) -> int | None:
    """Tell the same of some nodes; None: not told."""
    total = _sum(_read(_PROC / "meminfo"), "SwapFree")
    for node in nodes:
        facts = _read(NODES / f"node{node}/meminfo")
        if "MemFree" not in facts:
            return None
        # The kernel estimates nothing for one node: this is the most that it could be.
        total += _sum(facts, "MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
    return total


def _sum(facts: dict[str, str], *names: str) -> int:
    # In bytes; the files write "123 kB".
    return sum(int(facts[name].split()[0]) * KIB for name in names if name in facts)


def _read(path: Path) -> dict[str, str]:
    # Lines of "name: value"; a node's have "Node 0" in front of the name.
    try:
        lines = [line.partition(":") for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name.split()[-1]: value.strip() for name, _, value in lines if value}


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
