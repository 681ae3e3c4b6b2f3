import errno
import resource
from pathlib import Path

import pytest

from ramblock.dma.kernel_errors import TABLE, Refused, refusal
from ramblock.dma.vfio_facts import (
    GroupMember,
    LockedMemory,
    group_members,
    locked_memory,
    module_parameter,
)
from ramblock.errors import DmaError
from ramblock.uapi import iommufd, vfio
from ramblock.units import MIB

MAPS = ("VFIO_IOMMU_MAP_DMA", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """
    A host: type1 with a limit of 100, one group of three devices, 7 MiB locked and 9 MiB pinned.
    """
    files = {
        "sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "100\n",
        "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "N\n",
        "sys/module/iommufd/parameters/allow_unsafe_interrupts": "N\n",
        "proc/self/status": "Name:\tx\nVmLck:\t    7168 kB\nVmPin:\t    9216 kB\n",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    devices = tmp_path / "sys/kernel/iommu_groups/11/devices"
    for address, driver in (
        ("0000:00:1f.2", "ahci"),
        ("0000:00:1f.0", None),
        ("0000:00:1f.3", "vfio-pci"),
    ):
        (devices / address).mkdir(parents=True)
        if driver is not None:
            (devices / address / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")
    return tmp_path


@pytest.fixture
def memlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * MIB, 8 * MIB))


# -- the table -------------------------------------------------------------------------------------


def test_every_call_of_the_table_exists() -> None:
    for advice in TABLE:
        for call in advice.calls:
            known = hasattr(vfio, call) or hasattr(iommufd, call) or call.startswith("open ")
            assert known, call


def test_no_call_has_two_meanings_for_one_errno() -> None:
    keys = [(call, advice.errno) for advice in TABLE for call in advice.calls]
    assert len(keys) == len(set(keys))


def test_every_entry_can_be_said(root: Path, memlock: None) -> None:
    for advice in TABLE:
        for call in advice.calls:
            for group in (None, 11, 12):
                error = refusal(Refused(call, advice.errno, 0x1000, 0x2000, group, root))
                assert f"{call} [0x1000, 0x3000): " in str(error)
                assert advice.meaning in str(error)
                assert (error.errno, error.iova, error.size) == (advice.errno, 0x1000, 0x2000)
                assert (error.hint is None) == (advice.hint is None)
                assert error.hint is None or error.hint in str(error)


def test_what_is_not_in_the_table_keeps_its_errno() -> None:
    error = refusal(Refused("IOMMU_DESTROY", errno.EBUSY))
    assert isinstance(error, DmaError)
    assert isinstance(error, OSError)
    assert str(error) == "[Errno 16] IOMMU_DESTROY: Device or resource busy"
    assert (error.call, error.hint, error.in_doubt, error.iova) == (
        "IOMMU_DESTROY",
        None,
        False,
        None,
    )


def test_doubt_and_detail_are_passed_on() -> None:
    error = refusal(
        Refused("IOMMU_IOAS_UNMAP", errno.ENOENT, 0, 4096), detail="and so on", in_doubt=True
    )
    assert error.in_doubt
    assert str(error).endswith("and so on")


# -- hints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", MAPS)
def test_memlock(root: Path, memlock: None, call: str) -> None:
    error = refusal(Refused(call, errno.ENOMEM, 0, 4 * MIB, root=root))
    # type1 charges what is locked, iommufd what is pinned.
    used, needed = (7, 11) if call.startswith("VFIO") else (9, 13)
    assert f"RLIMIT_MEMLOCK is 8 MiB, {used} MiB of it in use, at least {needed} MiB needed" in str(
        error
    )


def test_memlock_when_a_device_comes(root: Path, memlock: None) -> None:
    # How much is mapped already only the kernel knows.
    error = refusal(Refused("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.ENOMEM, root=root))
    assert error.hint is not None
    assert "9 MiB of it in use: raise it" in error.hint


def test_memlock_is_not_blamed_without_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    error = refusal(Refused("IOMMU_IOAS_MAP", errno.ENOMEM, 0, 4096, root=root))
    assert error.hint is None
    assert "RLIMIT" not in str(error)


def test_entry_limit_is_read_back(root: Path, tmp_path: Path) -> None:
    error = refusal(Refused("VFIO_IOMMU_MAP_DMA", errno.ENOSPC, 0, 4096, root=root))
    assert "vfio_iommu_type1.dma_entry_limit is 100 now" in str(error)
    elsewhere = refusal(
        Refused("VFIO_IOMMU_MAP_DMA", errno.ENOSPC, 0, 4096, root=tmp_path / "none")
    )
    assert "dma_entry_limit is not readable now" in str(elsewhere)


def test_unsafe_interrupts_names_the_right_module(root: Path) -> None:
    for call, module in (
        ("VFIO_SET_IOMMU", "vfio_iommu_type1"),
        ("VFIO_DEVICE_BIND_IOMMUFD", "iommufd"),
    ):
        error = refusal(Refused(call, errno.EPERM, group=11, root=root))
        assert f"{module}.allow_unsafe_interrupts is N" in str(error)


def test_a_group_names_who_is_in_the_way(root: Path) -> None:
    error = refusal(Refused("VFIO_GROUP_SET_CONTAINER", errno.EBUSY, group=11, root=root))
    assert "0000:00:1f.0 (no driver), 0000:00:1f.2 (ahci), 0000:00:1f.3 (vfio-pci)" in str(error)


# -- facts -----------------------------------------------------------------------------------------


def test_members_of_a_group(root: Path) -> None:
    assert group_members(11, root=root) == [
        GroupMember("0000:00:1f.0", None),
        GroupMember("0000:00:1f.2", "ahci"),
        GroupMember("0000:00:1f.3", "vfio-pci"),
    ]
    assert group_members(12, root=root) == []


def test_module_parameters(root: Path) -> None:
    assert module_parameter("vfio_iommu_type1", "dma_entry_limit", root=root) == "100"
    assert module_parameter("vfio_iommu_type1", "unknown", root=root) is None


def test_locked_memory(root: Path, memlock: None, tmp_path: Path) -> None:
    assert locked_memory(root=root) == LockedMemory(8 * MIB, 7 * MIB, 9 * MIB, exempt=False)
    assert locked_memory(root=tmp_path / "none") == LockedMemory(8 * MIB, 0, 0, exempt=False)
    # This process's own, whatever they are.
    assert locked_memory().locked >= 0


def test_the_limit_is_not_to_blame_with_the_capability(root: Path, memlock: None) -> None:
    status = root / "proc/self/status"
    status.write_text(status.read_text() + "CapEff:\t0000000000004000\n")
    error = refusal(Refused("IOMMU_IOAS_MAP", errno.ENOMEM, 0, 4096, root=root))
    assert "RLIMIT_MEMLOCK does not count" in str(error)
