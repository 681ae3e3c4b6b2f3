# SPDX-License-Identifier: Apache-2.0
"""The NUMA nodes that the pages of a block come from (mbind(2))."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from ramblock.errors import UsageError
from ramblock.hostmem.host_calls import set_memory_policy
from ramblock.hostmem.host_facts import allowed_nodes, nodes_with_memory
from ramblock.uapi.mempolicy import MempolicyMode


class NumaPolicy(Enum):
    """The choice among the nodes."""

    BIND = "bind"  #: From these nodes and no others.
    PREFERRED = "preferred"  #: From this node as long as it has any, then from others.
    INTERLEAVE = "interleave"  #: Page by page from each in turn.


def list_nodes(nodes: frozenset[int]) -> str:
    """Write nodes for people: ``node 0``, ``nodes 0, 1``."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, sorted(nodes)))}"


@dataclass(frozen=True, slots=True)
class NumaBinding:
    """
    Nodes, and their use.

    :raises UsageError: No node, something that is no node, or several for PREFERRED.
    """

    nodes: frozenset[int]  #: Their numbers, as in /sys/devices/system/node.
    policy: NumaPolicy = NumaPolicy.BIND

    def __post_init__(self) -> None:
        nodes = frozenset(self.nodes)
        object.__setattr__(self, "nodes", nodes)
        value: object = nodes
        if not isinstance(self.policy, NumaPolicy):
            value, expected = self.policy, ", ".join(map(str, NumaPolicy))
            wrong = f"{self.policy!r} is not a NUMA policy"
        elif not nodes or not all(type(node) is int and node >= 0 for node in nodes):
            expected = "numbers of nodes, at least one"
            wrong = f"{set(nodes)!r} is not a set of NUMA nodes"
        elif self.policy is NumaPolicy.PREFERRED and len(nodes) > 1:
            expected = "one node, or another policy"
            wrong = f"policy preferred takes one node, not {list_nodes(nodes)}"
        else:
            return
        raise UsageError(wrong, value=value, expected=expected)

    def check(self) -> None:
        """
        Compare with the nodes of this host.

        :raises UsageError: A node has no memory, does not exist, or is forbidden to this process.
        :raises OSError: The kernel knows no nodes.
        """
        there = nodes_with_memory()
        if there is None:
            raise OSError(errno.ENOSYS, "this kernel knows no NUMA nodes (CONFIG_NUMA)")
        allowed = allowed_nodes() or self.nodes  # not told: all of them
        wrong = self.nodes - there or self.nodes - allowed
        names = list_nodes(wrong)
        if not wrong <= there:
            expected = list_nodes(there)
            text = f"no memory on NUMA {names}: this host has memory on {expected}"
        elif wrong:
            expected = list_nodes(allowed)
            text = f"NUMA {names}: this process may take memory from {expected} only (cpuset)"
        else:
            return
        raise UsageError(text, value=wrong, expected=expected)

    def apply(self, address: int, size: int) -> None:
        """
        Set the policy for the mapping at *address*; pages that are there already stay.

        :raises OSError: The kernel refused.
        """
        # The policy outlives the pages: a page that a conversion frees comes from the same nodes
        # again. On a memfd the policy belongs to the file, whoever touches it (mm/shmem.c,
        # shmem_set_policy()). On anonymous memory and huge pages it belongs to this process's
        # mapping (hugetlb_vm_ops, mm/hugetlb.c): a huge page that another process or
        # IOMMU_IOAS_MAP_FILE touches first follows that one's policy.
        mode = MempolicyMode[f"MPOL_{self.policy.name}"]
        set_memory_policy(address, size, mode, self.nodes)

    def __str__(self) -> str:
        return f"{self.policy.value} {list_nodes(self.nodes)}"
