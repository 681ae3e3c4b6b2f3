# SPDX-License-Identifier: Apache-2.0
"""The parts of a run, wrapped: the verifier looks at each call before or after it is made, and the trace notes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.errors import DmaError, IommuFault
from ramblock.hostmem.backing import SharedBacking, StandInPrivate
from ramblock.run.faults import FaultPlan
from ramblock.run.pinned import PinnedIommu
from ramblock.run.verifier import Verifier
from ramblock.trace.writer import TraceWriter

__all__ = [
    "FreeAccount",
    "PrivateFree",
    "ReachableTarget",
    "Watch",
    "WatchedIommu",
    "WatchedShared",
    "WatchedStandIn",
    "WatchedTarget",
    "WatchedVm",
]


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


class Watch(NamedTuple):
    """Who watches."""

    verifier: Verifier
    trace: TraceWriter
    faults: FaultPlan
    account: FreeAccount


class WatchedTarget:
    """
    A DMA target whose real effects are watched. Fault injection goes around it, so the verifier sees what really happened.

    :param name: In reports and traces.
    :param inner: The target.
    """

    def __init__(self, name: str, inner: DmaTarget, watch: Watch) -> None:
        self.name = name
        self._target = inner
        self._verifier = watch.verifier
        self._trace = watch.trace

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the target."""
        return self._target.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, watched."""
        self._verifier.about_to_map(self.name, iova, memory.size)
        with self._unless_refused(iova, memory.size):
            self._target.map(iova, memory, writable=writable)
            self._verifier.has_mapped(self.name, iova, memory.size)
        self._trace.emit("map", target=self.name, iova=iova, size=memory.size, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, watched."""
        with self._unless_refused(iova, size):
            removed = self._target.unmap(iova, size)
            self._verifier.has_unmapped(self.name, iova, size, removed)
        self._trace.emit("unmap", target=self.name, iova=iova, size=size, unmapped=removed)
        return removed

    @contextmanager
    def _unless_refused(self, iova: int, size: int) -> Iterator[None]:
        """After anything but success or a plain refusal, Ctrl-C for instance, nobody knows whether the call was carried out."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, DmaError) or error.in_doubt:
                self._verifier.note_uncertain(self.name, iova, size)
            raise

    def close(self) -> None:
        """Close the target."""
        self._target.close()

    def before_access(self) -> int:
        """Take a time stamp before an access of the device behind it."""
        return self._verifier.before_access()

    def note_access(self, iova: int, size: int, since: int) -> None:
        """Note an access that was let through; one that should have faulted is a violation."""
        self._verifier.device_reached(self.name, iova, size, since)

    def note_fault(self, iova: int, size: int, *, write: bool) -> None:
        """Note an access that was refused."""
        self._trace.emit("fault", target=self.name, iova=iova, size=size, write=write)

    def __repr__(self) -> str:
        return self.name


class ReachableTarget(DmaTarget, Protocol):
    """A target with a device behind it that reads and writes on command: :class:`~ramblock.dma.soft.SoftIommu`, for one."""

    def read(self, iova: int, size: int) -> bytes:
        """
        Read as the device.

        :raises IommuFault: Not all of it is mapped.
        """

    def write(self, iova: int, data: bytes) -> None:
        """Write as the device; raises as :meth:`read`."""


class WatchedIommu(WatchedTarget):
    """A target whose device is at hand, watched; and the accesses of that device."""

    def __init__(self, name: str, inner: ReachableTarget, watch: Watch) -> None:
        super().__init__(name, inner, watch)
        self.inner = inner

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


class WatchedVm:
    """Page attributes that only the verifier and the trace keep: there is no kernel behind them."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, watched."""
        self._watch.faults.attribute()
        self._watch.verifier.about_to_set_attribute(gpa, size, private=private)
        self.set_for_guest(gpa, size, private=private)
        self._watch.trace.emit("attributes", gpa=gpa, size=size, private=private)

    def set_for_guest(self, gpa: int, size: int, *, private: bool) -> None:
        """Set them where the guest meets them: nowhere."""


class WatchedShared:
    """A block's shared backing; its frees are watched."""

    def __init__(self, inner: SharedBacking, gpa: int, watch: Watch) -> None:
        self._inner = inner
        self._gpa = gpa
        self._watch = watch
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
        verifier, trace, faults, account = self._watch
        faults.free()
        gpa = self._gpa + offset
        verifier.about_to_free_shared(gpa, size)
        for iommu in self.pinned:
            iommu.about_to_free(gpa, size)
        before = self._inner.allocated_bytes()
        self._inner.discard(offset, size)
        account.note(before, self._inner.allocated_bytes())
        trace.emit("free", side="shared", gpa=gpa, size=size)


class WatchedStandIn(StandInPrivate):
    """A block's private backing where no kernel has one; its frees are watched."""

    def __init__(self, name: str, size: int, gpa: int, watch: Watch) -> None:
        super().__init__(name, size)
        self._free = PrivateFree(gpa, watch, super().discard, self.allocated_bytes)

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self._free(offset, size)

    def use(self, offset: int) -> None:
        """Use a page in the guest's name, so that there is something to free."""
        self.write(offset, b"private")


class PrivateFree:
    """
    A free of private memory, watched.

    :param gpa: Where the memory begins for the guest.
    :param discard: What frees.
    :param allocated: Bytes in use; None where the kernel does not tell.
    """

    def __init__(
        self,
        gpa: int,
        watch: Watch,
        discard: Callable[[int, int], None],
        allocated: Callable[[], int | None],
    ) -> None:
        self._gpa = gpa
        self._watch = watch
        self._discard = discard
        self._allocated = allocated

    def __call__(self, offset: int, size: int) -> None:
        """Free."""
        verifier, trace, faults, account = self._watch
        faults.free()
        gpa = self._gpa + offset
        verifier.about_to_free_private(gpa, size)
        before = self._allocated()
        self._discard(offset, size)
        account.note(before, self._allocated())
        trace.emit("free", side="private", gpa=gpa, size=size)
