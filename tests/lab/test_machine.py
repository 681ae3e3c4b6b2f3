"""The lab's machine is what its variant says. All other tests of the lab rely on it."""

import os
import resource
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab_variant("intel-iommu", "amd-iommu", "no-iommu", "one-vcpu")

# Vendor and device of QEMU's edu and iommu-testdev.
_DMA_DEVICES = {"0x1234 0x11e8", "0x1b36 0x0005"}


def _pci_devices() -> dict[str, Path]:
    return {
        " ".join((device / name).read_text().strip() for name in ("vendor", "device")): device
        for device in Path("/sys/bus/pci/devices").iterdir()
    }


def test_processors_are_as_many_as_the_variant_has_and_guests_never_run_on_the_first() -> None:
    one = os.environ["RAMBLOCK_LAB_VARIANT"] == "one-vcpu"

    assert os.sched_getaffinity(0) == ({0} if one else {1, 2})  # lab/variants.py says why
    assert os.cpu_count() == (1 if one else 3)


def test_iommu_is_the_one_of_the_variant(lab_iommu: str) -> None:
    names = [path.name for path in Path("/sys/class/iommu").glob("*")]

    assert names == {"intel": ["dmar0"], "amd": ["ivhd0"], "none": []}[lab_iommu]


def test_devices_for_dma_are_there_and_have_groups_of_their_own(lab_iommu: str) -> None:
    devices = _pci_devices()

    assert devices.keys() >= _DMA_DEVICES
    for name in _DMA_DEVICES:
        group = devices[name] / "iommu_group" / "devices"
        assert [p.name for p in group.glob("*")] == (
            [] if lab_iommu == "none" else [devices[name].name]
        )


@pytest.mark.parametrize("path", ["/dev/kvm", "/dev/iommu", "/dev/vfio/vfio"])
def test_kernel_interfaces_are_there(path: str) -> None:
    os.close(os.open(path, os.O_RDWR))


def test_kernel_has_what_the_second_source_of_truth_needs() -> None:
    assert Path("/sys/kernel/tracing/events/iommu/map").is_dir()
    assert Path("/sys/kernel/tracing/events/iommu/unmap").is_dir()
    assert Path("/sys/kernel/debug/iommu").is_dir()


def test_only_the_temporary_folder_can_be_written_to() -> None:
    with tempfile.NamedTemporaryFile():
        pass
    with pytest.raises(OSError, match="Read-only file system"):
        Path(__file__).with_name("written").touch()


def test_memory_may_be_locked_without_limit() -> None:
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (resource.RLIM_INFINITY,) * 2
