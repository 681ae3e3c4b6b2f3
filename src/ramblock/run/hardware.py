# SPDX-License-Identifier: Apache-2.0
"""
Real devices behind a real IOMMU, for a run: QEMU's edu and iommu-testdev, opened through VFIO.

Both can write somewhere and tell whether it got there. iommu-testdev is told by its result
register, at once. edu says nothing and takes a tenth of a second for each transfer; it is made to
read its write again, and a fault gives zeros.

Neither can read for its own sake without disturbing memory, so a real device probes nothing that
may be somebody's buffer: it tries memory that was never shared, a buffer that has just been made
private (the caller sees to it that nobody converts meanwhile), and at the end of the run a sample
of everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from threading import Lock
from time import monotonic
from typing import Literal, Protocol, TypeAlias

from ramblock.dma.iommufd import IommufdIoas
from ramblock.dma.type1 import Type1Container
from ramblock.errors import DmaError, UsageError
from ramblock.run.device import ACCESS_BYTES, ACCESS_STEP, Buffer, Device
from ramblock.run.ports import Ranges
from ramblock.run.watched import Watch, WatchedTarget
from ramblock.testing.verifier import Verifier
from ramblock.testing.violations import ViolationKind
from ramblock.units import PAGE_SIZE
from ramblock.vfio import (
    BouncePage,
    DmaResult,
    EduDevice,
    IommuTestdev,
    PciAddress,
    VfioDevice,
    bind_to_vfio,
)

__all__ = ["DmaEngine", "HardwareDevice", "HardwarePort", "HardwarePorts", "IommuKind"]

IommuKind: TypeAlias = Literal["type1", "iommufd", "iommufd-native", "iommufd-cutting"]

_PROOF_BYTES = 64
_CUTTING = {"iommufd": None, "iommufd-native": False, "iommufd-cutting": True}


class DmaEngine(Protocol):
    """A real device that does DMA."""

    name: str
    rest_seconds: float
    """Between two rounds: slow work must not hold up a thread that waits for a buffer."""
    audit_pages: int
    """How many pages of each kind it can try at the end."""

    def write(self, iova: int, data: bytes) -> bytes | None:
        """
        Write to *iova*, *data* or the device's fixed value.

        Return it, or None if the IOMMU refused.
        """


class TestdevEngine:
    """iommu-testdev."""

    name = "iommu-testdev"
    rest_seconds = 0.02
    audit_pages = 256

    def __init__(self, device: VfioDevice) -> None:
        self._device = IommuTestdev(device)

    def write(self, iova: int, data: bytes) -> bytes | None:
        """Write its pattern."""
        result = self._device.dma_write(iova, len(data))
        if not result.written and result is not DmaResult.REFUSED:
            raise DmaError(f"iommu-testdev neither wrote {iova:#x} nor was refused: {result.name}")
        return IommuTestdev.pattern(len(data)) if result.written else None


class EduEngine:
    """edu, with a page to hand it data through."""

    name = "edu"
    rest_seconds = 2.0
    audit_pages = 4

    def __init__(self, device: VfioDevice, bounce: BouncePage) -> None:
        self._device = EduDevice(device)
        self._bounce = bounce
        self._check_reach()

    def _check_reach(self) -> None:
        """
        Refuse an edu that does not reach all of the guest.

        The page lies behind all of it: a device that reaches the page reaches the guest. An address
        that is cut off faults, since nothing else is mapped yet.
        """
        proof = os.urandom(_PROOF_BYTES)
        self._bounce.write(proof)
        self._device.load(self._bounce.iova, len(proof))
        self._bounce.write(bytes(len(proof)))
        self._device.store(self._bounce.iova, len(proof))
        if self._bounce.read(len(proof)) != proof:
            raise UsageError(
                f"edu does not reach {self._bounce.iova:#x}: its DMA mask is too small,"
                " or the IOMMU is not in its way",
                value=self._bounce.iova,
                expected="QEMU started with -device edu,dma_mask=0xffffffffffff",
            )

    def write(self, iova: int, data: bytes) -> bytes | None:
        """Write, and read it again: through a fault nothing is written, and zeros are read."""
        self._device.write_to_ram(iova, data, self._bounce)
        return data if self._device.read_from_ram(iova, len(data), self._bounce) == data else None


class HardwarePort:
    """
    One device, bound to vfio-pci and opened, and the target that maps for it.

    :param kind: How.
    :param address: Which device.
    :param bounce_iova: Where a page of its driver's may be mapped: outside the guest.
    :raises DmaError: The kernel refused; the device is bound to its earlier driver.
    :raises UsageError: It is no device that this module drives.
    """

    def __init__(self, kind: IommuKind, address: PciAddress, bounce_iova: int) -> None:
        self.address = address
        with ExitStack() as resources:
            resources.enter_context(bind_to_vfio(address))
            self.target: Type1Container | IommufdIoas
            if kind == "type1":
                self.target = Type1Container()
                resources.callback(self.target.close)
                device = VfioDevice.open_by_group(address, self.target)
            else:
                self.target = IommufdIoas(cutting=_CUTTING[kind])
                resources.callback(self.target.close)
                device = VfioDevice.open_by_cdev(address, self.target)
            resources.enter_context(device)
            self.engine: DmaEngine
            #: Entries of the target that no mapper knows of.
            self.own_entries = 0
            if device.ids == (EduDevice.VENDOR, EduDevice.DEVICE):
                bounce = resources.enter_context(BouncePage(self.target, bounce_iova))
                self.own_entries = 1
                self.engine = EduEngine(device, bounce)
            else:
                self.engine = TestdevEngine(device)
            self._resources = resources.pop_all()

    @property
    def description(self) -> str:
        """A description, for people."""
        mode = "type1"
        if isinstance(self.target, IommufdIoas):
            mode = f"iommufd, {self.target.mode.value}"
        return f"{mode}, {self.engine.name} at {self.address}"

    @property
    def budget(self) -> int | None:
        """How many mappings are left for a mapper; None: any number."""
        limit = self.target.capabilities.max_mappings
        return None if limit is None else limit - self.own_entries

    def entries_in_kernel(self) -> int | None:
        """
        Tell how many mappings a mapper has made, as the kernel counts them.

        None where it does not.
        """
        if isinstance(self.target, IommufdIoas):
            return None
        limit, available = self.target.capabilities.max_mappings, self.target.available
        return None if limit is None or available is None else limit - available - self.own_entries

    def close(self) -> None:
        """
        Unmap everything, close the device, and bind it to its earlier driver.

        :raises DmaError: The kernel refused one of these; the others were done.
        """
        self._resources.close()


class HardwareDevice(Device):
    """
    A real device.

    :param target: Its DMA target, watched.
    :param engine: Its driver.
    :param forbidden: A range that the guest never shares, as (gpa, size); None where that is not
        known.
    """

    def __init__(
        self,
        number: int,
        target: WatchedTarget,
        engine: DmaEngine,
        verifier: Verifier,
        seed: int,
        forbidden: tuple[int, int] | None,
    ) -> None:
        super().__init__(number, target.name, seed, engine.rest_seconds)
        self._watched = target
        self._engine = engine
        self._verifier = verifier
        self._forbidden = forbidden
        # Its registers are used by this thread and by the guest's.
        self._lock = Lock()
        self._next_try = 0.0

    def _round(self) -> None:
        super()._round()
        if self._forbidden is not None:
            gpa, size = self._forbidden
            self.counts.forbidden += 1
            self.counts.forbidden_faulted += not self._write(self._page_of(gpa, size))

    def use(self, buffer: Buffer, offset: int) -> None:
        """Write. Whether it is there is looked at when the guest takes the buffer back."""
        iova = buffer.gpa + offset
        written = self._write(iova)
        if written is None:
            self.counts.faults_own += 1
            self._verifier.violation(ViolationKind.DEVICE_FAULTED, self.target, iova, ACCESS_BYTES)
            return
        buffer.written[offset] = written
        self.counts.accesses += 1
        self.counts.bytes += len(written)

    def taken_away(self, buffer: Buffer) -> None:
        """
        Try a buffer that has just been made private: it must fault.

        A slow device tries only now and then.
        """
        if monotonic() < self._next_try:
            return
        self.counts.probes += 1
        self.counts.probes_faulted += not self._write(self._page_of(buffer.gpa, buffer.size))
        self._next_try = monotonic() + self._engine.rest_seconds

    def audit(self, shared: Ranges, private: Ranges) -> None:
        """
        Try a sample of all pages after the thread has stopped: only shared ones are reached.

        :param shared: As (gpa, size), writable.
        :param private: As (gpa, size).
        """
        for iova in self._sample(shared):
            self.counts.audited += 1
            if self._write(iova) is None:
                self._verifier.violation(ViolationKind.MISSING, self.target, iova, PAGE_SIZE)
        for iova in self._sample(private):
            self.counts.audited += 1
            self.counts.audited_faulted += self._write(iova) is None

    def _sample(self, ranges: Ranges) -> Iterable[int]:
        weights = [size for _, size in ranges]
        if weights:
            for gpa, size in self.random.choices(ranges, weights, k=self._engine.audit_pages):
                yield self._page_of(gpa, size)

    def _page_of(self, gpa: int, size: int) -> int:
        return gpa + self.random.randrange(0, size, ACCESS_STEP)

    def _write(self, iova: int) -> bytes | None:
        """Write as the device; one that should have been refused is a violation."""
        with self._lock:
            since = self._watched.before_access()
            written = self._engine.write(iova, self.fresh_data())
        if written is None:
            self._watched.note_fault(iova, ACCESS_BYTES, write=True)
        else:
            self._watched.note_access(iova, ACCESS_BYTES, since)
        return written


class HardwarePorts:
    """
    Real devices, each in a container or an address space of its own.

    :param kind: Their DMA target.
    :param addresses: Which.
    :param bounce_iova: As for :class:`HardwarePort`.
    :raises DmaError: The kernel refused one of them; none is held.
    """

    def __init__(self, kind: IommuKind, addresses: Sequence[PciAddress], bounce_iova: int) -> None:
        self.names = [f"iommu{number}" for number in range(len(addresses))]
        self._ports: list[HardwarePort] = []
        self._watched: list[WatchedTarget] = []
        self._devices: list[HardwareDevice] = []
        with ExitStack() as resources:
            for address in addresses:
                port = HardwarePort(kind, address, bounce_iova)
                resources.callback(port.close)
                self._ports.append(port)
            self._resources = resources.pop_all()

    @property
    def descriptions(self) -> list[str]:
        """A description of each, for people."""
        return [port.description for port in self._ports]

    def watch(self, watch: Watch) -> Sequence[WatchedTarget]:
        """Give the targets, watched."""
        self._watched = [
            WatchedTarget(name, port.target, watch)
            for name, port in zip(self.names, self._ports, strict=True)
        ]
        return self._watched

    def budget(self, number: int) -> int | None:
        """How many mappings are left for a mapper."""
        return self._ports[number].budget

    def make_devices(
        self, watch: Watch, seed: int, ram: Ranges, forbidden: tuple[int, int] | None
    ) -> Sequence[Device]:
        """Make a thread for each; they do not probe *ram*."""
        self._devices = [
            HardwareDevice(number, target, port.engine, watch.verifier, seed, forbidden)
            for number, (target, port) in enumerate(zip(self._watched, self._ports, strict=True))
        ]
        return self._devices

    def tables(self) -> dict[str, list[tuple[int, int]]]:
        """List nothing: the kernel does not tell."""
        return {}

    def kernel_entries(self) -> dict[str, int]:
        """Ask those that count."""
        counts = {
            name: port.entries_in_kernel()
            for name, port in zip(self.names, self._ports, strict=True)
        }
        return {name: count for name, count in counts.items() if count is not None}

    def audit(self, shared: Ranges, private: Ranges) -> None:
        """Let each device try a sample, since no table is known."""
        for device in self._devices:
            device.audit(shared, private)

    def freed_while_mapped(self) -> int:
        """Not known: the pages are the kernel's."""
        return 0

    def close(self) -> None:
        """
        Unmap everything, and bind the devices to their earlier drivers.

        :raises DmaError: The kernel refused some of it; the rest was done.
        """
        self._resources.close()
