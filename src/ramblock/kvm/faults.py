# SPDX-License-Identifier: Apache-2.0
"""
Memory faults: which of them are a wish to convert, and when a guest makes no progress.

KVM leaves the guard against the same fault for ever to its user (Documentation/virt/kvm/api.rst,
8.44).
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from threading import Lock

from ramblock.discard.attributes import PageState
from ramblock.errors import RamblockError, describe_range
from ramblock.kvm.exits import EHWPOISON, MemoryFaultExit
from ramblock.uapi.kvm import MemoryFaultFlags

__all__ = ["FaultGuard", "StuckGuestError", "StuckReason", "wanted_state"]

_PRIVATE = int(MemoryFaultFlags.KVM_MEMORY_EXIT_FLAG_PRIVATE)


class StuckReason(Enum):
    """Why a vCPU cannot go on."""

    BROKEN_MEMORY = "the memory behind it is broken"
    UNKNOWN_ERRNO = "the errno of the fault has no meaning here"
    UNKNOWN_FLAGS = "the fault has flags that are not known"
    NO_PROGRESS = "the same fault again, and nothing has changed since"


class StuckGuestError(RamblockError):
    """
    A memory fault that cannot be resolved: running the vCPU again would bring it again.

    Other vCPUs can go on.

    :ivar gpa: Start of the range of the fault, in guest physical bytes.
    :ivar size: Its size in bytes.
    :ivar flags: The flags of the fault.
    :ivar errno: The errno that came with it.
    :ivar vcpu: The vCPU.
    :ivar reason: Why it cannot be resolved. With ``NO_PROGRESS``, the refusal of the conversion is
        chained, where there was one.
    """

    def __init__(self, fault: MemoryFaultExit, *, vcpu: int, reason: StuckReason) -> None:
        super().__init__(
            f"vCPU {vcpu}: memory fault at {describe_range(fault.gpa, fault.size)},"
            f" flags {fault.flags:#x}, "
            f"{os.strerror(fault.errno)}: {reason.value}"
        )
        self.gpa = fault.gpa
        self.size = fault.size
        self.flags = fault.flags
        self.errno = fault.errno
        self.vcpu = vcpu
        self.reason = reason


def wanted_state(fault: MemoryFaultExit, *, vcpu: int) -> PageState:
    """
    Return the state that a fault asks for: the kind of the access.

    :raises StuckGuestError: It asks for nothing that is known: EHWPOISON, or unknown flags.
    """
    if fault.errno == EHWPOISON:
        raise StuckGuestError(fault, vcpu=vcpu, reason=StuckReason.BROKEN_MEMORY)
    if fault.errno != errno.EFAULT:
        raise StuckGuestError(fault, vcpu=vcpu, reason=StuckReason.UNKNOWN_ERRNO)
    if fault.flags & ~_PRIVATE:
        raise StuckGuestError(fault, vcpu=vcpu, reason=StuckReason.UNKNOWN_FLAGS)
    return PageState.PRIVATE if fault.flags & _PRIVATE else PageState.SHARED


class FaultGuard:
    """
    Notices a vCPU that faults for ever: twice in the same way, with no change in between.

    A conversion on another vCPU counts as a change, for it can bring the fault about again without
    anybody being stuck: two vCPUs that touch one page at once fault both, and only the first answer
    changes something.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._changes = 0
        # By vCPU: its last fault, and how many changes there had been when it was answered.
        self._last: dict[int, tuple[MemoryFaultExit, int]] = {}

    def note_change(self) -> None:
        """Note that a conversion changed something."""
        with self._lock:
            self._changes += 1

    def is_stuck(self, fault: MemoryFaultExit, vcpu: int) -> bool:
        """
        Note that *fault* was answered.

        Tell whether it is the one before, with nothing changed since, this answer included.
        """
        with self._lock:
            seen = fault, self._changes
            stuck = self._last.get(vcpu) == seen
            self._last[vcpu] = seen
        return stuck
