"""
What `ramblock doctor` says, looked up another way: by the shell's tools and bare ioctls, for this
machine and for the lab's.

Nothing here is shared with the doctor but the names of its lines.
"""

import fcntl
import os
import re
import subprocess
from collections.abc import Mapping

__all__ = ["check_lines"]

# include/uapi/linux/kvm.h
_KVM_CHECK_EXTENSION = 0xAE03
_CAP_MEMORY_ATTRIBUTES, _CAP_GUEST_MEMFD, _CAP_VM_TYPES, _CAP_EXIT_HYPERCALL = 233, 234, 235, 201


def _shell(command: str) -> str:
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    return run.stdout.strip()


def check_lines(lines: Mapping[str, Mapping[str, str]]) -> None:
    """Compare; *lines* are those of ``--json``, by name."""

    def found(name: str) -> str:
        return lines[name]["found"]

    def status(name: str) -> str:
        return lines[name]["status"]

    assert found("kernel") == f"Linux {_shell('uname -r')}"
    major, minor = re.match(r"(\d+)\.(\d+)", _shell("uname -r")).groups()  # type: ignore[union-attr]
    assert (status("kernel") == "good") == ((int(major), int(minor)) >= (6, 8))
    config = _shell("zcat /proc/config.gz 2>/dev/null || cat /boot/config-$(uname -r) 2>/dev/null")
    if config:
        for option in ("KVM", "IOMMUFD", "VFIO_DEVICE_CDEV", "INTEL_IOMMU"):
            value = re.search(rf"^CONFIG_{option}=(.)$", config, re.MULTILINE)
            shown = re.search(rf"(?:^|, ){option}=(.)", found("kernel configuration"))
            assert (value and value[1]) == (shown and shown[1]), option
    else:
        assert status("kernel configuration") == "unseen"
    _check_kvm(lines)
    groups = _shell("ls /sys/kernel/iommu_groups 2>/dev/null | wc -l")
    assert found("IOMMU") == (f"{groups} groups of devices" if groups != "0" else "no IOMMU groups")
    driver = _shell("test -d /sys/bus/pci/drivers/vfio-pci && echo loaded || echo not loaded")
    assert found("vfio-pci") == driver
    for name, path in (("VFIO type1", "/dev/vfio/vfio"), ("iommufd", "/dev/iommu")):
        if _shell(f"test -e {path} && echo yes") != "yes":
            assert (status(name), found(name)) == ("lacking", f"there is no {path}")
        else:
            usable = _shell(f"test -r {path} -a -w {path} && echo yes") == "yes"
            assert (status(name) == "good") == usable
    for name, path in (
        ("dma_entry_limit", "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit"),
        ("vhost max_iotlb_entries", "/sys/module/vhost/parameters/max_iotlb_entries"),
    ):
        value_shown = _shell(f"cat {path} 2>/dev/null")
        if value_shown:
            assert found(name).replace(",", "").startswith(f"{value_shown} which is")
        else:
            assert found(name).startswith("not known")
    _check_memory(lines)


def _check_kvm(lines: Mapping[str, Mapping[str, str]]) -> None:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        assert lines["KVM"]["status"] in ("lacking", "unseen")
        assert "guest_memfd" not in lines
        return
    try:
        types = fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, _CAP_VM_TYPES) or 1
        attributes = fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, _CAP_MEMORY_ATTRIBUTES)
        guest_memfd = fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, _CAP_GUEST_MEMFD)
        hypercalls = fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, _CAP_EXIT_HYPERCALL)
    finally:
        os.close(fd)
    assert lines["KVM"]["status"] == "good"
    assert len(lines["VM types"]["found"].split(", ")) == bin(types).count("1")
    assert (lines["VM types"]["status"] == "good") == (types > 1)
    assert lines["page attributes"]["found"] == ("private" if attributes & 8 else "none")
    assert (lines["guest_memfd"]["status"] == "good") == (guest_memfd > 0)
    assert (lines["conversion by hypercall"]["status"] == "good") == bool(hypercalls & (1 << 12))


def _check_memory(lines: Mapping[str, Mapping[str, str]]) -> None:
    assert lines["page size"]["found"].startswith(str(int(_shell("getconf PAGE_SIZE")) // 1024))
    limit = _shell("ulimit -l")
    capabilities = int(_shell("sed -n 's/^CapEff:\\s*//p' /proc/self/status"), 16)
    shown = lines["RLIMIT_MEMLOCK"]["found"]
    if capabilities >> 14 & 1:
        assert shown == "no limit for this process (CAP_IPC_LOCK)"
    elif limit == "unlimited":
        assert shown == "no limit"
    else:
        assert lines["RLIMIT_MEMLOCK"]["status"] in ("lacking", "note")
    pools = _shell("ls -d /sys/kernel/mm/hugepages/hugepages-*kB 2>/dev/null").split()
    assert len(pools) == sum(name.startswith("huge pages of ") for name in lines)
    for pool in pools:
        total = _shell(f"cat {pool}/nr_hugepages")
        assert any(
            name.startswith("huge pages of ") and f" has {total}, " in line["found"]
            for name, line in lines.items()
        )
    shmem = _shell(
        "sed 's/.*\\[\\(.*\\)\\].*/\\1/' /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        " 2>/dev/null"
    )
    assert lines["huge pages for memfd"]["found"] == (shmem or "not known")
