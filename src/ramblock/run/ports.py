# SPDX-License-Identifier: Apache-2.0
"""
The devices of a run and the DMA target of each.

Here those in software, ``hardware.py`` has the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ramblock.dma.soft import SoftIommu
from ramblock.run.device import Device, SoftDevice
from ramblock.run.pinned import PinnedIommu
from ramblock.run.watched import Watch, WatchedIommu, WatchedShared, WatchedTarget

__all__ = ["Ports", "Ranges", "SoftPorts"]

Ranges = Sequence[tuple[int, int]]


class Ports(Protocol):
    """
    All devices, each with a target of its own.

    Targets and devices are made in the order of the names.
    """

    names: list[str]

    @property
    def descriptions(self) -> list[str]:
        """A description of each, for people."""

    def watch(self, watch: Watch) -> Sequence[WatchedTarget]:
        """Give the targets, watched."""

    def budget(self, number: int) -> int | None:
        """How many mappings a mapper may make; None: the target's own."""

    def make_devices(
        self, watch: Watch, seed: int, ram: Ranges, forbidden: tuple[int, int] | None
    ) -> Sequence[Device]:
        """
        Make the devices, after :meth:`watch`.

        :param ram: Memory that they may probe, as (gpa, size).
        :param forbidden: A range that the guest never shares, as (gpa, size); None where that is
            not known.
        """

    def tables(self) -> dict[str, list[tuple[int, int]]]:
        """List the mappings, as (iova, size), by target; without those that do not tell."""

    def kernel_entries(self) -> dict[str, int]:
        """
        Tell how many mappings there are as the kernel counts them, by target.

        Without those where it does not.
        """

    def audit(self, shared: Ranges, private: Ranges) -> None:
        """
        Let the devices, once they have stopped, try a sample of pages.

        A wrong outcome is noted as a violation.
        """

    def freed_while_mapped(self) -> int:
        """Bytes that devices reach and the guest does not any more, where that is known."""

    def close(self) -> None:
        """Let go of everything."""


class SoftPorts:
    """
    Devices and IOMMUs in software.

    :param count: How many.
    :param cut: Whether the IOMMUs can cut.
    :param pin: Whether they hold on to pages that are freed.
    """

    def __init__(self, count: int, *, cut: bool, pin: bool) -> None:
        self.names = [f"iommu{number}" for number in range(count)]
        self._pinned = [PinnedIommu() for _ in self.names] if pin else []
        self._iommus: Sequence[SoftIommu] = self._pinned or [SoftIommu(cut=cut) for _ in self.names]
        self._watched: list[WatchedIommu] = []

    @property
    def descriptions(self) -> list[str]:
        """Say the same of all."""
        return ["software"] * len(self.names)

    def pin(self, shared: WatchedShared) -> None:
        """Let them hold on to freed pages of *shared*, if they pin."""
        shared.pinned.extend(self._pinned)

    def watch(self, watch: Watch) -> Sequence[WatchedTarget]:
        """Give the IOMMUs, watched."""
        self._watched = [
            WatchedIommu(name, iommu, watch)
            for name, iommu in zip(self.names, self._iommus, strict=True)
        ]
        return self._watched

    def budget(self, number: int) -> int | None:
        """Have none of their own."""

    def make_devices(
        self, watch: Watch, seed: int, ram: Ranges, forbidden: tuple[int, int] | None
    ) -> Sequence[Device]:
        """Make a thread for each."""
        return [
            SoftDevice(number, iommu, watch.verifier, seed, ram, forbidden)
            for number, iommu in enumerate(self._watched)
        ]

    def tables(self) -> dict[str, list[tuple[int, int]]]:
        """List all that is mapped."""
        return {
            name: [(mapping.iova, mapping.size) for mapping in iommu.mappings()]
            for name, iommu in zip(self.names, self._iommus, strict=True)
        }

    def kernel_entries(self) -> dict[str, int]:
        """Know no kernel."""
        return {}

    def audit(self, shared: Ranges, private: Ranges) -> None:
        """Need none: the tables are known, all of them."""

    def freed_while_mapped(self) -> int:
        """Add up the bytes that the IOMMUs held on to."""
        return sum(iommu.orphaned_bytes for iommu in self._pinned)

    def close(self) -> None:
        """Unmap everything."""
        for iommu in self._iommus:
            iommu.close()
