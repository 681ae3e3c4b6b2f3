# SPDX-License-Identifier: Apache-2.0
"""
A device that does DMA on a thread of its own, beside the conversions.

It writes to the buffers that the guest gave it, reads back, and compares. And it misbehaves: it
reads memory that it was not given (a buffer it gave back, any address), and reads and writes memory
that the guest never shared, which must fault.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from ramblock.errors import IommuFault
from ramblock.run.watched import WatchedIommu
from ramblock.testing.verifier import Verifier
from ramblock.testing.violations import ViolationKind

__all__ = ["Buffer", "Device", "DeviceCounts", "SoftDevice"]

#: One access in each of these: a page.
ACCESS_STEP = 4096
#: Bytes of one access.
ACCESS_BYTES = 64
# A device is not the load here: it must run beside the conversions without starving them of the
# interpreter, on a machine that is emulated as well. So it rests this many times as long as it was
# busy.
_REST = 4


@dataclass(eq=False)
class Buffer:
    """A shared range that the guest handed to a device."""

    gpa: int
    size: int
    device: int
    #: The device's last write at each offset: one word of 64 bits, repeated.
    written: dict[int, bytes] = field(default_factory=dict)
    #: Held while the device uses it.
    in_use: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class DeviceCounts:
    """Counts of the devices' work."""

    accesses: int = 0
    bytes: int = 0
    faults_own: int = 0
    """In the device's own buffers: must be none."""
    probes: int = 0
    """Accesses to memory that the device was not given."""
    probes_faulted: int = 0
    forbidden: int = 0
    """Accesses to memory that was never shared."""
    forbidden_faulted: int = 0
    audited: int = 0
    """Accesses to a sample of all pages, at the end; real devices only."""
    audited_faulted: int = 0
    """Of these, to private pages: must be half, wherever there are private pages."""


class Device(threading.Thread):
    """
    The base of all devices: their buffers, and a thread that does rounds of DMA.

    :param number: Its index.
    :param target: Name of its DMA target.
    :param pause: Seconds between two rounds, at least.
    """

    def __init__(self, number: int, target: str, seed: int, pause: float) -> None:
        super().__init__(name=f"device{number}", daemon=True)
        self.target = target
        self.counts = DeviceCounts()
        #: Why the thread died, if it did.
        self.error: BaseException | None = None
        self.random = random.Random(f"{seed}/device{number}")
        self._pause = pause
        self._buffers: list[Buffer] = []
        self.given_back: list[tuple[int, int]] = []
        # A plain lock, not a Condition: the guest's thread can be interrupted by Ctrl-C, and a
        # Condition would stay taken then.
        self._lists = threading.Lock()
        self._stopping = threading.Event()
        self._serial = count(1)

    def give(self, buffer: Buffer) -> None:
        """Hand *buffer* to the device."""
        with self._lists:
            self._buffers.append(buffer)

    def take(self, buffer: Buffer) -> None:
        """Take *buffer* back; the device does nothing with it any more when this returns."""
        with self._lists:
            self._buffers.remove(buffer)
        with buffer.in_use, self._lists:
            self.given_back.append((buffer.gpa, buffer.size))
            del self.given_back[:-64]

    def take_all(self) -> list[Buffer]:
        """Take every buffer back, as for a reboot."""
        with self._lists:
            buffers = list(self._buffers)
        for buffer in buffers:
            self.take(buffer)
        return buffers

    def taken_away(self, buffer: Buffer) -> None:
        """*buffer* has become private; nobody converts anything while this runs."""

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Do DMA until told to stop."""
        try:
            pause = self._pause
            while not self._stopping.wait(pause):
                began = monotonic()
                self._round()
                pause = max(self._pause, _REST * (monotonic() - began))
        except BaseException as error:
            self.error = error

    def _round(self) -> None:
        """Use a buffer of its own."""
        with self._lists:
            if not self._buffers:
                return
            buffer = self.random.choice(self._buffers)
            # Before the list is free again: who takes the buffer away waits for this.
            buffer.in_use.acquire()
        try:
            self.use(buffer, self.random.randrange(0, buffer.size, ACCESS_STEP))
        finally:
            buffer.in_use.release()

    def use(self, buffer: Buffer, offset: int) -> None:
        """Do DMA at *offset* of *buffer*, which stays the device's meanwhile."""

    def fresh_data(self) -> bytes:
        """Make data that was not written before: the device's number, and a serial number."""
        word = next(self._serial) | (int(self.name.removeprefix("device")) + 1) << 48
        return word.to_bytes(8, "little") * (ACCESS_BYTES // 8)


_PAUSE_SECONDS = 0.0004


class SoftDevice(Device):
    """
    A device that reads and writes on command: one in software, or that of a probe.

    :param iommu: Its IOMMU.
    :param ram: Guest ranges it may probe, as (gpa, size).
    :param forbidden: A range that the guest never shares, as (gpa, size); None where that is not
        known.
    """

    def __init__(
        self,
        number: int,
        iommu: WatchedIommu,
        verifier: Verifier,
        seed: int,
        ram: Sequence[tuple[int, int]],
        forbidden: tuple[int, int] | None,
    ) -> None:
        super().__init__(number, iommu.name, seed, _PAUSE_SECONDS)
        self._iommu = iommu
        self._verifier = verifier
        self._ram = ram
        self._forbidden = forbidden

    def _round(self) -> None:
        super()._round()
        self._probe()
        self._reach_for_private()

    def use(self, buffer: Buffer, offset: int) -> None:
        """Write, read back, compare."""
        data = self.fresh_data()
        iova = buffer.gpa + offset
        try:
            self._iommu.device_write(iova, data)
            back = self._iommu.device_read(iova, len(data))
        except IommuFault as fault:
            self.counts.faults_own += 1
            self._verifier.violation(
                ViolationKind.DEVICE_FAULTED, self.target, fault.iova, fault.size
            )
            return
        if back != data:
            self._verifier.violation(ViolationKind.LOST_WRITE, self.target, iova, len(data))
        buffer.written[offset] = data
        self.counts.accesses += 2
        self.counts.bytes += 2 * len(data)

    def _probe(self) -> None:
        """
        Read memory that it was not given: whether that faults depends on its present state.

        The verifier knows.
        """
        with self._lists:
            where = (
                self.random.choice(self.given_back)
                if self.given_back and self.random.random() < 0.5
                else None
            )
        gpa, size = where or self.random.choice(self._ram)
        iova = gpa + self.random.randrange(0, size - ACCESS_BYTES, ACCESS_BYTES)
        self.counts.probes += 1
        try:
            self._iommu.device_read(iova, ACCESS_BYTES)
        except IommuFault:
            self.counts.probes_faulted += 1

    def _reach_for_private(self) -> None:
        if self._forbidden is None:
            return
        gpa, size = self._forbidden
        iova = gpa + self.random.randrange(0, size, ACCESS_STEP)
        self.counts.forbidden += 1
        try:
            if self.random.random() < 0.5:
                self._iommu.device_write(iova, b"not yours")
            else:
                self._iommu.device_read(iova, ACCESS_BYTES)
        except IommuFault:
            self.counts.forbidden_faulted += 1
