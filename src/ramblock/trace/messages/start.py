# SPDX-License-Identifier: Apache-2.0
"""
QEMU's messages about guests and devices that do not start.

The texts are those of the binaries of QEMU 7.2, 10.0.13 and 11.1.3. They say nothing about
mappings, so the audit of a trace leaves all but one alone.
"""

from __future__ import annotations

import errno

from ramblock.dma.kernel_errors import meaning
from ramblock.trace.messages.entry import Entry

__all__ = ["ENTRIES"]

_ALL = "QEMU 7.2 to 11.1"
_COCO = "QEMU 10.0 to 11.1"
_LEGACY = "QEMU: hw/vfio/container-legacy.c (older: hw/vfio/container.c, common.c)"
_BOUND = (
    "bind each device of the group, except bridges, to vfio-pci"
    " (ls /sys/kernel/iommu_groups/N/devices; driverctl set-override ADDRESS vfio-pci)"
)

ENTRIES = (
    Entry(
        "discarding-broken",
        "discarding of RAM",
        r"Cannot set discarding of RAM broken",
        "a device could not be attached: something else in the guest needs to discard RAM",
        "a confidential guest's guest_memfd (QEMU before 10.1 cannot bring it together with VFIO),"
        " virtio-mem, or a device that discards without telling anybody",
        _ALL,
        "QEMU 10.1 or newer for a confidential guest with VFIO; leave the vDPA device, or"
        " virtio-mem, out",
        "QEMU: hw/vfio/container-legacy.c, iommufd.c; hw/vfio-user; hw/virtio/vhost-vdpa.c",
        ("kubevirt/kubevirt#16407",),
        about="device",
        evidence=False,
    ),
    Entry(
        "discarding-blocked",
        "private guest memory",
        r"cannot set up private guest memory: discard currently blocked",
        "a confidential guest's memory could not be made",
        "a device of the guest forbids that RAM is discarded, and conversions discard",
        _COCO,
        "QEMU 10.1 or newer for VFIO devices; leave vDPA devices out",
        "QEMU: system/physmem.c, ram_block_add()",
    ),
    Entry(
        "discarding-disabled",
        "Discarding RAM is disabled",
        r"Discarding RAM is disabled",
        "virtio-mem could not be made",
        "another device of the guest forbids that RAM is discarded",
        _ALL,
        "leave that device out (vDPA, locked memory with -overcommit mem-lock=on), or virtio-mem",
        "QEMU: hw/virtio/virtio-mem.c, virtio_mem_device_realize()",
    ),
    Entry(
        "discarding-inconsistent",
        "support for discarding",
        r"Inconsistent setting of support for discarding RAM",
        "a second device of an IOMMU group could not be attached",
        "x-balloon-allowed differs between devices of one group",
        _ALL,
        "give the devices the same x-balloon-allowed=",
        "QEMU: hw/vfio/container-legacy.c, vfio_device_get()",
    ),
    Entry(
        "viommu-with-discards",
        "vIOMMUs and coordinated",
        r"Using vfio with vIOMMUs and coordinated discarding of RAM",
        "nothing yet: a warning",
        "behind a virtual IOMMU a guest can have memory pinned that was taken from it, which costs"
        " host memory",
        _ALL,
        "limit the locked memory (RLIMIT_MEMLOCK), or leave the virtual IOMMU or virtio-mem out",
        "QEMU: hw/vfio/listener.c (older: hw/vfio/common.c)",
    ),
    Entry(
        "group-not-viable",
        "is not viable",
        r"(?:group \d{1,10}|VFIO group) is not viable",
        "the device's IOMMU group could not be taken",
        "a device of the group is bound to a driver of the host",
        _ALL,
        _BOUND,
        _LEGACY,
    ),
    Entry(
        "group-without-device",
        "getting device from group",
        r"error getting device from group \d{1,10}",
        "the device could not be had from its IOMMU group",
        f"No such device: {meaning('VFIO_GROUP_GET_DEVICE_FD', errno.ENODEV)}; otherwise it is in"
        " use",
        _ALL,
        _BOUND,
        _LEGACY,
    ),
    Entry(
        "group-missing",
        "no iommu_group found",
        r"no iommu_group found",
        "the device has no IOMMU group",
        "the host's IOMMU is off, in the firmware's settings or for the kernel",
        _ALL,
        "switch VT-d or AMD-Vi on in the firmware; intel_iommu=on for kernels that want it."
        " `ramblock doctor --for vfio` says what is missing",
        "QEMU: hw/vfio/container-legacy.c, vfio_device_get_groupid()",
    ),
    Entry(
        "group-in-two-spaces",
        "multiple address spaces",
        r"group \d{1,10} used in multiple address spaces",
        "a second device of an IOMMU group could not be attached",
        "with a virtual IOMMU each device has an address space of its own, and legacy VFIO has one"
        " for each group",
        "QEMU 7.2 to 11.1",
        "give the guest one device of the group, put both behind one PCIe-to-PCI bridge, or leave"
        " the virtual IOMMU out",
        _LEGACY,
    ),
    Entry(
        "container-not-set-up",
        "setup container for group",
        r"failed to setup container for group \d{1,10}",
        "a device could not be attached with legacy VFIO",
        "the rest of its line says why: the container could not be had, or the first mapping was"
        " refused",
        _ALL,
        "see the rest of the line; an entry of its own explains it where it is known",
        "QEMU: hw/vfio/container-legacy.c, vfio_group_get()",
    ),
    Entry(
        "iommufd-not-bound",
        "error bind device",
        r"error bind device fd=\d{1,10} to iommufd=\d{1,10}",
        "a device could not be bound to iommufd",
        "Operation not permitted: "
        f"{meaning('VFIO_DEVICE_BIND_IOMMUFD', errno.EPERM)}; Invalid argument:"
        f" {meaning('VFIO_DEVICE_BIND_IOMMUFD', errno.EINVAL)}; Device or resource busy:"
        f" {meaning('VFIO_DEVICE_BIND_IOMMUFD', errno.EBUSY)}",
        _COCO,
        "end the process that has the device still (a VMM that hangs after a crash); switch"
        " interrupt remapping on; " + _BOUND,
        "QEMU: hw/vfio/iommufd.c, iommufd_cdev_connect_and_bind()",
        ("kata-containers/kata-containers#13179",),
    ),
    Entry(
        "iommufd-not-attached",
        "error attach ",
        r"\[iommufd=\d{1,10}\] error attach ",
        "a device could not be attached to its address space in iommufd",
        "Address already in use: "
        f"{meaning('VFIO_DEVICE_ATTACH_IOMMUFD_PT', errno.EADDRINUSE)}; Cannot allocate memory:"
        f" {meaning('VFIO_DEVICE_ATTACH_IOMMUFD_PT', errno.ENOMEM)}",
        _COCO,
        "compare /sys/kernel/iommu_groups/N/reserved_regions of the devices; raise the limit of"
        " locked memory",
        "QEMU: hw/vfio/iommufd.c, iommufd_cdev_attach_ioas_hwpt()",
    ),
    Entry(
        "viommu-too-wide",
        "host aw-bits",
        r"aw-bits \d{1,3} > host aw-bits \d{1,3}",
        "a device could not be attached behind the virtual IOMMU",
        "the virtual IOMMU has wider addresses than the host's",
        _COCO,
        "give the virtual IOMMU the host's width, as in -device intel-iommu,aw-bits=39",
        "QEMU: hw/i386/intel_iommu.c, hw/virtio/virtio-iommu.c",
    ),
    Entry(
        "guest-memfd-missing",
        "support guest_memfd",
        r"KVM does not support guest_memfd",
        "a confidential guest could not be made",
        "the host's kernel has no guest_memfd: it came with Linux 6.8, and needs an option",
        _COCO,
        "a kernel with KVM_CAP_GUEST_MEMFD; `ramblock doctor --for kvm` looks for it",
        "QEMU: accel/kvm/kvm-all.c, kvm_create_guest_memfd()",
    ),
    Entry(
        "guest-memfd-refused",
        "creating KVM guest_memfd",
        r"Error creating KVM guest_memfd",
        "a confidential guest's private memory could not be made",
        "the errno behind it says why: no memory, too many open files, or flags that the kernel"
        " does not know",
        _COCO,
        "raise the number of open files, or free memory on the host",
        "QEMU: accel/kvm/kvm-all.c, kvm_create_guest_memfd()",
    ),
    Entry(
        "guest-memfd-no-live-update",
        "not supported with CPR",
        r"Memory region [^\n]{1,200}? uses guest_memfd, which is not supported with CPR",
        "a live update of QEMU (CPR) was refused",
        "the private memory of a confidential guest cannot be handed to another process",
        _COCO,
        "restart the guest instead",
        "QEMU: system/physmem.c",
    ),
    Entry(
        "ram-not-reserved",
        "set up guest memory",
        r"cannot set up guest memory '",
        "the guest's RAM could not be reserved",
        "the host has not that much, by its rules for overcommitting or the control group's limit;"
        " or the size is a mistake",
        _ALL,
        "less memory for the guest; more swap, or vm.overcommit_memory=1",
        "QEMU: system/physmem.c, ram_block_add()",
    ),
    Entry(
        "backing-not-mapped",
        "backing store for guest RAM",
        r"unable to map backing store for guest RAM",
        "the guest's RAM could not be had from its file or its huge pages",
        "Cannot allocate memory: there are fewer free huge pages than the guest's size",
        _ALL,
        "reserve huge pages on the right NUMA nodes (/sys/kernel/mm/hugepages, or hugepages= for"
        " the kernel) before other things take the memory",
        "QEMU: system/physmem.c, file_ram_alloc()",
    ),
    Entry(
        "tdx-call-failed",
        "TDX ioctl",
        r"TDX ioctl \w{1,40} failed",
        "the TDX module refused a step of the guest's start",
        "hw_errors is the module's status: 0xc000... is an operand, 0x8000... is busy",
        "QEMU 11.1, not 10.0",
        "dmesg of the host has the kernel's view; compare the guest's CPU features and memory with"
        " what the module supports",
        "QEMU: target/i386/kvm/tdx.c",
    ),
    Entry(
        "tdx-guest-fatal",
        "TDX guest reports fatal",
        r"TDX guest reports fatal error",
        "the guest ended itself",
        "its firmware or kernel met something that it cannot go on with, and says so to the host;"
        " the text is the guest's own and can be anything",
        "QEMU 11.1, not 10.0",
        "look the text up in the guest's kernel; often memory that was not accepted, or a"
        " conversion that was refused: see the lines above it",
        "QEMU: target/i386/kvm/tdx.c",
    ),
    Entry(
        "snp-launch-refused",
        "SNP_LAUNCH_",
        r"SNP_LAUNCH_(?:START|UPDATE|FINISH) ret=",
        "the AMD secure processor refused a step of the guest's start",
        "fw_error is its status, whose name is in the quotes behind it",
        _COCO,
        "a policy or an ID block that the firmware does not take, or an old firmware: compare with"
        " `snphost ok`, and update the SEV firmware",
        "QEMU: target/i386/sev.c",
    ),
)
