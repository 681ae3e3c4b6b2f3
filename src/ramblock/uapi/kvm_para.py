# SPDX-License-Identifier: Apache-2.0
"""
Hypercalls of a guest to KVM (include/uapi/linux/kvm_para.h, and asm/kvm_para.h of x86).

The fields of the attribute word are in Documentation/virt/kvm/x86/hypercalls.rst,
KVM_HC_MAP_GPA_RANGE.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

HEADER: Final = "linux/kvm_para.h"

KVM_HC_MAP_GPA_RANGE: Final = 12


class MapGpaRangeBits(IntFlag):
    """The third argument of KVM_HC_MAP_GPA_RANGE."""

    KVM_MAP_GPA_RANGE_PAGE_SZ_2M = 1 << 0
    KVM_MAP_GPA_RANGE_PAGE_SZ_1G = 1 << 1
    KVM_MAP_GPA_RANGE_ENCRYPTED = 1 << 4
