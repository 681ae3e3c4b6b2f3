# SPDX-License-Identifier: Apache-2.0
"""
The parts of a run: the watched edges, with the run's trace, accounts and faults around them.

The verifier is told by :mod:`ramblock.testing.edges`; nothing here looks at a call.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ramblock.dma.target import DmaTarget, HostRange
from ramblock.errors import IommuFault
from ramblock.guest.vm import Vm
from ramblock.hostmem.backing import PrivateBacking, SharedBacking, StandInPrivate
from ramblock.run.faults import FaultPlan
from ramblock.run.pinned import PinnedIommu
from ramblock.testing.edges import CheckedPrivate, CheckedShared, CheckedTarget, CheckedVm
from ramblock.testing.verifier import Verifier
from ramblock.trace.writer import TraceWriter

__all__ = [
    "FreeAccount",
    "ReachableTarget",
    "Watch",
    "WatchedIommu",
    "WatchedPrivate",
    "WatchedShared",
    "WatchedStandIn",
    "WatchedTarget",
    "WatchedVm",
]


class FreeAccount:
    """Bytes that really went back to the host, by the kernel's block count around each free."""

    def __init__(self) -> None:
        self.freed_bytes = 0
        self.calls = 0

    def note(self, before: int | None, after: int | None) -> None:
        """Note one free."""
        self.calls += 1
        if before is not None and after is not None:
            self.freed_bytes += max(before - after, 0)


class Watch(NamedTuple):
    """Who watches."""

    verifier: Verifier
    trace: TraceWriter
    faults: FaultPlan
    account: FreeAccount


class WatchedTarget(CheckedTarget):
    """
    A DMA target whose real effects are watched.

    Fault injection goes around it, so the verifier sees only calls that were made.

    :param name: In reports and traces.
    :param inner: The target.
    """

    def __init__(self, name: str, inner: DmaTarget, watch: Watch) -> None:
        super().__init__(watch.verifier, name, inner)
        self._trace = watch.trace

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, watched."""
        super().map(iova, memory, writable=writable)
        self._trace.emit("map", target=self.name, iova=iova, size=memory.size, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, watched."""
        removed = super().unmap(iova, size)
        self._trace.emit("unmap", target=self.name, iova=iova, size=size, unmapped=removed)
        return removed

    def note_fault(self, iova: int, size: int, *, write: bool) -> None:
        """Note an access that was refused."""
        self._trace.emit("fault", target=self.name, iova=iova, size=size, write=write)

    def __repr__(self) -> str:
        return self.name


class ReachableTarget(DmaTarget, Protocol):
    """A target with a device behind it that reads and writes on command, as a ``SoftIommu`` has."""

    def read(self, iova: int, size: int) -> bytes:
        """
        Read as the device.

        :raises IommuFault: Not all of it is mapped.
        """

    def write(self, iova: int, data: bytes) -> None:
        """Write as the device; raises as :meth:`read`."""


class WatchedIommu(WatchedTarget):
    """A target whose device is at hand, watched; and the accesses of that device."""

    inner: ReachableTarget

    def __init__(self, name: str, inner: ReachableTarget, watch: Watch) -> None:
        super().__init__(name, inner, watch)

    def device_read(self, iova: int, size: int) -> bytes:
        """Read as the device behind it; an access that should have faulted is a violation."""
        since = self.before_access()
        try:
            data = self.inner.read(iova, size)
        except IommuFault:
            self.note_fault(iova, size, write=False)
            raise
        self.note_access(iova, size, since)
        return data

    def device_write(self, iova: int, data: bytes) -> None:
        """Write as the device behind it; an access that should have faulted is a violation."""
        since = self.before_access()
        try:
            self.inner.write(iova, data)
        except IommuFault:
            self.note_fault(iova, len(data), write=True)
            raise
        self.note_access(iova, len(data), since)


class WatchedVm(CheckedVm):
    """
    The VM of a run; calls of it can be told to fail.

    :param inner: KVM's; None: the attributes are kept by the verifier and the trace alone.
    """

    def __init__(self, watch: Watch, inner: Vm | None = None) -> None:
        super().__init__(watch.verifier, inner)
        self._watch = watch

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, watched."""
        self._watch.faults.attribute()
        super().set_memory_attributes(gpa, size, private)
        self._watch.trace.emit("attributes", gpa=gpa, size=size, private=private)


class WatchedShared(CheckedShared):
    """A block's shared backing; its frees are watched, accounted, and can be told to fail."""

    def __init__(self, inner: SharedBacking, gpa: int, watch: Watch) -> None:
        super().__init__(watch.verifier, inner, gpa)
        self._watch = watch
        self._gpa = gpa
        #: IOMMUs that hold on to freed pages; only in a run without coordination.
        self.pinned: list[PinnedIommu] = []

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        _, trace, faults, account = self._watch
        faults.free()
        gpa = self._gpa + offset
        for iommu in self.pinned:
            iommu.about_to_free(gpa, size)
        before = self.inner.allocated_bytes()
        super().discard(offset, size)
        account.note(before, self.inner.allocated_bytes())
        trace.emit("free", side="shared", gpa=gpa, size=size)

    def close(self) -> None:
        """Give everything back, unwatched: the report is made by then; targets may come later."""
        self.inner.close()


class CountedPrivate(PrivateBacking, Protocol):
    """A private backing that may know how much of it is in use."""

    def allocated_bytes(self) -> int | None:
        """Bytes of memory in use; None where the kernel does not tell."""


class WatchedPrivate(CheckedPrivate):
    """A block's private backing; its frees are watched, accounted, and can be told to fail."""

    inner: CountedPrivate

    def __init__(self, inner: CountedPrivate, gpa: int, watch: Watch) -> None:
        super().__init__(watch.verifier, inner, gpa)
        self._watch = watch
        self._gpa = gpa

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        _, trace, faults, account = self._watch
        faults.free()
        before = self.inner.allocated_bytes()
        super().discard(offset, size)
        account.note(before, self.inner.allocated_bytes())
        trace.emit("free", side="private", gpa=self._gpa + offset, size=size)


class WatchedStandIn(WatchedPrivate):
    """A block's private backing where no kernel has one."""

    inner: StandInPrivate

    def __init__(self, name: str, size: int, gpa: int, watch: Watch) -> None:
        super().__init__(StandInPrivate(name, size), gpa, watch)

    def use(self, offset: int) -> None:
        """Use a page in the guest's name, so that there is something to free."""
        self.inner.write(offset, b"private")

    def allocated_bytes(self) -> int:
        """Bytes of memory in use."""
        return self.inner.allocated_bytes()

    def close(self) -> None:
        """Give it back."""
        self.inner.close()
