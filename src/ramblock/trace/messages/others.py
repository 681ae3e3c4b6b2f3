# SPDX-License-Identifier: Apache-2.0
"""
Messages of kata, libvirt and Cloud Hypervisor.

The texts are those of their sources of August 2026, and of the reports that are named.
"""

from __future__ import annotations

from ramblock.trace.messages.entry import Entry

__all__ = ["ENTRIES"]

_CLH = "Cloud Hypervisor 54 (August 2026)"
_CLH_REMEDY = (
    "the errno at its end says why: 28 all mappings of type1 are used (platform iommufd=on), 12 the"
    " limit of locked memory, 14 a BAR behind iommufd (vfio_p2p_dma=off), 17 and 22 the place of a"
    " BAR"
)
_CLH_REPORTS = (
    "cloud-hypervisor/cloud-hypervisor#8895",
    "cloud-hypervisor/cloud-hypervisor#8896",
)

ENTRIES = (
    Entry(
        "kata-needs-iommufd",
        "ConfidentialGuest needs IOMMUFD",
        r"ConfidentialGuest needs IOMMUFD - cannot use ",
        "kata did not start a confidential guest with a device of legacy VFIO",
        "type1's limit of mappings does not hold for it, so kata refuses before QEMU would",
        "kata since January 2026",
        "a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; then let the CDI file name"
        " /dev/vfio/devices/vfioN and not the group's node (write it anew with its generator)",
        "kata: src/runtime/virtcontainers/qemu.go",
        ("kata-containers/kata-containers#12393",),
    ),
    Entry(
        "kata-qemu-not-launched",
        "failed to launch qemu",
        r"failed to launch qemu: ",
        "kata could not start QEMU",
        "the rest of its line says why, and QEMU's own messages stand near it",
        "kata of August 2026",
        "see the rest of the line; an entry of its own explains it where it is known",
        "kata: src/runtime/virtcontainers/qemu.go",
    ),
    Entry(
        "kata-no-port",
        "hot_plug_vfio= port",
        r"cold_plug_vfio= or hot_plug_vfio= port is not set for device",
        "kata did not take a device",
        "its configuration does not say to which kind of port the device goes",
        "kata of August 2026",
        'cold_plug_vfio = "root-port" in the configuration of the hypervisor; a confidential guest'
        " takes devices at its start only",
        "kata: src/runtime/pkg/device/drivers/vfio.go",
    ),
    Entry(
        "libvirt-memlock",
        "limit locked memory",
        r"cannot limit locked memory of process ",
        "libvirt could not raise the limit of locked memory for QEMU",
        "it may not: it runs without CAP_SYS_RESOURCE, as in a container of an ordinary user",
        "libvirt, in KubeVirt 1.8",
        "raise the limit of libvirt's own process first (KubeVirt: the feature gate Root)",
        "libvirt: src/util/virprocess.c, virProcessSetMaxMemLock()",
        ("kubevirt/kubevirt#17694",),
    ),
    Entry(
        "clh-map-failed",
        "DMA map",
        r"Failed to DMA map(?: VFIO(?: user)? device|: )",
        "Cloud Hypervisor did not map memory or a BAR for a device",
        "the target refused it",
        _CLH,
        _CLH_REMEDY,
        "Cloud Hypervisor: pci/src/vfio.rs, vmm/src/device_manager.rs",
        _CLH_REPORTS,
    ),
    Entry(
        "clh-map-failed-at",
        "host IOMMU address space",
        r"failed to map memory into the host IOMMU address space",
        "Cloud Hypervisor did not map memory for a device",
        "the target refused it; the line has the range",
        _CLH,
        _CLH_REMEDY,
        "Cloud Hypervisor: pci/src/vfio.rs, VfioDmaMapping::map()",
        _CLH_REPORTS,
    ),
    Entry(
        "clh-map-failed-old",
        "IommuDmaMap",
        r"IommuDmaMap\((?:Error\()?\d{1,9}\)",
        "Cloud Hypervisor did not map memory or a BAR for a device",
        "the target refused it",
        "Cloud Hypervisor of 2024, also below kata",
        _CLH_REMEDY,
        "Cloud Hypervisor: vmm/src/device_manager.rs; vfio-ioctls",
        (
            "cloud-hypervisor/cloud-hypervisor#6845",
            "kata-containers/kata-containers#10582",
        ),
    ),
    Entry(
        "clh-unmap-failed",
        "DMA unmap",
        r"Failed to DMA unmap(?: VFIO(?: user)? device|: )",
        "Cloud Hypervisor did not unmap memory: the device keeps its access",
        "the target refused it, or removed less than was asked for",
        _CLH,
        "treat the memory as reachable by the device: stop the guest",
        "Cloud Hypervisor: pci/src/vfio.rs, vmm/src/device_manager.rs",
        ("cloud-hypervisor/cloud-hypervisor#8593",),
    ),
)
