# SPDX-License-Identifier: Apache-2.0
"""
KVM_HC_MAP_GPA_RANGE, taken apart by field (Documentation/virt/kvm/x86/hypercalls.rst, 9).

The third argument is a word of fields, and its lowest bit is a hint about page sizes: testing the
word as if it were a flag converts in the wrong direction.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum

from ramblock.discard.attributes import PageState
from ramblock.errors import UsageError
from ramblock.kvm.exits import HypercallExit
from ramblock.uapi.kvm_para import KVM_HC_MAP_GPA_RANGE, MapGpaRangeBits
from ramblock.units import GIB, KIB, MIB

__all__ = ["HypercallResult", "MapGpaRange"]

# With any page size of the host.
_UNIT = 4 * KIB
_PAGE_SIZE_FIELD = 0xF
_PAGE_SIZES = {
    0: 4 * KIB,
    int(MapGpaRangeBits.KVM_MAP_GPA_RANGE_PAGE_SZ_2M): 2 * MIB,
    int(MapGpaRangeBits.KVM_MAP_GPA_RANGE_PAGE_SZ_1G): GIB,
}
_ENCRYPTED = int(MapGpaRangeBits.KVM_MAP_GPA_RANGE_ENCRYPTED)
_RESERVED = ~(_PAGE_SIZE_FIELD | _ENCRYPTED)


class HypercallResult(IntEnum):
    """
    Answers to a guest.

    With anything else the next KVM_RUN can fail (kvm_is_valid_map_gpa_range_ret()).

    The numbers are positive, unlike those of KVM's own refusals.
    """

    DONE = 0
    EINVAL = errno.EINVAL
    """Refused, and asking again will not help."""
    EAGAIN = errno.EAGAIN
    """Not now: the guest may ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapGpaRange:
    """
    The guest's request.

    Nothing is known about the range: it may go past 2**64, and be empty or unaligned.
    """

    gpa: int
    size: int
    """In bytes."""
    to: PageState
    page_size_hint: int | None
    """
    The page size that the guest would like, in bytes; None: one that has no meaning yet.

    A hint: ignoring it is fine.
    """

    @classmethod
    def decode(cls, call: HypercallExit) -> MapGpaRange:
        """
        Take the arguments apart.

        :raises UsageError: Another hypercall, or reserved bits of the attribute word are set.
        """
        if call.nr != KVM_HC_MAP_GPA_RANGE:
            raise UsageError(
                f"hypercall {call.nr:#x} is not known",
                value=call.nr,
                expected=f"KVM_HC_MAP_GPA_RANGE, {KVM_HC_MAP_GPA_RANGE:#x}",
            )
        gpa, pages, word = call.args[:3]
        if word & _RESERVED:
            raise UsageError(
                f"attribute word {word:#x} of KVM_HC_MAP_GPA_RANGE has reserved bits",
                value=word,
                expected="bits 0 to 4",
            )
        return cls(
            gpa=gpa,
            size=pages * _UNIT,
            to=PageState.PRIVATE if word & _ENCRYPTED else PageState.SHARED,
            page_size_hint=_PAGE_SIZES.get(word & _PAGE_SIZE_FIELD),
        )
