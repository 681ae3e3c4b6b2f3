# SPDX-License-Identifier: Apache-2.0
"""What the host says of its memory in /proc and /sys: nodes, what is available, pools of huge pages."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "NODES",
    "allowed_nodes",
    "available_bytes",
    "available_on",
    "nodes_with_memory",
    "parse_list",
]

#: Documentation/ABI/stable/sysfs-devices-node
NODES = Path("/sys/devices/system/node")
_PROC = Path("/proc")


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
    """Tell which nodes this process may take memory from (its cpuset); None where the kernel does not say."""
    for line in _lines(_PROC / "self/status"):
        name, _, value = line.partition(":")
        if name == "Mems_allowed_list":
            return parse_list(value)
    return None


def available_bytes() -> int | None:
    """
    Tell how much memory can be had at most without taking it from anybody's program; None where the kernel does not say.

    Free, cached and reclaimable memory as the kernel estimates it, and free swap (Documentation/filesystems/proc.rst).
    """
    facts = _sizes(_PROC / "meminfo")
    if "MemAvailable" not in facts:
        return None
    return facts["MemAvailable"] + facts.get("SwapFree", 0)


def available_on(nodes: frozenset[int]) -> int | None:
    """Tell the same of some nodes. The kernel has no estimate for one node, so this is the most that it could be."""
    total = _sizes(_PROC / "meminfo").get("SwapFree", 0)
    for node in nodes:
        facts = _sizes(NODES / f"node{node}/meminfo")
        if "MemFree" not in facts:
            return None
        reclaimable = ("Active(file)", "Inactive(file)", "SReclaimable")
        total += facts["MemFree"] + sum(facts.get(name, 0) for name in reclaimable)
    return total


def _sizes(path: Path) -> dict[str, int]:
    """Read a meminfo file, in bytes; a node's has ``Node 0`` in front of each name."""
    facts = {}
    for line in _lines(path):
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB":
            facts[name.split()[-1]] = int(number) * 1024
    return facts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
