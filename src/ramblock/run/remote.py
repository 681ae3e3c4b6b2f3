# SPDX-License-Identifier: Apache-2.0
"""
Devices in processes of their own, behind vfio-user sockets, for a run.

The device of ``ramblock probe`` is driven: it does DMA as the devices in software do. To any other
server memory is mapped, and nothing more is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.dma.vfio_user import VfioUserTarget
from ramblock.errors import UsageError
from ramblock.run.device import Device, SoftDevice
from ramblock.run.ports import Ranges
from ramblock.run.watched import Watch, WatchedIommu, WatchedTarget
from ramblock.vfio.probe_driver import ProbeDriver

__all__ = ["RemoteIommu", "RemotePorts"]


class RemoteIommu:
    """A vfio-user target, and the probe's device behind it."""

    def __init__(self, target: VfioUserTarget, driver: ProbeDriver) -> None:
        self._target = target
        self.read = driver.read
        self.write = driver.write

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the target."""
        return self._target.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map."""
        self._target.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap."""
        return self._target.unmap(iova, size)

    def close(self) -> None:
        """Close the target."""
        self._target.close()


class RemotePorts:
    """
    One server for each socket.

    :param sockets: Their paths.
    :raises DmaError: One of them does not answer; no connection is held.
    :raises RemoteProtocolError: One of them speaks something else; likewise.
    """

    def __init__(self, sockets: Sequence[str]) -> None:
        self.names = [f"iommu{number}" for number in range(len(sockets))]
        self._sockets = sockets
        self._targets: list[VfioUserTarget] = []
        self._drivers: list[ProbeDriver | None] = []
        with ExitStack() as resources:
            for path in sockets:
                target = VfioUserTarget(path)
                resources.callback(target.close)
                self._targets.append(target)
                self._drivers.append(_driver(target))
            self._resources = resources.pop_all()

    @property
    def descriptions(self) -> list[str]:
        """A description of each, for people."""
        return [
            f"vfio-user server at {path}, "
            + ("which nobody drives" if driver is None else "a ramblock probe")
            for path, driver in zip(self._sockets, self._drivers, strict=True)
        ]

    def watch(self, watch: Watch) -> Sequence[WatchedTarget]:
        """Give the targets, watched."""
        self._watched = [
            WatchedTarget(name, target, watch)
            if driver is None
            else WatchedIommu(name, RemoteIommu(target, driver), watch)
            for name, target, driver in zip(self.names, self._targets, self._drivers, strict=True)
        ]
        return self._watched

    def budget(self, number: int) -> int | None:
        """Leave the server's own limit."""

    def make_devices(
        self, watch: Watch, seed: int, ram: Ranges, forbidden: tuple[int, int] | None
    ) -> Sequence[Device]:
        """Make a thread for each; it does DMA where there is a driver."""
        return [
            SoftDevice(number, iommu, watch.verifier, seed, ram, forbidden)
            if isinstance(iommu, WatchedIommu)
            else Device(number, iommu.name, seed, pause=1.0)
            for number, iommu in enumerate(self._watched)
        ]

    def tables(self) -> dict[str, list[tuple[int, int]]]:
        """List the mappings, by the servers' answers."""
        return {
            name: [(mapping.iova, mapping.size) for mapping in target.mappings()]
            for name, target in zip(self.names, self._targets, strict=True)
        }

    def kernel_entries(self) -> dict[str, int]:
        """Know no kernel."""
        return {}

    def audit(self, shared: Ranges, private: Ranges) -> None:
        """Need none: the devices try all pages, and the tables are known."""

    def freed_while_mapped(self) -> int:
        """Not known: a server that has the descriptor reaches all of it."""
        return 0

    def close(self) -> None:
        """Unmap everything, and leave the servers."""
        self._resources.close()


def _driver(target: VfioUserTarget) -> ProbeDriver | None:
    try:
        return ProbeDriver(target)
    except UsageError:
        return None
