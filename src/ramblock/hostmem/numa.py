# SPDX-License-Identifier: Apache-2.0
"""
Which NUMA nodes the pages of a block come from (mbind(2)).

The policy outlives the pages: what is freed in a conversion and touched again comes from the same nodes. On a memfd it
belongs to the file, whoever touches it (mm/shmem.c, shmem_set_policy()). On anonymous memory and on huge pages it belongs
to this process's mapping (hugetlb_vm_ops, mm/hugetlb.c, stores none in the file): a huge page that another process or
IOMMU_IOAS_MAP_FILE touches first comes from wherever that one's policy says.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from ramblock.errors import UsageError
from ramblock.hostmem.host_calls import set_memory_policy
from ramblock.hostmem.host_facts import allowed_nodes, nodes_with_memory
from ramblock.uapi.mempolicy import MempolicyMode

__all__ = ["NumaBinding", "NumaPolicy", "list_nodes"]


class NumaPolicy(Enum):
    """How the nodes are chosen from."""

    BIND = "bind"
    """From these nodes and no others."""
    PREFERRED = "preferred"
    """From this node as long as it has any, then from others."""
    INTERLEAVE = "interleave"
    """Page by page from each in turn."""


_MODES = {
    NumaPolicy.BIND: MempolicyMode.MPOL_BIND,
    NumaPolicy.PREFERRED: MempolicyMode.MPOL_PREFERRED,
    NumaPolicy.INTERLEAVE: MempolicyMode.MPOL_INTERLEAVE,
}


def list_nodes(nodes: frozenset[int]) -> str:
    """Write nodes for people: ``node 0``, ``nodes 0, 1``."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, sorted(nodes)))}"


@dataclass(frozen=True, slots=True)
class NumaBinding:
    """
    Nodes, and how they are used.

    :raises UsageError: No node, something that is no node, or several for PREFERRED, which takes one.
    """

    nodes: frozenset[int]
    """Their numbers, as in /sys/devices/system/node."""
    policy: NumaPolicy = NumaPolicy.BIND

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", frozenset(self.nodes))
        if not isinstance(self.policy, NumaPolicy):
            expected = ", ".join(str(policy) for policy in NumaPolicy)
            raise UsageError(
                f"{self.policy!r} is not a NUMA policy", value=self.policy, expected=expected
            )
        if not self.nodes or not all(type(node) is int and node >= 0 for node in self.nodes):
            raise UsageError(
                f"{set(self.nodes)!r} is not a set of NUMA nodes",
                value=self.nodes,
                expected="numbers of nodes, at least one",
            )
        if self.policy is NumaPolicy.PREFERRED and len(self.nodes) > 1:
            raise UsageError(
                f"policy preferred takes one node, not {list_nodes(self.nodes)}",
                value=self.nodes,
                expected="one node, or another policy",
            )

    def check(self) -> None:
        """
        Compare with the nodes of this host.

        :raises UsageError: One of them has no memory, does not exist, or is forbidden to this process.
        :raises OSError: The kernel knows no nodes.
        """
        there = nodes_with_memory()
        if there is None:
            raise OSError(errno.ENOSYS, "this kernel knows no NUMA nodes (CONFIG_NUMA)")
        if missing := self.nodes - there:
            raise UsageError(
                f"no memory on NUMA {list_nodes(missing)}: this host has memory on {list_nodes(there)}",
                value=missing,
                expected=list_nodes(there),
            )
        allowed = allowed_nodes()
        if allowed is not None and (forbidden := self.nodes - allowed):
            raise UsageError(
                f"NUMA {list_nodes(forbidden)}: this process may take memory from {list_nodes(allowed)} only (cpuset)",
                value=forbidden,
                expected=list_nodes(allowed),
            )

    def apply(self, address: int, size: int) -> None:
        """
        Set the policy for memory that is mapped at *address*; pages that are there already stay where they are.

        :raises OSError: The kernel refused.
        """
        set_memory_policy(address, size, _MODES[self.policy], self.nodes)

    def __str__(self) -> str:
        return f"{self.policy.value} {list_nodes(self.nodes)}"
