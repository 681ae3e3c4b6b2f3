# SPDX-License-Identifier: Apache-2.0
"""The targets that can map for devices: abilities, and where the limit of each is set."""

from __future__ import annotations

import msgspec

from ramblock.dma.target import DmaCapabilities, MappingPolicy
from ramblock.plan.limits import Limits

__all__ = ["POLICIES", "TARGETS", "TargetKind"]

#: AUTO is one of them, depending on the target.
POLICIES = (MappingPolicy.PAGE, MappingPolicy.RUN)


class TargetKind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of DMA target."""

    name: str
    cuts: bool = False
    exact: bool = False
    """An unmap has to name one whole mapping."""
    pins: bool = True
    """Whether mapped memory is pinned on the host."""
    per_device: bool = False
    """Whether each device has a table of its own; else all devices of the guest share one."""
    limit: str | None = None
    """Which of the :class:`Limits` counts its mappings."""
    limit_name: str = ""
    checked_by_qemu: bool = False
    """Whether QEMU adds up the possible mappings, and refuses to start (hw/vfio/listener.c)."""

    def max_mappings(self, limits: Limits) -> int | None:
        """How many mappings it may have; None: any number."""
        if self.limit is None:
            return None
        number: int = getattr(limits, self.limit)
        return number

    def can(self, policy: MappingPolicy) -> bool:
        """Whether it can be used with a policy."""
        return policy is MappingPolicy.PAGE or self.cuts

    @property
    def capabilities(self) -> DmaCapabilities:
        """As the mapper sees it, without its limit."""
        return DmaCapabilities(cut=self.cuts, exact=self.exact)


TARGETS = (
    TargetKind(
        name="type1",
        limit="dma_entry_limit",
        limit_name="vfio_iommu_type1.dma_entry_limit",
        checked_by_qemu=True,
    ),
    # The kernel takes one unmap over several mappings too, but may stop half-way and does not say
    # where; so our target asks for each.
    TargetKind(name="iommufd", exact=True),
    TargetKind(name="iommufd-cutting", cuts=True),
    TargetKind(
        name="vfio-user",
        exact=True,
        pins=False,
        per_device=True,
        limit="server_maps",
        limit_name="max_dma_maps of the server",
        checked_by_qemu=True,
    ),
    TargetKind(
        name="vhost-vdpa",
        per_device=True,
        limit="max_iotlb_entries",
        limit_name="vhost_vdpa.max_iotlb_entries",
    ),
)
