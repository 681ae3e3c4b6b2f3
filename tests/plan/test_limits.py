"""The limits of a host, read from a tree that stands for /sys and /proc."""

from pathlib import Path

from ramblock.plan import Limits, limits_of_host


def _parameter(root: Path, module: str, name: str, value: str) -> None:
    folder = root / "sys/module" / module / "parameters"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{value}\n")


def test_a_host_that_tells_nothing_has_the_defaults(tmp_path: Path) -> None:
    found, defaults = limits_of_host(tmp_path), Limits()
    assert (found.dma_entry_limit, found.max_iotlb_entries) == (65_535, 2_048)
    assert found.cgroup is None
    assert found.memslots == defaults.memslots


def test_what_a_host_tells(tmp_path: Path) -> None:
    _parameter(tmp_path, "vfio_iommu_type1", "dma_entry_limit", "4227072")
    _parameter(tmp_path, "vhost_vdpa", "max_iotlb_entries", "4096")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/vm\n")
    (tmp_path / "sys/fs/cgroup/vm").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/vm/memory.max").write_text("8589934592\n")
    found = limits_of_host(tmp_path)
    assert (found.dma_entry_limit, found.max_iotlb_entries) == (4_227_072, 4_096)
    assert found.cgroup == 8 << 30


def test_vhosts_parameter_is_another(tmp_path: Path) -> None:
    """It is for vhost's own device IOTLB."""
    _parameter(tmp_path, "vhost", "max_iotlb_entries", "4096")
    assert limits_of_host(tmp_path).max_iotlb_entries == 2_048


def test_what_is_no_number_is_the_default(tmp_path: Path) -> None:
    _parameter(tmp_path, "vfio_iommu_type1", "dma_entry_limit", "many")
    assert limits_of_host(tmp_path).dma_entry_limit == 65_535
