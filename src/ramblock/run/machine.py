# SPDX-License-Identifier: Apache-2.0
"""KVM's part of a run: its VM, the private side of the blocks, and the guest program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from ramblock.errors import UsageError
from ramblock.guest_program import GuestProgram, choose_call
from ramblock.kvm import Kvm, MemoryAttributes, VmType
from ramblock.run.layout import BlockPlace, first_free
from ramblock.run.report import GuestFacts
from ramblock.run.watched import Watch, WatchedStandIn, WatchedVm
from ramblock.run.watched_kvm import WatchedGuestMemfd

__all__ = ["Machine", "enforces_attributes", "open_kvm"]


def open_kvm(kind: str) -> tuple[Kvm | None, str]:
    """
    Open /dev/kvm for a guest of *kind*, ``kvm`` or ``auto``.

    :return: KVM, or None where the guest is to be a script; and why it came so, where that was left
        to us.
    :raises UsageError: ``kvm``, and there is none; the text has a hint.
    """
    try:
        kvm = Kvm()
    except OSError as error:
        if kind == "auto":
            return None, f"{error.filename}: {error.strerror}"
        raise UsageError(
            f"--guest kvm: {error.filename}: {error.strerror}",
            value=kind,
            expected="--guest script",
        ) from error
    if kind == "kvm":
        return kvm, ""
    if enforces_attributes(kvm):
        return kvm, "this KVM enforces page attributes"
    kvm.close()
    return None, "this KVM does not know private pages"


def enforces_attributes(kvm: Kvm) -> bool:
    """Whether a VM can be made whose private pages are private."""
    return (
        VmType.SW_PROTECTED in kvm.vm_types
        and MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE in kvm.memory_attributes
        and kvm.has_guest_memfd
    )


class Machine:
    """
    A VM without memory.

    The run places blocks in it, and starts the guest program when they are there.

    :param kvm: Taken over.
    :param why: Why there is one, for the report.
    :raises OSError: KVM refused; *kvm* is closed.
    """

    def __init__(self, kvm: Kvm, why: str, watch: Watch) -> None:
        with ExitStack() as resources:
            self._kvm = resources.enter_context(kvm)
            self._why = why
            #: Whether the kernel enforces page attributes.
            self.enforced = enforces_attributes(kvm)
            self._vm = resources.enter_context(
                kvm.create_vm(VmType.SW_PROTECTED if self.enforced else VmType.DEFAULT)
            )
            #: For the guest memory.
            self.vm = WatchedVm(watch, self._vm)
            self._watch = watch
            self._call = choose_call(kvm)
            self._resources = resources.pop_all()

    @property
    def facts(self) -> GuestFacts:
        """A description, for the report."""
        return GuestFacts(
            kind="kvm",
            why=self._why,
            call=self._call.value,
            vm_type="software-protected" if self.enforced else "default",
            enforced=self.enforced,
            private="guest_memfd" if self._kvm.has_guest_memfd else "a stand-in",
        )

    def create_private(self, place: BlockPlace) -> WatchedGuestMemfd | WatchedStandIn:
        """Make the private side of a block: a guest_memfd, where there is such a thing."""
        if not self._kvm.has_guest_memfd:
            return WatchedStandIn(place.name, place.size, place.gpa, self._watch)
        return WatchedGuestMemfd(self._vm.create_guest_memfd(place.size), place.gpa, self._watch)

    def start_program(self, places: Sequence[BlockPlace]) -> GuestProgram:
        """
        Start the guest, once all its memory is there; the caller closes it.

        :raises UsageError: A block is out of its reach.
        :raises OSError: KVM refused.
        """
        return GuestProgram(
            self._vm,
            self._kvm.supported_cpuid(),
            base=first_free(places),
            reach=[(place.gpa, place.size) for place in places],
            call=self._call,
        )

    def close(self) -> None:
        """Close the VM, and KVM."""
        self._resources.close()
