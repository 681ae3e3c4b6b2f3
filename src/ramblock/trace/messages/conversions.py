# SPDX-License-Identifier: Apache-2.0
"""
QEMU's messages about conversions, memory slots and memory that is given back.

The texts are those of the binaries of QEMU 7.2, 10.0.13 and 11.1.3.
"""

from __future__ import annotations

from ramblock.trace.messages.entry import HEX, Entry

__all__ = ["ENTRIES"]

_KVM = "QEMU: accel/kvm/kvm-all.c"
_PART = rf"\({HEX} ?,? ?\+ ?{HEX}\)"
_ALL = "QEMU 7.2 to 11.1"
_STOP = "stop the guest: KVM and the devices disagree about these pages, and nothing puts it right"

ENTRIES = (
    Entry(
        "conversion-not-told",
        "the state change of",
        rf"Failed to notify the listener the state change of {_PART} to (?:private|shared)",
        "a conversion failed half-way: KVM has changed, devices have not",
        "a mapping or an unmap was refused; its own line stands above",
        "QEMU 11.1, not 10.0",
        _STOP + ". Then cure the refusal above it",
        f"{_KVM}, kvm_convert_memory()",
        about="conversion",
        place="range",
    ),
    Entry(
        "conversion-two-regions",
        "invalid range: offset",
        rf"ram_block_attributes_\w{{1,40}}, invalid range: offset {HEX}, size {HEX}",
        "a conversion over two regions failed: KVM has changed, devices have not",
        "the guest converted across the end of a memory region (as at 0xc0000, or between"
        " two memory backends), and QEMU looks up the first region only",
        "QEMU 11.1, not 10.0",
        _STOP + ". A guest kernel and firmware that convert each range by itself avoid it",
        "QEMU: system/ram-block-attributes.c",
        about="conversion",
        place="offset",
    ),
    Entry(
        "conversion-no-private-side",
        "non guest_memfd",
        rf"Convert non guest_memfd backed memory region {_PART} to (?:private|shared)",
        "a conversion of memory without a private side was refused",
        "the guest asked for it in a place that has no guest_memfd: a device's memory, a ROM, a"
        " shared backend",
        "QEMU 10.0 to 11.1",
        "nothing, if the guest runs on; otherwise its firmware or kernel is at fault",
        f"{_KVM}, kvm_convert_memory()",
        about="conversion",
        place="range",
    ),
    Entry(
        "attribute-refused",
        "failed to set memory (",
        rf"failed to set memory {_PART} with attr",
        "KVM refused the attribute of a range: the conversion did not begin",
        "the kernel has no attribute of this kind for this VM, or has no memory",
        "QEMU 10.0 to 11.1",
        "check that the kernel has KVM_CAP_MEMORY_ATTRIBUTES for this type of VM:"
        " `ramblock doctor --for kvm`",
        f"{_KVM}, kvm_set_memory_attributes()",
        about="conversion",
        place="range",
    ),
    Entry(
        "slot-attribute-refused",
        "memory attribute private",
        r"failed to set memory attribute private",
        "a memory slot of a confidential guest could not be made private",
        "the kernel refused the attribute of a whole slot, so the guest does not start",
        "QEMU 10.0 to 11.1",
        "check that the kernel has KVM_CAP_MEMORY_ATTRIBUTES for this type of VM:"
        " `ramblock doctor --for kvm`",
        f"{_KVM}, kvm_set_phys_mem()",
    ),
    Entry(
        "map-gpa-not-enabled",
        "KVM_HC_MAP_GPA_RANGE",
        r"KVM_HC_MAP_GPA_RANGE not enabled for guest",
        "a conversion that the guest asked for was not done",
        "the guest made the hypercall for it, and QEMU has not switched it on for this type of"
        " guest",
        "QEMU 11.1, not 10.0",
        "start the guest as what it is (confidential-guest-support=), or take a guest image without"
        " that call",
        "QEMU: target/i386/kvm/kvm.c",
    ),
    Entry(
        "discard-failed",
        "Failed to discard",
        r"Failed to discard (?:range|RAM range) ",
        "memory could not be given back to the host",
        "the backing does not allow holes (read-only file, sealed memfd, huge pages that are cut)",
        _ALL,
        "the guest runs on and costs memory twice; use a memfd backend with share=on, and"
        " conversions of whole huge pages with hugetlb",
        "QEMU: system/physmem.c, ram_block_discard_range()",
        about="discard",
    ),
    Entry(
        "slot-refused",
        "KVM_SET_USER_MEMORY_REGION",
        rf"KVM_SET_USER_MEMORY_REGION2? failed, slot=\d{{1,10}}, start={HEX}, size={HEX}",
        "KVM refused a place of memory: the guest cannot reach it",
        "Invalid argument: not aligned, above the guest's or the host's address width, or no"
        " guest_memfd for this VM; File exists: it overlaps another slot",
        _ALL,
        "compare the range with the width of the host's addresses (-cpu host,host-phys-bits=on,"
        " or host-phys-bits-limit=); a BAR far above RAM is the usual one",
        f"{_KVM}, kvm_set_user_memory_region()",
        about="slot",
        place="range",
    ),
    Entry(
        "slot-not-registered",
        "registering slot",
        r"kvm_set_phys_mem: error (?:un)?registering slot",
        "KVM refused a place of memory",
        "the line before it has the range and the errno",
        _ALL,
        "see the line before it",
        f"{_KVM}, kvm_set_phys_mem()",
        about="slot",
    ),
    Entry(
        "slots-all-used",
        "free slot available",
        r"kvm_\w{1,24}: no free slot available",
        "QEMU ends: KVM has no memory slot left",
        "each region of RAM and each BAR takes a slot, a region that is written to in part several",
        _ALL,
        "fewer memory backends and devices; a virtio-mem device with fewer memory slots"
        " (dynamic-memslots=off)",
        f"{_KVM}, kvm_get_free_slot()",
    ),
    Entry(
        "slots-none-for-device",
        "memory slots left",
        r"hypervisor has (?:no|not enough) free memory slots left",
        "a memory device could not be plugged",
        "KVM has fewer slots left than the device may use",
        "QEMU 7.2 (no), 10.0 to 11.1 (not enough)",
        "fewer memory devices, or virtio-mem with dynamic-memslots=off",
        "QEMU: hw/mem/memory-device.c",
    ),
    Entry(
        "slots-none-for-vhost",
        "memory slots left",
        r"a used vhost backend has (?:no|not enough) free memory slots left",
        "a memory device could not be plugged",
        "a vhost device of the guest takes fewer regions of memory than KVM does (vhost-user often"
        " 8 or 32)",
        "QEMU 7.2 (no), 10.0 to 11.1 (not enough)",
        "load vhost with a larger max_mem_regions; take a vhost-user server that takes more; or"
        " fewer memory devices",
        "QEMU: hw/mem/memory-device.c",
    ),
)
