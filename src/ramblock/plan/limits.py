# SPDX-License-Identifier: Apache-2.0
"""The limits of a host: the kernel's defaults, or this host's own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ramblock.dma.vfio_facts import locked_memory, module_parameter
from ramblock.doctor.memory import cgroup_limit

__all__ = ["Limits", "limits_of_host"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """
    Limits that a guest may reach.

    The defaults are those of Linux 7.3 and QEMU 10.1; None: no limit.
    """

    dma_entry_limit: int = 65_535
    """Mappings of a type1 container (drivers/vfio/vfio_iommu_type1.c: U16_MAX)."""
    max_iotlb_entries: int = 2_048
    """Mappings of a vhost device (drivers/vhost/vdpa.c)."""
    server_maps: int = 65_535
    """Mappings that a vfio-user server takes; QEMU's default (VFIO_USER_DEF_MAP_MAX)."""
    memlock: int | None = None
    """RLIMIT_MEMLOCK in bytes: the limit on pinned memory."""
    cgroup: int | None = None
    """Memory of the control group, in bytes."""
    memslots: int = 32_764
    """
    KVM's memory slots as QEMU sees them.

    Its own check takes them into account (kata-containers #11721).
    """


def limits_of_host(root: Path = Path("/")) -> Limits:
    """Read the limits of this host; a default stands for an unreadable one."""
    defaults = Limits()
    locked = locked_memory(root=root)
    return Limits(
        dma_entry_limit=_parameter(
            root, "vfio_iommu_type1", "dma_entry_limit", defaults.dma_entry_limit
        ),
        max_iotlb_entries=_parameter(
            root, "vhost_vdpa", "max_iotlb_entries", defaults.max_iotlb_entries
        ),
        memlock=None if locked.exempt else locked.limit,
        cgroup=cgroup_limit(root),
    )


def _parameter(root: Path, module: str, name: str, default: int) -> int:
    value = module_parameter(module, name, root=root)
    return int(value) if value is not None and value.isdecimal() else default
