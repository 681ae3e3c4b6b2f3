"""/dev/kvm: what it says it can do, and what is said where it is missing."""

import errno
import os
from pathlib import Path

import pytest

from ramblock.kvm import Capability, GuestMemfdFlags, Kvm, KvmVm, MemoryAttributes, VmType
from ramblock.uapi import ioctl
from ramblock.uapi.kvm import KVM_CREATE_VM
from require import require_kvm


def test_missing_device_comes_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="load kvm_intel or kvm_amd") as caught:
        Kvm(tmp_path / "kvm")
    assert caught.value.filename == str(tmp_path / "kvm")


def test_device_that_may_not_be_used_comes_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="join the group"):
        Kvm()


def test_device_that_is_something_else_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.touch()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - counting names
    with pytest.raises(OSError, match="KVM_GET_API_VERSION") as caught:
        Kvm(path)
    assert caught.value.errno == errno.ENOTTY
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208 - counting names


@require_kvm
def test_capabilities(kvm: Kvm) -> None:
    assert kvm.capability(Capability.KVM_CAP_IMMEDIATE_EXIT) == 1
    assert kvm.capability(Capability.KVM_CAP_NR_MEMSLOTS) > 1
    assert VmType.DEFAULT in kvm.vm_types
    private = MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert kvm.memory_attributes in (private, MemoryAttributes(0))
    if kvm.guest_memfd_flags & GuestMemfdFlags.GUEST_MEMFD_FLAG_INIT_SHARED:
        assert kvm.has_guest_memfd
    assert isinstance(kvm.exit_hypercall, int)


@require_kvm
def test_each_type_that_is_offered_can_be_made(kvm: Kvm) -> None:
    for kind in kvm.vm_types:
        with kvm.create_vm(kind) as vm:
            assert vm.type is kind
            if kind is VmType.DEFAULT:
                assert not vm.enforces_attributes
            else:
                assert vm.enforces_attributes
    for kind in set(VmType) - kvm.vm_types:
        with pytest.raises(OSError, match=f"VM of type {kind.name}") as caught:
            kvm.create_vm(kind)
        assert caught.value.errno == errno.EINVAL


@require_kvm
def test_cpuid_names_the_processor(kvm: Kvm) -> None:
    table = kvm.supported_cpuid()
    assert 0 < table.header.nent <= len(table.entries)
    names = [entry for entry in table.entries[: table.header.nent] if entry.function == 0]
    assert len(names) == 1
    assert names[0].eax > 0


@require_kvm
def test_vm_outlives_the_device(vm: KvmVm, kvm: Kvm) -> None:
    kvm.close()
    kvm.close()
    assert vm.capability(Capability.KVM_CAP_NR_MEMSLOTS) > 1


@require_kvm
def test_vm_is_made_although_a_signal_came(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ioctl.call
    interrupts = [KVM_CREATE_VM, KVM_CREATE_VM]

    def call(fd: int, request: int, argument: int = 0) -> int:
        if request in interrupts:
            interrupts.remove(request)
            raise InterruptedError(errno.EINTR, "a signal")
        return real(fd, request, argument)

    monkeypatch.setattr(ioctl, "call", call)
    with kvm.create_vm() as vm:
        assert not interrupts
        assert repr(vm) == "<KvmVm DEFAULT: 0 vCPUs>"
    assert repr(vm) == "<KvmVm DEFAULT: closed>"


@require_kvm
def test_kernel_with_another_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "call", lambda *_: 13)
    with pytest.raises(OSError, match="speaks version 13 of KVM's API, not 12"):
        Kvm()
