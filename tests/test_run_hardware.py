"""
Real devices in a run, as far as they can be looked at without any: what is refused, and what their
threads do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramblock import RamBlock
from ramblock.dma import SoftIommu
from ramblock.dma.target import HostRange
from ramblock.errors import IommuFault, UsageError
from ramblock.run.device import ACCESS_BYTES, Buffer
from ramblock.run.faults import FaultPlan
from ramblock.run.hardware import HardwareDevice
from ramblock.run.preflight import choose_devices, refuse_unless_ready
from ramblock.run.watched import FreeAccount, Watch, WatchedTarget
from ramblock.testing import Region, Verifier, ViolationKind
from ramblock.trace.writer import TraceWriter
from ramblock.units import MIB, PAGE_SIZE
from ramblock.vfio import PciAddress

# -- what the host has to have --------------------------------------------------------------------

EDU, TESTDEV, DISK = (PciAddress(0, 0, number, 0) for number in (3, 4, 5))
_IDS = {EDU: (0x1234, 0x11E8), TESTDEV: (0x1B36, 0x0005), DISK: (0x8086, 0x2922)}


class Host:
    """A host's /sys and /dev, with everything that a run needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/kernel/iommu_groups", "sys/bus/pci/drivers/vfio-pci", "dev/vfio"):
            (root / folder).mkdir(parents=True)
        (root / "dev/vfio/vfio").touch()
        (root / "dev/iommu").touch()
        for address in _IDS:
            self.add(address, _IDS[address])

    def add(self, address: PciAddress, ids: tuple[int, int]) -> None:
        folder = self.root / "sys/bus/pci/devices" / str(address)
        folder.mkdir(parents=True)
        for name, number in zip(("vendor", "device"), ids, strict=True):
            (folder / name).write_text(f"{number:#06x}\n")
        self.put_into_group(address, address.device)

    def put_into_group(self, address: PciAddress, number: int) -> None:
        group = self.root / "sys/kernel/iommu_groups" / str(number)
        group.mkdir(exist_ok=True)
        link = self.root / "sys/bus/pci/devices" / str(address) / "iommu_group"
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../../../kernel/iommu_groups/{number}")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("kind", ["type1", "iommufd", "iommufd-native", "iommufd-cutting"])
def test_a_host_that_has_everything_is_not_refused(host: Host, kind: str) -> None:
    assert choose_devices([], root=host.root) == [EDU, TESTDEV]
    refuse_unless_ready(kind, [EDU, TESTDEV], root=host.root)


def test_named_devices_are_taken_in_their_order(host: Host) -> None:
    assert choose_devices(["00:04.0", "0000:00:03.0"], root=host.root) == [TESTDEV, EDU]
    with pytest.raises(UsageError, match="named twice"):
        choose_devices(["00:04.0", "0000:00:04.0"], root=host.root)
    with pytest.raises(UsageError, match="'4' is not a PCI address"):
        choose_devices(["4"], root=host.root)


def test_of_two_of_a_kind_one_has_to_be_named(host: Host) -> None:
    host.add(PciAddress(0, 0, 6, 0), _IDS[EDU])
    with pytest.raises(
        UsageError, match=r"2 devices 1234:11e8: 0000:00:03.0, 0000:00:06.0"
    ) as caught:
        choose_devices([], root=host.root)
    assert "--device" in str(caught.value.expected)
    assert choose_devices(["0000:00:06.0"], root=host.root) == [PciAddress(0, 0, 6, 0)]


@pytest.mark.parametrize(
    ("kind", "gone", "part"),
    [
        ("type1", "sys/kernel/iommu_groups", "no IOMMU is active: switch it on"),
        (
            "type1",
            "dev/vfio/vfio",
            "there is no /dev/vfio/vfio: the kernel needs CONFIG_VFIO_CONTAINER",
        ),
        ("iommufd", "dev/iommu", "there is no /dev/iommu: the kernel needs CONFIG_IOMMUFD"),
        (
            "iommufd",
            "sys/bus/pci/drivers/vfio-pci",
            "there is no driver vfio-pci: modprobe vfio-pci",
        ),
        ("iommufd", f"sys/bus/pci/devices/{EDU}/iommu_group", f"{EDU} is in no IOMMU group"),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(
    host: Host, kind: str, gone: str, part: str
) -> None:
    path = host.root / gone
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with pytest.raises(UsageError, match=f"--iommu {kind} cannot work on this host") as caught:
        refuse_unless_ready(kind, [EDU], root=host.root)
    assert part in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


@pytest.mark.parametrize(
    ("devices", "part"),
    [
        ([], "there is no device to drive"),
        ([PciAddress(0, 0, 9, 0)], "there is no PCI device 0000:00:09.0"),
        ([DISK], "0000:00:05.0 is 8086:2922: only edu (1234:11e8) and iommu-testdev"),
    ],
)
def test_a_device_that_cannot_be_driven_is_named(
    host: Host, devices: list[PciAddress], part: str
) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_unless_ready("type1", devices, root=host.root)
    assert part in str(caught.value)


def test_two_devices_of_one_group_cannot_have_an_address_space_each(host: Host) -> None:
    host.put_into_group(TESTDEV, EDU.device)
    with pytest.raises(UsageError, match=r"00:03\.0 and 0000:00:04\.0 are both in IOMMU group 3"):
        refuse_unless_ready("iommufd", [EDU, TESTDEV], root=host.root)


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_unless_ready("iommufd", [EDU], root=tmp_path)
    assert str(caught.value).count("\n  - ") == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
def test_a_file_that_may_not_be_opened_is_told(host: Host) -> None:
    (host.root / "dev/iommu").chmod(0)
    with pytest.raises(UsageError, match="/dev/iommu may not be opened"):
        refuse_unless_ready("iommufd", [EDU], root=host.root)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--device", "00:03.0"), "behind a software IOMMU, expected devices.iommu (--iommu)"),
        (("--iommu", "type1", "--devices", "1"), "real devices to be named by --device"),
        (("--iommu", "type1", "--device", "nonsense"), "'nonsense' is not a PCI address"),
        (("--iommu", "vdpa"), "choose from"),
        (("--guest", "qemu"), "choose from"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    arguments: tuple[str, ...], part: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ramblock", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert part in done.stderr
    assert done.stdout == ""


# -- the devices ----------------------------------------------------------------------------------

SHARED, PRIVATE = (0, MIB), (MIB, MIB)


class Engine:
    """A device in software that does what the real ones can do."""

    name = "software"
    rest_seconds = 0.0
    audit_pages = 50

    def __init__(self, iommu: SoftIommu) -> None:
        self._iommu = iommu
        self.written: list[int] = []

    def write(self, iova: int, data: bytes) -> bytes | None:
        try:
            self._iommu.write(iova, data)
        except IommuFault:
            return None
        self.written.append(iova)
        return data


class Rig:
    def __init__(self, block: RamBlock) -> None:
        self.verifier = Verifier([Region(0, 2 * MIB, confidential=True)], ["iommu0"])
        watch = Watch(self.verifier, TraceWriter(None), FaultPlan(), FreeAccount())
        self.iommu = SoftIommu()
        self.target = WatchedTarget("iommu0", self.iommu, watch)
        self.verifier.has_made_shared(*SHARED)
        self.target.map(0, HostRange(block.fd, 0, block.address, MIB))
        self.block = block
        self.engine = Engine(self.iommu)
        self.device = HardwareDevice(0, self.target, self.engine, self.verifier, 1, PRIVATE)

    def leave_mapped(self) -> None:
        """Map private pages, and tell nobody."""
        self.iommu.map(MIB, HostRange(self.block.fd, MIB, self.block.address + MIB, MIB))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with RamBlock.create("ram", 2 * MIB) as block:
        yield Rig(block)


def run_until(rig: Rig, accesses: int) -> None:
    rig.device.start()
    deadline = time.monotonic() + 30
    while rig.device.counts.accesses < accesses and time.monotonic() < deadline:
        time.sleep(0.001)
    rig.device.stop()
    assert rig.device.error is None


def test_it_writes_to_its_buffers_and_is_kept_out_of_private_memory(rig: Rig) -> None:
    buffer = Buffer(64 * PAGE_SIZE, 8 * PAGE_SIZE, 0)
    rig.device.give(buffer)
    run_until(rig, 20)
    counts = rig.device.counts
    assert counts.accesses >= 20
    assert counts.bytes == counts.accesses * ACCESS_BYTES
    assert counts.forbidden == counts.forbidden_faulted >= 20
    assert rig.verifier.clean
    for offset, data in buffer.written.items():
        assert rig.block.read(buffer.gpa + offset, len(data)) == data
        assert data == data[:8] * (len(data) // 8)


def test_a_device_that_reaches_private_memory_is_caught(rig: Rig) -> None:
    rig.leave_mapped()
    rig.device.give(Buffer(0, PAGE_SIZE, 0))
    run_until(rig, 3)
    assert rig.verifier.counts.keys() == {ViolationKind.DEVICE_REACHED_PRIVATE}


def test_a_device_that_does_not_reach_its_buffer_is_caught(rig: Rig) -> None:
    rig.device.give(Buffer(MIB, PAGE_SIZE, 0))  # nobody has shared it
    rig.device._round()
    assert rig.verifier.counts == {ViolationKind.DEVICE_FAULTED: 1}
    assert rig.device.counts.faults_own == 1


def test_a_buffer_that_was_taken_away_is_tried(rig: Rig) -> None:
    rig.device.taken_away(Buffer(MIB, PAGE_SIZE, 0))
    assert (rig.device.counts.probes, rig.device.counts.probes_faulted) == (1, 1)
    rig.leave_mapped()
    rig.device.taken_away(Buffer(MIB, PAGE_SIZE, 0))
    assert (rig.device.counts.probes, rig.device.counts.probes_faulted) == (2, 1)
    assert rig.verifier.counts == {ViolationKind.DEVICE_REACHED_PRIVATE: 1}


def test_a_slow_device_tries_only_now_and_then(rig: Rig) -> None:
    rig.engine.rest_seconds = 1000.0
    for _ in range(5):
        rig.device.taken_away(Buffer(MIB, PAGE_SIZE, 0))
    assert rig.device.counts.probes == 1


def test_taking_a_buffer_waits_for_the_access_under_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write = rig.engine.write

    def slow(iova: int, data: bytes) -> bytes | None:
        if iova < MIB:
            order.append("begins")
            time.sleep(0.05)
            order.append("ends")
        return write(iova, data)

    monkeypatch.setattr(rig.engine, "write", slow)
    buffer = Buffer(0, PAGE_SIZE, 0)
    rig.device.give(buffer)
    rig.device.start()
    while not order:
        time.sleep(0.001)
    rig.device.take(buffer)
    assert len(order) % 2 == 0, "it was taken in the middle of an access"
    count = len(order)
    time.sleep(0.02)
    assert len(order) == count
    rig.device.stop()


def test_the_audit_finds_what_is_missing_and_what_is_stale(rig: Rig) -> None:
    rig.device.audit([SHARED], [PRIVATE])
    counts = rig.device.counts
    assert (counts.audited, counts.audited_faulted) == (100, 50)
    assert rig.verifier.clean
    rig.leave_mapped()
    rig.iommu.unmap(*SHARED)
    rig.device.audit([SHARED], [PRIVATE])
    assert rig.verifier.counts.keys() == {
        ViolationKind.MISSING,
        ViolationKind.DEVICE_REACHED_PRIVATE,
    }


def test_the_audit_of_nothing_tries_nothing(rig: Rig) -> None:
    rig.device.audit([], [])
    assert rig.device.counts.audited == 0
    assert rig.engine.written == []
