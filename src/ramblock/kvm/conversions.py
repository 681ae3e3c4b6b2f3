# SPDX-License-Identifier: Apache-2.0
"""
A guest's requests to its memory, and their answers.

=============================================  ======================  ==================
event                                          the guest is told       change
=============================================  ======================  ==================
converted, or was so already                   0                       the pages
to shared, and there is only a hole or MMIO    0                       nothing
unaligned, empty, past 2**64, reserved bits    EINVAL                  nothing
a hole or MMIO in part, or to private          EINVAL                  nothing
RAM that has no private side                   EINVAL                  nothing
over the mapping budget                        EINVAL                  nothing
a step failed and everything was put back      EINVAL                  nothing
pages are pinned (in-place conversion)         EAGAIN                  nothing
poisoned                                       the vCPU stops          see ``in_doubt()``
=============================================  ======================  ==================

Firmware makes MMIO windows shared on purpose, so that accesses to them come out of the guest, and
QEMU says 0 to that (kvm_convert_memory(), accel/kvm/kvm-all.c). QEMU looks at the first region in
the range only: of a range that is RAM in part it sets the attributes of all, then refuses the part
beyond the one block, and the VM stops. Here such a range is refused whole: a guest that does not
know where its RAM ends has made a mistake, and doing half of its request would hide it.
"""

from __future__ import annotations

import errno
import logging

from ramblock.discard.attributes import PageState
from ramblock.errors import (
    ConversionError,
    MappingLimitError,
    PoisonedError,
    RamblockError,
    UsageError,
    describe_range,
)
from ramblock.guest.memory import GuestMemory
from ramblock.kvm.exits import HypercallExit, MemoryFaultExit
from ramblock.kvm.faults import FaultGuard, StuckGuestError, StuckReason, wanted_state
from ramblock.kvm.hypercall import HypercallResult, MapGpaRange
from ramblock.logs import Sparingly
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_range

__all__ = ["GuestConversions"]

_log = logging.getLogger(__name__)


class GuestConversions:
    """
    Answers the requests of one guest.

    No request of a guest raises, unless it has to stop a vCPU.

    The work and the memory of a request are bounded by the range that it names, and over holes by
    the number of sections. Any thread may call; conversions take the memory's lock one after the
    other.

    :param memory: The guest's.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._guard = FaultGuard()
        # Apart, so that a guest that sends nonsense does not silence the rest.
        self._log_nonsense = Sparingly(_log)
        self._log_refusal = Sparingly(_log)

    def answer(self, call: HypercallExit) -> HypercallResult:
        """
        Carry out a hypercall.

        :return: For :meth:`Vcpu.set_hypercall_result`.
        :raises PoisonedError: The memory is poisoned, or became so: the vCPU must not go on.
        :raises KeyboardInterrupt: It waited until the conversion was done, or put back. The call is
            not answered: :meth:`answer` it again (a conversion that is done changes nothing the
            second time), or the guest is told EINVAL.
        """
        try:
            request = MapGpaRange.decode(call)
        except UsageError as error:
            self._log_nonsense("hypercall refused: %s", error)
            return HypercallResult.EINVAL
        return self.request(request.gpa, request.size, request.to)

    def request(self, gpa: int, size: int, to: PageState) -> HypercallResult:
        """
        Carry out a request, however the guest asked; raises like :meth:`answer`.

        :param gpa: Any number.
        :param size: In bytes; any number.
        """
        return self._convert(gpa, size, to)[0]

    def memory_fault(self, fault: MemoryFaultExit, vcpu: int = 0) -> None:
        """
        Resolve a memory fault by an implicit conversion to the kind of the access.

        Then the vCPU can run again.

        A conversion that is refused is tried once more when the fault comes again: pages that were
        pinned may not be.

        :param vcpu: Which one faulted; progress is watched for each.
        :raises StuckGuestError: It cannot be resolved; nothing has changed.
        :raises PoisonedError: As for :meth:`answer`.
        :raises KeyboardInterrupt: As for :meth:`answer`; the vCPU can run again, and faults again
            if it has to.
        """
        to = wanted_state(fault, vcpu=vcpu)
        refusal = self._convert(fault.gpa, fault.size, to)[1]
        if self._guard.is_stuck(fault, vcpu):
            raise StuckGuestError(fault, vcpu=vcpu, reason=StuckReason.NO_PROGRESS) from refusal

    def _convert(
        self, gpa: int, size: int, to: PageState
    ) -> tuple[HypercallResult, RamblockError | None]:
        try:
            result = self._memory.convert(gpa, size, to)
        except PoisonedError:
            raise
        except UsageError as error:
            if to is PageState.SHARED and self._is_hole(gpa, size):
                return HypercallResult.DONE, None
            return self._refuse(HypercallResult.EINVAL, gpa, size, to, error)
        except (ConversionError, MappingLimitError) as error:
            answer = HypercallResult.EAGAIN if _is_pinned(error) else HypercallResult.EINVAL
            return self._refuse(answer, gpa, size, to, error)
        if result.changed_bytes:
            self._guard.note_change()
        return HypercallResult.DONE, None

    def _refuse(
        self, answer: HypercallResult, gpa: int, size: int, to: PageState, error: RamblockError
    ) -> tuple[HypercallResult, RamblockError]:
        self._log_refusal(
            "conversion of %s to %s refused with %s: %s",
            describe_range(gpa, size),
            to.value,
            answer.name,
            error,
        )
        return answer, error

    def _is_hole(self, gpa: int, size: int) -> bool:
        """Whether it is a proper range with no RAM in it."""
        try:
            check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="conversion")
        except UsageError:
            return False
        return not any(
            section.gpa < gpa + size and gpa < section.gpa_end for section in self._memory.sections
        )


def _is_pinned(error: BaseException) -> bool:
    """Whether an attribute step failed because somebody still uses the pages."""
    cause = error.__cause__
    return (
        isinstance(error, ConversionError)
        and error.step == "attribute"
        and isinstance(cause, OSError)
        and cause.errno == errno.EAGAIN
    )
