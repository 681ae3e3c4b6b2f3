# SPDX-License-Identifier: Apache-2.0
"""
QEMU's messages about DMA mappings: type1, iommufd, vfio-user and vDPA.

The texts are those of the binaries of QEMU 7.2, 10.0.13 and 11.1.3, where no other version is
named. The same errno is told by several functions of QEMU, each with a line of its own, so cause
and remedy are written for the errno.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from ramblock.dma.kernel_errors import meaning
from ramblock.trace.messages.entry import HEX, Entry

__all__ = ["ENTRIES"]

_LISTENER = "QEMU: hw/vfio/listener.c (older: hw/vfio/common.c)"
_LEGACY = "QEMU: hw/vfio/container-legacy.c (older: hw/vfio/container.c, common.c)"
_IOMMUFD = "QEMU: backends/iommufd.c, iommufd_backend_map_dma()"
_VERSIONS = "QEMU 7.2 to 11.1"
#: Object, address and size, and the rest up to -errno.
_CALL = rf" ?\([^,()\n]{{0,40}}, {HEX}, {HEX}[^()\n]{{0,80}}\) = -"


class _Refusal(NamedTuple):
    """A reason of the kernel's to refuse a mapping."""

    errno: int
    name: str
    cause: str
    remedy: str
    reports: tuple[str, ...]

    @property
    def explained(self) -> str:
        return f"{meaning('VFIO_IOMMU_MAP_DMA', self.errno)}: {self.cause}"


_REFUSALS = (
    _Refusal(
        errno.ENOSPC,
        "no-entries",
        "type1 allows 65,535 by default, and QEMU maps the shared pages of a confidential guest one"
        " by one, so 256 MiB of them use all",
        "use iommufd, which has no such limit (-object iommufd and iommufd= at the device; kata: a"
        " device node /dev/vfio/devices/vfioN); or load vfio_iommu_type1 with a larger"
        " dma_entry_limit. `ramblock plan` says how many a guest needs",
        ("kata-containers/kata-containers#11721", "NVIDIA/nvtrust#46", "aleph-im/aleph-vm#1271"),
    ),
    _Refusal(
        errno.ENOMEM,
        "no-memory",
        "nearly always the limit of locked memory: all of an ordinary guest's RAM is pinned, and"
        " with a virtual IOMMU once for each device",
        "raise the limit of the process (LimitMEMLOCK=, ulimit -l; libvirt: <hard_limit> in"
        " <memtune>) or give it CAP_IPC_LOCK; if dmesg says nothing of RLIMIT_MEMLOCK, the host or"
        " the control group has no memory left",
        ("kubevirt/kubevirt#14593", "kubevirt/kubevirt#17805", "kubevirt/kubevirt#18915"),
    ),
    _Refusal(
        errno.EFAULT,
        "bad-address",
        "if the range is a PCI BAR, iommufd cannot pin it as memory; otherwise the backing of the"
        " guest's memory is gone or is read-only",
        "for a BAR: nothing, if no device has to reach another's BAR; the guest runs without that"
        " (peer-to-peer). Where it is needed: legacy VFIO, or a VMM that maps BARs as dma-bufs, on"
        " Linux 6.19 or newer; Cloud Hypervisor without it: vfio_p2p_dma=off",
        ("kata-containers/kata-containers#12289", "cloud-hypervisor/cloud-hypervisor#8895"),
    ),
    _Refusal(
        errno.EEXIST,
        "exists",
        "two regions of the guest, often BARs of two devices, have the same guest address for a"
        " moment, or an earlier unmap failed and was passed over",
        "look for a failed unmap above it in the log; if there is none, give the VMM and its"
        " firmware a larger window for 64-bit BARs, and report the range",
        ("kata-containers/kata-containers#10582",),
    ),
    _Refusal(
        errno.EINVAL,
        "invalid",
        "often a BAR or RAM above the width of the IOMMU (39 or 48 bits), in the MSI window"
        " (0xfee00000), or in AMD's hole below 1 TiB (0xfd00000000 to 0xffffffffff)",
        "compare the range of the line with /sys/kernel/iommu_groups/N/reserved_regions; make the"
        " guest's physical addresses narrower (-cpu host,host-phys-bits-limit=39, for example), so"
        " that firmware places BARs lower",
        ("cloud-hypervisor/cloud-hypervisor#8896", "cloud-hypervisor/cloud-hypervisor#7030"),
    ),
)
_OTHER_REMEDY = (
    "look the errno up in the table of docs/explain.rst; the lines around it say which device and"
    " which range"
)


def _calls() -> list[Entry]:
    """Return the line with the call and its errno, which QEMU's listener writes."""
    named = "|".join(str(refusal.errno) for refusal in _REFUSALS)
    entries = [
        Entry(
            f"qemu-map-{refusal.name}",
            "_dma_map",
            rf"vfio\w{{0,24}}_dma_map{_CALL}{refusal.errno}(?!\d)",
            "a range of the guest's address space was not mapped for a device",
            refusal.explained,
            _VERSIONS,
            refusal.remedy,
            _LISTENER,
            refusal.reports,
            about="map",
            place="range",
        )
        for refusal in _REFUSALS
    ]
    entries.append(
        Entry(
            "qemu-map-refused",
            "_dma_map",
            rf"vfio\w{{0,24}}_dma_map{_CALL}(?!(?:{named})(?!\d))\d{{1,9}}",
            "a range of the guest's address space was not mapped for a device",
            "the errno at its end says why; -2 is often what was left of an earlier failure",
            _VERSIONS,
            _OTHER_REMEDY,
            _LISTENER,
            about="map",
            place="range",
        )
    )
    return entries


def _type1() -> list[Entry]:
    """Return the line of type1's own map function, which comes before the call's."""
    entries = []
    for refusal in _REFUSALS:
        text = os.strerror(refusal.errno)
        entries.append(
            Entry(
                f"type1-map-{refusal.name}",
                "MAP_DMA",
                rf"VFIO_(?:IOMMU_)?MAP_DMA(?: failed: {text}|: -{refusal.errno}(?!\d))",
                "type1 (legacy VFIO) refused a mapping",
                refusal.explained,
                f"{_VERSIONS}; with the bare errno (VFIO_MAP_DMA: -{refusal.errno}) in old ones",
                refusal.remedy,
                _LEGACY,
                refusal.reports,
                about="map",
            )
        )
    texts = "|".join(os.strerror(refusal.errno) for refusal in _REFUSALS)
    entries.append(
        Entry(
            "type1-map-refused",
            "MAP_DMA",
            rf"VFIO_(?:IOMMU_)?MAP_DMA failed(?!: (?:{texts}))",
            "type1 (legacy VFIO) refused a mapping",
            "the errno behind it says why",
            _VERSIONS,
            _OTHER_REMEDY,
            _LEGACY,
            about="map",
        )
    )
    return entries


_BAR = next(refusal for refusal in _REFUSALS if refusal.errno == errno.EFAULT)
_MEMORY = next(refusal for refusal in _REFUSALS if refusal.errno == errno.ENOMEM)

ENTRIES = (
    *_calls(),
    *_type1(),
    Entry(
        "iommufd-map-bar",
        "IOMMU_IOAS_MAP",
        r"IOMMU_IOAS_MAP(?:_FILE)? failed: Bad address",
        "iommufd did not map a range, most likely a PCI BAR",
        _BAR.explained,
        "QEMU 10.0 to 11.1",
        _BAR.remedy,
        _IOMMUFD,
        _BAR.reports,
        about="map",
    ),
    Entry(
        "iommufd-map-no-memory",
        "IOMMU_IOAS_MAP",
        r"IOMMU_IOAS_MAP(?:_FILE)? failed: Cannot allocate memory",
        "iommufd refused a mapping",
        f"{_MEMORY.explained}; iommufd counts by user, not by process",
        "QEMU before 10.0; later ones write the line of the call only",
        _MEMORY.remedy,
        _IOMMUFD,
        ("NVIDIA/NV-Kernels#248",),
        about="map",
    ),
    Entry(
        "iommufd-map-refused",
        "IOMMU_IOAS_MAP",
        r"IOMMU_IOAS_MAP(?:_FILE)? failed(?!: (?:Bad address|Cannot allocate memory))",
        "iommufd refused a mapping",
        "the errno behind it says why",
        "QEMU before 10.0; later ones write it for bad addresses only",
        _OTHER_REMEDY,
        _IOMMUFD,
        about="map",
    ),
    Entry(
        "vdpa-map-refused",
        "vhost_vdpa_dma_map",
        rf"vhost_vdpa_dma_map{_CALL}\d{{1,9}}",
        "a range of the guest's address space was not mapped for a vDPA device",
        "with -28: vhost_vdpa keeps 2,048 mappings by default, 8 MiB of 4 KiB pages",
        "QEMU 10.0 to 11.1",
        "load vhost_vdpa with a larger max_iotlb_entries",
        "QEMU: hw/virtio/vhost-vdpa.c; Linux: drivers/vhost/vdpa.c",
        about="map",
        place="range",
    ),
    Entry(
        "qemu-unmap-refused",
        "_dma_unmap",
        rf"v(?:fio|host)\w{{0,24}}_dma_unmap{_CALL}\d{{1,9}}",
        "a range was not unmapped: the device keeps its access to what was mapped there",
        "-22 of type1: the range would cut a mapping; -2 of iommufd or a vfio-user server: it does"
        " not name whole mappings",
        _VERSIONS,
        "treat the memory there as reachable by the device: stop the guest. `ramblock check` on a"
        " trace says which mappings stayed",
        f"{_LISTENER}; hw/virtio/vhost-vdpa.c",
        about="unmap",
        place="range",
    ),
    Entry(
        "qemu-discard-unmap-failed",
        "_dma_unmap() failed",
        r"vfio\w{0,24}_dma_unmap\(\) failed",
        "pages became private or were unplugged, and their mapping stays: the device still reaches"
        " them",
        "the target refused the unmap, and QEMU cannot hand that on: its function returns nothing",
        _VERSIONS,
        "treat the memory as reachable by the device: stop the guest. A vfio-user server that wants"
        " exact unmaps does this for each run of pages; use one that takes runs of whole mappings",
        f"{_LISTENER}, vfio_ram_discard_notify_discard()",
        ("nutanix/libvfio-user#504",),
        about="unmap",
    ),
    Entry(
        "type1-unmap-refused",
        "UNMAP_DMA",
        r"VFIO_(?:IOMMU_)?UNMAP_DMA (?:failed|with DIRTY_BITMAP ?:)",
        "type1 refused an unmap, and what was mapped stays",
        f"Invalid argument: {meaning('VFIO_IOMMU_UNMAP_DMA', errno.EINVAL)}",
        _VERSIONS,
        "treat the memory as reachable by the device: stop the guest",
        _LEGACY,
        about="unmap",
    ),
    Entry(
        "iommufd-unmap-refused",
        "IOMMU_IOAS_UNMAP",
        r"IOMMU_IOAS_UNMAP failed",
        "iommufd refused an unmap, and what was mapped stays",
        f"No such file: {meaning('IOMMU_IOAS_UNMAP', errno.ENOENT)}; busy:"
        f" {meaning('IOMMU_IOAS_UNMAP', errno.EBUSY)}",
        "QEMU before 10.0",
        "treat the memory as reachable by the device: stop the guest",
        "QEMU: backends/iommufd.c, iommufd_backend_unmap_dma()",
        about="unmap",
    ),
    Entry(
        "vfio-user-refused",
        "error reply on async",
        r"vfio_user_\w{1,24}:? (?:- )?error reply on async",
        "a vfio-user server refused a map or an unmap, and QEMU went on as if it had not",
        "the request was sent without waiting for its reply; the server's log says why",
        "QEMU 11.1, not 10.0",
        "look into the server's log: most have a limit of regions, or want unmaps that match maps",
        "QEMU: hw/vfio-user/proxy.c",
        ("nutanix/libvfio-user#588",),
        about="call",
    ),
    Entry(
        "qemu-few-mappings",
        "DMA mappings",
        r"possibly running out of DMA mappings",
        "nothing yet: the device's limit of mappings may not hold for all pages of the guest",
        "the memory that may come and go, in its smallest pieces, is more than the container's"
        " limit; of a confidential guest that is each page of 4 KiB, so the warning comes above"
        " 256 MiB with type1",
        _VERSIONS,
        "expect `VFIO_MAP_DMA failed: No space left on device` with type1; use iommufd",
        "QEMU: hw/vfio/listener.c, vfio_ram_discard_register_listener() (older: hw/vfio/common.c)",
        ("kata-containers/kata-containers#11721", "NVIDIA/nvtrust#46"),
        about="device",
        evidence=False,
    ),
    Entry(
        "qemu-listener-refused",
        "RAM discard listener",
        r"Failed to (?:notify|register|unregister) RAM discard listener",
        "a listener refused pages that became shared, so a device does not reach them",
        "a mapping was refused; its own line stands above",
        "QEMU 10.1 and 10.2",
        "see the line above it",
        "QEMU: system/ram-block-attributes.c",
        about="map",
    ),
)
