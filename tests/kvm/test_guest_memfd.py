"""guest_memfd of the real kernel as a private backing."""

import ctypes
import errno
import fcntl
import mmap
import os

import pytest

from doubles import PAGE
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.errors import UsageError
from ramblock.kvm import (
    Capability,
    GuestMemfd,
    GuestMemfdFlags,
    KvmVm,
    has_in_place_conversion,
    page_cache,
)
from ramblock.kvm.page_cache import cached_bytes
from ramblock.uapi import ioctl
from require import require_kvm

PAGES = 64
SIZE = PAGES * PAGE
_MAPPABLE = GuestMemfdFlags.GUEST_MEMFD_FLAG_MMAP | GuestMemfdFlags.GUEST_MEMFD_FLAG_INIT_SHARED

_FALLOC_FL_KEEP_SIZE = 0x01
_libc = ctypes.CDLL(None, use_errno=True)


def allocate(memory: GuestMemfd, offset: int, size: int) -> None:
    """Let the kernel take pages, as a guest does that touches them."""
    arguments = ctypes.c_int64(offset), ctypes.c_int64(size)
    assert _libc.fallocate(memory.fd, _FALLOC_FL_KEEP_SIZE, *arguments) == 0


@pytest.fixture
def memory(vm: KvmVm) -> GuestMemfd:
    if not vm.capability(Capability.KVM_CAP_GUEST_MEMFD):
        pytest.skip(
            "the kernel has no guest_memfd (Linux 6.8 with private memory, from 6.18 always)"
        )
    return vm.create_guest_memfd(SIZE)


def test_cached_bytes_of_an_ordinary_memfd() -> None:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, SIZE)
        if cached_bytes(fd) is None:
            pytest.skip("the kernel has no cachestat(2), or a filter forbids it")
        assert cached_bytes(fd) == 0
        os.pwrite(fd, b"x" * 3 * PAGE, PAGE)
        assert cached_bytes(fd) == 3 * PAGE
    finally:
        os.close(fd)
    with pytest.raises(OSError, match=f"cachestat of descriptor {fd}"):
        cached_bytes(fd)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_kernel_that_does_not_tell(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_libc", Refusing(error))
    assert cached_bytes(0) is None


class Refusing:
    """A C library whose system calls are forbidden."""

    def __init__(self, error: int) -> None:
        self._error = error

    def syscall(self, *_: object) -> int:
        ctypes.set_errno(self._error)
        return -1


@require_kvm
def test_hole_punching_frees_pages(memory: GuestMemfd) -> None:
    assert memory.allocated_bytes() in (0, None)
    allocate(memory, 0, SIZE)
    assert memory.allocated_bytes() in (SIZE, None)
    memory.discard(PAGE, 3 * PAGE)
    assert memory.allocated_bytes() in (SIZE - 3 * PAGE, None)
    memory.discard(0, SIZE)
    assert memory.allocated_bytes() in (0, None)


@require_kvm
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (1, PAGE), (0, PAGE - 1), (-PAGE, PAGE), (SIZE, PAGE), (0, SIZE + PAGE)],
)
def test_bad_range_frees_nothing(memory: GuestMemfd, offset: int, size: int) -> None:
    allocate(memory, 0, SIZE)
    with pytest.raises(UsageError, match="GuestMemfd"):
        memory.discard(offset, size)
    assert memory.allocated_bytes() in (SIZE, None)


@require_kvm
def test_closed_is_closed(memory: GuestMemfd) -> None:
    fd = memory.fd
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for call in (lambda: memory.fd, memory.allocated_bytes, lambda: memory.discard(0, PAGE)):
        with pytest.raises(UsageError, match="guest_memfd is closed"):
            call()


@require_kvm
def test_children_do_not_inherit_it(memory: GuestMemfd) -> None:
    assert fcntl.fcntl(memory.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@require_kvm
@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1, 1 << 63])
def test_bad_size_is_refused(vm: KvmVm, size: int) -> None:
    with pytest.raises(UsageError, match="guest_memfd"):
        vm.create_guest_memfd(size)


@require_kvm
def test_flags_that_the_kernel_does_not_have_are_refused(vm: KvmVm) -> None:
    with pytest.raises(OSError, match="guest_memfd of 4 KiB"):
        vm.create_guest_memfd(PAGE, GuestMemfdFlags(1 << 40))


@require_kvm
def test_shared_one_can_be_mapped(vm: KvmVm) -> None:
    if vm.guest_memfd_flags & _MAPPABLE != _MAPPABLE:
        pytest.skip("the kernel cannot map a guest_memfd (Linux 6.18 can)")
    with (
        vm.create_guest_memfd(SIZE, _MAPPABLE) as memory,
        mmap.mmap(memory.fd, SIZE, mmap.MAP_SHARED) as mapping,
    ):
        mapping[5 * PAGE : 5 * PAGE + 4] = b"data"
        assert memory.allocated_bytes() in (PAGE, None)
        memory.discard(5 * PAGE, PAGE)
        assert memory.allocated_bytes() in (0, None)
        assert mapping[5 * PAGE : 5 * PAGE + 4] == bytes(4)


@require_kvm
def test_private_one_cannot_be_mapped(memory: GuestMemfd) -> None:
    with pytest.raises(OSError, match="No such device"):
        mmap.mmap(memory.fd, SIZE, mmap.MAP_SHARED)


@require_kvm
def test_conversion_frees_the_side_that_is_no_longer_used(vm: KvmVm, memory: GuestMemfd) -> None:
    guest = GuestMemory(vm)
    with RamBlock.create("ram", SIZE, private=memory) as block:
        guest.map(block, 0)
        allocate(memory, 0, SIZE)
        result = guest.convert(0, 16 * PAGE, PageState.SHARED)
        assert result.not_freed_bytes == 0
        assert memory.allocated_bytes() in (SIZE - 16 * PAGE, None)
        block.write(0, b"x" * 16 * PAGE)
        assert block.allocated_bytes() == 16 * PAGE
        guest.convert(0, 4 * PAGE, PageState.PRIVATE)
        assert block.allocated_bytes() == 12 * PAGE
    # It is the caller's to close.
    assert memory.allocated_bytes() in (SIZE - 16 * PAGE, None)


@require_kvm
def test_kernel_without_in_place_conversion_says_so(vm: KvmVm) -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release > (7, 3):
        pytest.skip("it may have it")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - counting names
    assert has_in_place_conversion(vm) is False
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208 - counting names


@require_kvm
def test_kernel_with_in_place_conversion_says_so(
    vm: KvmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played: whoever knows the request refuses a size of 0."""
    real = ioctl.call

    def call(fd: int, request: int, argument: ctypes.Structure | int = 0) -> int:
        if request == 0xC080_AED2:  # _IOWR(KVMIO, 0xd2, 128 bytes)
            raise OSError(errno.EINVAL, "size 0")
        return real(fd, request, argument)

    monkeypatch.setattr(ioctl, "call", call)
    assert has_in_place_conversion(vm) is True
