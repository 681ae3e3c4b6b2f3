"""
One message for each entry of the catalogue, as its program writes it.

Those of QEMU are the texts of the binaries of 7.2, 10.0.13 and 11.1.3, those of Linux and edk2 of
their sources, with values put in; where a report has the line, it is the report's.
"""

from ramblock.explain import explain

__all__ = ["SAMPLES", "explained"]

_MAP = "vfio_container_dma_map(0x63eaf1913800, 0x380000000000, 0x1000000, 0x7d0f3e000000)"
_VFIO = "vfio 0000:21:00.0"

SAMPLES: dict[str, str] = {
    # kubevirt #18915, kata-containers #13270, proxmox
    "qemu-map-no-entries": f"{_MAP} = -28 (No space left on device)",
    "qemu-map-no-memory": f"{_MAP} = -12 (Cannot allocate memory)",
    "qemu-map-bad-address": f"{_MAP} = -14 (Bad address)",
    "qemu-map-exists": f"{_MAP} = -17 (File exists)",
    "qemu-map-invalid": f"{_MAP} = -22 (Invalid argument)",
    # kubevirt #14593
    "qemu-map-refused": "Region pc.bios: vfio_container_dma_map (0x5632ad2e1e80, 0xfffc0000,"
    " 0x40000, 0x7fdf48200000) = -2 (No such file or directory)",
    # kata-containers #11721
    "type1-map-no-entries": "VFIO_MAP_DMA failed: No space left on device",
    "type1-map-no-memory": "VFIO_MAP_DMA: -12",
    "type1-map-bad-address": "VFIO_MAP_DMA failed: Bad address",
    "type1-map-exists": "VFIO_MAP_DMA failed: File exists",
    "type1-map-invalid": "VFIO_MAP_DMA failed: Invalid argument",
    "type1-map-refused": "VFIO_MAP_DMA failed: Device or resource busy",
    # kata-containers #12289
    "iommufd-map-bar": "IOMMU_IOAS_MAP failed: Bad address, PCI BAR?",
    "iommufd-map-no-memory": "IOMMU_IOAS_MAP failed: Cannot allocate memory",
    "iommufd-map-refused": "IOMMU_IOAS_MAP failed: File exists",
    "vdpa-map-refused": "vhost_vdpa_dma_map(0x5, 0x1000, 0x1000, 0x7f0) = -28 (No space left on"
    " device)",
    "qemu-unmap-refused": "vfio_container_dma_unmap(0x55d0, 0x1000, 0x1000) = -22 (Invalid"
    " argument)",
    "qemu-discard-unmap-failed": "vfio_ram_discard_notify_discard: vfio_container_dma_unmap()"
    " failed: No such file or directory",
    "type1-unmap-refused": "VFIO_UNMAP_DMA failed: Invalid argument",
    "iommufd-unmap-refused": "IOMMU_IOAS_UNMAP failed: Device or resource busy",
    "vfio-user-refused": "vfio_user_process: error reply on async ",
    # kata-containers #11721
    "qemu-few-mappings": "warning: vfio_register_ram_discard_listener: possibly running out of DMA"
    " mappings. E.g., try increasing the 'block-size' of virtio-mem devies. Maximum possible DMA"
    " mappings: 65535, Maximum possible memslots: 32764",
    "qemu-listener-refused": "Failed to notify RAM discard listener: Invalid argument",
    "conversion-not-told": "Failed to notify the listener the state change of (0x1000 + 0x2000) to"
    " private",
    "conversion-two-regions": "ram_block_attributes_state_change, invalid range: offset 0xb8000,"
    " size 0x10000",
    "conversion-no-private-side": "Convert non guest_memfd backed memory region (0x1000 ,+ 0x2000)"
    " to private",
    "attribute-refused": "failed to set memory (0x1000+0x2000) with attr 0x8 error 'Invalid"
    " argument'",
    "slot-attribute-refused": "kvm_set_phys_mem: failed to set memory attribute private: Invalid"
    " argument",
    "map-gpa-not-enabled": "KVM_HC_MAP_GPA_RANGE not enabled for guest",
    "discard-failed": "ram_block_discard_range: Failed to discard range pc.ram:1000 +2000 (-22)",
    # proxmox
    "slot-refused": "kvm_set_user_memory_region: KVM_SET_USER_MEMORY_REGION failed, slot=10,"
    " start=0x400000000000, size=0x2000000: Invalid argument",
    "slot-not-registered": "kvm_set_phys_mem: error registering slot: Invalid argument",
    "slots-all-used": "kvm_get_free_slot: no free slot available",
    "slots-none-for-device": "hypervisor has not enough free memory slots left",
    "slots-none-for-vhost": "a used vhost backend has no free memory slots left",
    # kubevirt #16407
    "discarding-broken": f"{_VFIO}: Cannot set discarding of RAM broken: Device or resource busy",
    "discarding-blocked": "cannot set up private guest memory: discard currently blocked: Device or"
    " resource busy",
    "discarding-disabled": "-device virtio-mem-pci,memdev=m: Discarding RAM is disabled",
    "discarding-inconsistent": f"{_VFIO}: Inconsistent setting of support for discarding RAM (e.g.,"
    " balloon) within group",
    "viommu-with-discards": "warning: Using vfio with vIOMMUs and coordinated discarding of RAM"
    " (e.g., virtio-mem) works, however, malicious guests can trigger pinning",
    "group-not-viable": f"{_VFIO}: group 44 is not viable",
    "group-without-device": f"{_VFIO}: error getting device from group 44: No such device",
    "group-missing": f"{_VFIO}: no iommu_group found: No such file or directory",
    "group-in-two-spaces": f"{_VFIO}: group 44 used in multiple address spaces",
    "container-not-set-up": f"{_VFIO}: failed to setup container for group 44: Failed to get VFIO"
    " IOMMU info: Invalid argument",
    # kata-containers #13179
    "iommufd-not-bound": f"{_VFIO}: error bind device fd=28 to iommufd=27: Invalid argument",
    "iommufd-not-attached": "[iommufd=27] error attach 0000:21:00.0 (28) to id=2: Address already"
    " in use",
    "viommu-too-wide": "aw-bits 48 > host aw-bits 39",
    "guest-memfd-missing": "KVM does not support guest_memfd",
    "guest-memfd-refused": "Error creating KVM guest_memfd: Invalid argument",
    "guest-memfd-no-live-update": "Memory region pc.ram uses guest_memfd, which is not supported"
    " with CPR.",
    "ram-not-reserved": "cannot set up guest memory 'pc.ram': Cannot allocate memory",
    "backing-not-mapped": "unable to map backing store for guest RAM: Cannot allocate memory",
    "tdx-call-failed": "TDX ioctl KVM_TDX_INIT_VM failed, hw_errors: 0xc000010000000000",
    "tdx-guest-fatal": 'TDX guest reports fatal error. error code: 0x0 error message:"x"',
    "snp-launch-refused": "SNP_LAUNCH_START ret=-5 fw_error=7 'Policy not allowed'",
    "dmar-fault": "DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x200000 [fault"
    " reason 0x05] PTE Write access is not set",
    "amd-vi-fault": "vfio-pci 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0012"
    " address=0x200800 flags=0x0020]",
    "amd-vi-rmp-fault": "vfio-pci 0000:01:00.0: AMD-Vi: Event logged [RMP_PAGE_FAULT"
    " vmg_tag=0x0000, gpa=0x200000, flags_rmp=0x0001, flags=0x0020]",
    "memlock-exceeded": "vfio_pin_pages_remote: RLIMIT_MEMLOCK (8388608) exceeded",
    "sev-lock-limit": "kvm_amd: SEV: 65536 total pages would exceed the lock limit of 2048.",
    "rmpupdate-failed": "SEV-SNP: RMPUPDATE failed for PFN 56700, pg_level: 1, ret: 2",
    "snp-pages-leaked": "SEV-SNP: Leaking PFN range 0x56700-0x56800",
    "snp-unexpected-fault": "kvm_amd: SEV: Unexpected RMP fault for non-private GPA 0x200000",
    "tdx-not-accepted": "kvm_intel: Guest access before accepting 0x200000 on vCPU 3",
    "tdx-seamcall-failed": "kvm_intel: SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0xc000010000000000",
    "interrupts-unsafe": "vfio_iommu_type1_attach_group: No interrupt remapping support.  Use the"
    ' module param "allow_unsafe_interrupts" to enable VFIO IOMMU support on this platform',
    "interrupts-not-isolated": "vfio-pci 0000:01:00.0: MSI interrupts are not secure, they cannot"
    " be isolated by the platform. Check that platform features like interrupt remapping are on.",
    "firmware-wants-identity": "vfio-pci 0000:01:00.0: Firmware has requested this device have a"
    " 1:1 IOMMU mapping, rejecting configuring the device without a 1:1 mapping.",
    "vfio-in-use": 'vfio-pci 0000:01:00.0: Device is currently in use, task "sh" (4711) blocked'
    " until device is released",
    "bar-not-reserved": "vfio-pci 0000:01:00.0: BAR 1: can't reserve [mem 0xd0000000-0xdfffffff"
    " 64bit pref]",
    # AMDESE/AMDSEV #174
    "psc-failed": "SNP: PSC failed ret=0 exit_info_2=10000000000",
    "guest-conversion-refused": "CPA VMM failure to convert memory (addr=00000000abcd, numpages=512"
    ") to shared: -5",
    "tdx-not-unshared": "tdx: Failed to unshare range 0x100000-0x200000",
    "snp-page-not-shared": "SEV: failed to mark page shared, ret=-5",
    # AMDESE/AMDSEV #281
    "swiotlb-full": "nvidia 0000:01:00.0: swiotlb buffer is full (sz: 4194304 bytes), total 524288"
    " (slots), used 522417 (slots)",
    "ovmf-conversion-refused": "SetOrClearSharedBit: TdVmcall(MAPGPA) failed with 8000000000000000",
    # tianocore/edk2 #5026
    "ovmf-conversion-again": "SetOrClearSharedBit: TdVmcall(MAPGPA) Retry PhysicalAddress is"
    " 8000080000000, MapGpaRetryaddr is 8000084000000",
    "ovmf-not-validated": "PlatformPei:PvalidateRange: Failed to Validate address 0x800000 Error"
    " code 1",
    "kata-needs-iommufd": "ConfidentialGuest needs IOMMUFD - cannot use /dev/vfio/44",
    "kata-qemu-not-launched": "failed to launch qemu: exit status 1",
    "kata-no-port": "cold_plug_vfio= or hot_plug_vfio= port is not set for device 0000:21:00.0"
    " (BridgePort | RootPort | SwitchPort)",
    # kubevirt #17694
    "libvirt-memlock": "cannot limit locked memory of process 111 to 9007199254740991: Operation"
    " not permitted",
    # cloud-hypervisor #8895
    "clh-map-failed": "Failed to map VFIO MMIO region: Failed to DMA map: failed to map an IOVA"
    " range to the IOAS: Bad address (os error 14)",
    "clh-map-failed-at": "failed to map memory into the host IOMMU address space, iova 0x1000, gpa"
    " 0x1000, size 0x1000: IommuDmaMap",
    # kata-containers #10582
    "clh-map-failed-old": "Error from device manager:"
    " VfioMapRegion(DmaMap(IommuDmaMap(Error(17))))",
    "clh-unmap-failed": "Failed to DMA unmap VFIO device",
}


def explained(log: str) -> set[str]:
    """Return the names of the messages in a program's output, for tests that make it write them."""
    return {known.entry.name for known in explain([log.encode()]).known}
