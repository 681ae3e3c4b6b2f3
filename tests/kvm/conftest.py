"""A VM of the real kernel, for tests behind ``require_kvm``."""

from collections.abc import Iterator

import pytest

from ramblock.kvm import Kvm, KvmVm


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[KvmVm]:
    with kvm.create_vm() as vm:
        yield vm
