# SPDX-License-Identifier: Apache-2.0
"""
A device that does DMA on a thread of its own, beside the conversions.

It writes to the buffers that the guest gave it, reads back, and compares. And it misbehaves: it reads what it was not
given (a buffer it gave back, any address), and reads and writes memory that the guest never shared, which must fault.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from itertools import count

from ramblock.errors import IommuFault
from ramblock.run.verifier import Verifier, ViolationKind
from ramblock.run.watched import WatchedIommu

__all__ = ["Buffer", "Device", "DeviceCounts"]

_ACCESS = 4096
# A device is not the load here: it must run beside the conversions without starving them of the interpreter.
_PAUSE_SECONDS = 0.0004


@dataclass(eq=False)
class Buffer:
    """A shared range that the guest handed to a device."""

    gpa: int
    size: int
    device: int
    #: What the device wrote last at each offset.
    written: dict[int, bytes] = field(default_factory=dict)


@dataclass
class DeviceCounts:
    """What the devices did."""

    accesses: int = 0
    bytes: int = 0
    faults_own: int = 0
    """In the device's own buffers: must be none."""
    probes: int = 0
    """Accesses to what the device was not given."""
    probes_faulted: int = 0
    forbidden: int = 0
    """Accesses to memory that was never shared."""
    forbidden_faulted: int = 0


class Device(threading.Thread):
    """
    One device.

    :param number: Its index.
    :param iommu: What it sits behind.
    :param ram: Guest ranges it may probe, as (gpa, size).
    :param forbidden: A range that the guest never shares, as (gpa, size); None where that is not known.
    """

    def __init__(
        self,
        number: int,
        iommu: WatchedIommu,
        verifier: Verifier,
        seed: int,
        ram: list[tuple[int, int]],
        forbidden: tuple[int, int] | None,
    ) -> None:
        super().__init__(name=f"device{number}", daemon=True)
        self.counts = DeviceCounts()
        #: Why the thread died, if it did.
        self.error: BaseException | None = None
        self._iommu = iommu
        self._verifier = verifier
        self._random = random.Random(f"{seed}/device{number}")
        self._ram = ram
        self._forbidden = forbidden
        self._buffers: list[Buffer] = []
        self._given_back: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._serial = count(1)

    def give(self, buffer: Buffer) -> None:
        """Hand *buffer* to the device."""
        with self._lock:
            self._buffers.append(buffer)

    def take(self, buffer: Buffer) -> None:
        """Take *buffer* back; the device does nothing with it any more when this returns."""
        with self._lock:
            self._buffers.remove(buffer)
            self._given_back.append((buffer.gpa, buffer.size))
            del self._given_back[:-64]

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Do DMA until told to stop."""
        try:
            while not self._stopping.wait(_PAUSE_SECONDS):
                self._use_own_buffer()
                self._probe()
                self._reach_for_private()
        except BaseException as error:
            self.error = error

    def _use_own_buffer(self) -> None:
        with self._lock:
            if not self._buffers:
                return
            buffer = self._random.choice(self._buffers)
            offset = self._random.randrange(0, buffer.size, _ACCESS)
            data = f"{self.name} {next(self._serial)} ".encode() * 4
            iova = buffer.gpa + offset
            try:
                self._iommu.device_write(iova, data)
                back = self._iommu.device_read(iova, len(data))
            except IommuFault as fault:
                self.counts.faults_own += 1
                self._verifier.violation(
                    ViolationKind.DEVICE_FAULTED, self._iommu.name, fault.iova, fault.size
                )
                return
            if back != data:
                self._verifier.violation(
                    ViolationKind.LOST_WRITE, self._iommu.name, iova, len(data)
                )
            buffer.written[offset] = data
            self.counts.accesses += 2
            self.counts.bytes += 2 * len(data)

    def _probe(self) -> None:
        """Read what it was not given: whether that faults depends on what it is just now; the verifier knows."""
        with self._lock:
            where = (
                self._random.choice(self._given_back)
                if self._given_back and self._random.random() < 0.5
                else None
            )
        gpa, size = where or self._random.choice(self._ram)
        iova = gpa + self._random.randrange(0, size - 64, 64)
        self.counts.probes += 1
        try:
            self._iommu.device_read(iova, 64)
        except IommuFault:
            self.counts.probes_faulted += 1

    def _reach_for_private(self) -> None:
        if self._forbidden is None:
            return
        gpa, size = self._forbidden
        iova = gpa + self._random.randrange(0, size, _ACCESS)
        self.counts.forbidden += 1
        try:
            if self._random.random() < 0.5:
                self._iommu.device_write(iova, b"not yours")
            else:
                self._iommu.device_read(iova, 64)
        except IommuFault:
            self.counts.forbidden_faulted += 1
