# SPDX-License-Identifier: Apache-2.0
"""The host's own account of its memory in /proc and /sys: nodes, and available memory."""

from __future__ import annotations

from pathlib import Path

from ramblock.units import KIB

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
