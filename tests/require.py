"""
What some tests need of the machine, and the decorators that ask for it.

    @require_hugetlb
    def test_cut_of_a_huge_page() -> None: ...

    pytestmark = require_kvm  # a whole module

Without the feature the test is skipped, and the reason says how to get it. Where the feature has to
be there, a skip would hide that nothing was tested: what the environment variable RAMBLOCK_REQUIRE
names (``kvm,hugetlb``) fails instead.

Nothing here decides anything about a test: conftest.py acts on the mark.
"""

import fcntl
import functools
import importlib.util
import mmap
import os
import shutil
from collections.abc import Callable

import pytest

from lab.double import missing as missing_double

__all__ = [
    "PROBES",
    "missing",
    "require_browser",
    "require_hugetlb",
    "require_kvm",
    "require_lab",
    "require_qemu",
    "require_root",
    "required_names",
]

require_browser = pytest.mark.require("browser")
require_hugetlb = pytest.mark.require("hugetlb")
require_kvm = pytest.mark.require("kvm")
require_lab = pytest.mark.require("lab")
require_qemu = pytest.mark.require("qemu")
require_root = pytest.mark.require("root")

# include/uapi/linux/kvm.h: _IO(KVMIO, 0x00) and the only version there has been since Linux 2.6.22
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12

_HUGE_PAGE_BYTES = 2 << 20
# A few blocks of a few pages each; .ci/run reserves twice as many.
_HUGE_PAGES = 8


def _probe_browser() -> str | None:
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
        if shutil.which(program) is None:
            return f"no {program}; as root: apt-get install {package}"
    if importlib.util.find_spec("selenium") is None:
        return "no selenium; run the tests by: make test"
    return None


def _probe_hugetlb() -> str | None:
    size = _HUGE_PAGES * _HUGE_PAGE_BYTES
    try:
        fd = os.memfd_create("probe", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        try:
            os.ftruncate(fd, size)
            # The mapping reserves the pages, so it fails where touching them would be a SIGBUS.
            mmap.mmap(fd, size).close()
        finally:
            os.close(fd)
    except OSError as error:
        return (
            f"cannot have {_HUGE_PAGES} huge pages of 2 MiB ({error.strerror}); "
            "as root: echo 16 > /proc/sys/vm/nr_hugepages"
        )
    return None


def _probe_kvm() -> str | None:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
        finally:
            os.close(fd)
    except OSError as error:
        return (
            f"cannot use /dev/kvm ({error.strerror}); "
            "load kvm_intel or kvm_amd, and join the group that owns /dev/kvm"
        )
    if version != _KVM_API_VERSION:
        return f"/dev/kvm speaks version {version}, not {_KVM_API_VERSION}; use another kernel"
    return None


def _probe_lab() -> str | None:
    # Set by the program that boots the virtual machine (lab/vm.py).
    if os.environ.get("RAMBLOCK_LAB") == "1":
        return None
    return "not in the lab's virtual machine; run: make lab-test"


def _probe_lab_host() -> str | None:
    names = ("HEADERS", "KERNEL", "QEMU", "BUSYBOX")
    if all(os.environ.get(f"RAMBLOCK_LAB_{name}") for name in names):
        return None
    return "where the lab's kernel and QEMU are is not known; run: make lab-test"


def _probe_qemu() -> str | None:
    # The double of the lab; it needs a KVM, whichever.
    return missing("kvm") or missing_double()


def _probe_root() -> str | None:
    return None if os.geteuid() == 0 else "not root; run the tests as root"


# Each gives None, or what is missing and how to get it.
PROBES: dict[str, Callable[[], str | None]] = {
    "browser": _probe_browser,
    "hugetlb": _probe_hugetlb,
    "kvm": _probe_kvm,
    "lab": _probe_lab,
    "lab_host": _probe_lab_host,
    "qemu": _probe_qemu,
    "root": _probe_root,
}


# Once per run: a feature that comes or goes meanwhile would make the skips contradict each other.
@functools.cache
def missing(name: str) -> str | None:
    return PROBES[name]()


def required_names() -> frozenset[str]:
    names = os.environ.get("RAMBLOCK_REQUIRE", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())
