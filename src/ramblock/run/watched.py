# SPDX-License-Identifier: Apache-2.0
"""The parts of a run, wrapped: the verifier looks at each call before or after it is made, and the trace notes it."""

from __future__ import annotations

from ramblock.dma.soft import SoftIommu
from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.errors import IommuFault
from ramblock.memory.backing import SharedBacking, StandInPrivate
from ramblock.run.faults import FaultPlan
from ramblock.run.pinned import PinnedIommu
from ramblock.run.trace_writer import TraceWriter
from ramblock.run.verifier import Verifier

__all__ = ["FreeAccount", "WatchedIommu", "WatchedPrivate", "WatchedShared", "WatchedVm"]


class FreeAccount:
    """Bytes that really went back to the host: the kernel's block count before and after each free."""

    def __init__(self) -> None:
        self.freed_bytes = 0
        self.calls = 0

    def note(self, before: int | None, after: int | None) -> None:
        """Note one free."""
        self.calls += 1
        if before is not None and after is not None:
            self.freed_bytes += max(before - after, 0)


class WatchedIommu:
    """
    An IOMMU whose real effects are watched. Fault injection goes around it, so the verifier sees what really happened.

    :param name: In reports and traces.
    :param inner: The IOMMU.
    """

    def __init__(self, name: str, inner: SoftIommu, verifier: Verifier, trace: TraceWriter) -> None:
        self.name = name
        self.inner = inner
        self._verifier = verifier
        self._trace = trace

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the IOMMU."""
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, watched."""
        self._verifier.about_to_map(self.name, iova, memory.size)
        self.inner.map(iova, memory, writable=writable)
        self._verifier.has_mapped(self.name, iova, memory.size)
        self._trace.emit("map", target=self.name, iova=iova, size=memory.size, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, watched."""
        removed = self.inner.unmap(iova, size)
        self._verifier.has_unmapped(self.name, iova, size, removed)
        self._trace.emit("unmap", target=self.name, iova=iova, size=size, unmapped=removed)
        return removed

    def close(self) -> None:
        """Close the IOMMU."""
        self.inner.close()

    def device_read(self, iova: int, size: int) -> bytes:
        """Read as the device behind it; an access that should have faulted is a violation."""
        since = self._verifier.before_access()
        try:
            data = self.inner.read(iova, size)
        except IommuFault:
            self._trace.emit("fault", target=self.name, iova=iova, size=size, write=False)
            raise
        self._verifier.device_reached(self.name, iova, size, since)
        return data

    def device_write(self, iova: int, data: bytes) -> None:
        """Write as the device behind it; an access that should have faulted is a violation."""
        since = self._verifier.before_access()
        try:
            self.inner.write(iova, data)
        except IommuFault:
            self._trace.emit("fault", target=self.name, iova=iova, size=len(data), write=True)
            raise
        self._verifier.device_reached(self.name, iova, len(data), since)

    def __repr__(self) -> str:
        return self.name


class WatchedVm:
    """Page attributes that only the verifier and the trace keep: there is no kernel in this run."""

    def __init__(self, verifier: Verifier, trace: TraceWriter, faults: FaultPlan) -> None:
        self._verifier = verifier
        self._trace = trace
        self._faults = faults

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, watched."""
        self._faults.attribute()
        self._verifier.about_to_set_attribute(gpa, size, private=private)
        self._trace.emit("attributes", gpa=gpa, size=size, private=private)


class WatchedShared:
    """A block's shared backing; its frees are watched."""

    def __init__(
        self,
        inner: SharedBacking,
        gpa: int,
        verifier: Verifier,
        trace: TraceWriter,
        faults: FaultPlan,
        account: FreeAccount,
    ) -> None:
        self._inner = inner
        self._gpa = gpa
        self._verifier = verifier
        self._trace = trace
        self._faults = faults
        self._account = account
        #: IOMMUs that hold on to freed pages; only in a run without coordination.
        self.pinned: list[PinnedIommu] = []
        self.fd = inner.fd
        self.address = inner.address
        self.size = inner.size
        self.page_size = inner.page_size
        self.read = inner.read
        self.write = inner.write
        self.allocated_bytes = inner.allocated_bytes
        self.close = inner.close

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self._faults.free()
        gpa = self._gpa + offset
        self._verifier.about_to_free_shared(gpa, size)
        for iommu in self.pinned:
            iommu.about_to_free(gpa, size)
        before = self._inner.allocated_bytes()
        self._inner.discard(offset, size)
        self._account.note(before, self._inner.allocated_bytes())
        self._trace.emit("free", side="shared", gpa=gpa, size=size)


class WatchedPrivate:
    """A block's private backing; its frees are watched."""

    def __init__(
        self,
        inner: StandInPrivate,
        gpa: int,
        verifier: Verifier,
        trace: TraceWriter,
        faults: FaultPlan,
        account: FreeAccount,
    ) -> None:
        self._inner = inner
        self._gpa = gpa
        self._verifier = verifier
        self._trace = trace
        self._faults = faults
        self._account = account
        self.fd = inner.fd
        self.size = inner.size
        self.write = inner.write
        self.close = inner.close

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self._faults.free()
        gpa = self._gpa + offset
        self._verifier.about_to_free_private(gpa, size)
        before = self._inner.allocated_bytes()
        self._inner.discard(offset, size)
        self._account.note(before, self._inner.allocated_bytes())
        self._trace.emit("free", side="private", gpa=gpa, size=size)
