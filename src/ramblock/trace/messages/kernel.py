# SPDX-License-Identifier: Apache-2.0
"""
Messages of the host's kernel, and of a guest's kernel and firmware.

The texts are those of the sources of Linux 7.3.4 and of edk2; where a version before is named, a
report has it.
"""

from __future__ import annotations

from ramblock.trace.messages.entry import ADDRESS, Entry

__all__ = ["AMD_FAULT", "DMAR_FAULT", "ENTRIES"]

_FAULT_REMEDY = (
    "compare the address with the guest's conversions: `ramblock check` on a trace of the VMM names"
    " the unmap or the conversion that took the page away. An address of the host's own devices is"
    " its driver's fault"
)
_HOST_SNP = "Linux 7.3: arch/x86/virt/svm/sev.c"
_GUEST = "Linux 7.3 as the guest"

#: Groups: Read or Write, the device, the address. drivers/iommu/intel/dmar.c, 4.x to 7.x.
DMAR_FAULT = Entry(
    "dmar-fault",
    "DMAR",
    r"DMAR: ?\[DMA (Read|Write)[^\]\n]{0,40}\] Request device \[([0-9a-fA-F:.x]{1,24})\]"
    rf"(?: PASID \w{{1,16}})? fault addr {ADDRESS}",
    "a device's access was refused by the IOMMU (VT-d)",
    "the address is not mapped for the device, or is read-only: it was never mapped, or was"
    " unmapped while the device still used it",
    "Linux 4.x to 7.x",
    _FAULT_REMEDY,
    "Linux: drivers/iommu/intel/dmar.c, dmar_fault_do_one()",
)
#: Groups: the driver's and device's name before it where the device is known, else the event's
#: device; the address; the flags. drivers/iommu/amd/iommu.c, 4.x to 7.x.
AMD_FAULT = Entry(
    "amd-vi-fault",
    "IO_PAGE_FAULT",
    r"(?:(\S{1,24}): )?AMD-Vi: ?Event logged \[IO_PAGE_FAULT"
    r"(?: device=([0-9a-fA-F:.]{1,24}))?"
    rf"(?: (?:domain|pasid)=0x[0-9a-fA-F]{{1,16}}){{0,3}} address={ADDRESS} flags={ADDRESS}",
    "a device's access was refused by the IOMMU (AMD-Vi)",
    DMAR_FAULT.cause,
    "Linux 4.x to 7.x",
    _FAULT_REMEDY,
    "Linux: drivers/iommu/amd/iommu.c, amd_iommu_report_page_fault()",
)

_HOST = (
    DMAR_FAULT,
    AMD_FAULT,
    Entry(
        "amd-vi-rmp-fault",
        "RMP_",
        r"AMD-Vi: ?Event logged \[RMP_(?:PAGE_FAULT|HW_ERROR)",
        "a device's access to a page of an SNP guest was refused by the table of page owners (RMP)",
        "the IOMMU still maps a page that has become private: a stale mapping",
        "Linux 7.3",
        "stop the guest; `ramblock check` on a trace says which conversion left the mapping",
        "Linux: drivers/iommu/amd/iommu.c, amd_iommu_report_rmp_fault()",
    ),
    Entry(
        "memlock-exceeded",
        "RLIMIT_MEMLOCK",
        r"vfio_\w{1,40}: (?:Task [^\n]{1,60}? )?RLIMIT_MEMLOCK \(-?\d{1,20}\) exceeded",
        "type1 did not pin memory for a mapping",
        "the process has locked as much as its limit allows; the number is the limit in bytes",
        "Linux up to 7.3",
        "raise the limit of the VMM (LimitMEMLOCK=, ulimit -l; libvirt: <hard_limit>), at least to"
        " the guest's RAM and BARs, and that times the devices with a virtual IOMMU",
        "Linux: drivers/vfio/vfio_iommu_type1.c, vfio_pin_pages_remote(), vfio_lock_acct()",
        ("kubevirt/kubevirt#17805",),
    ),
    Entry(
        "sev-lock-limit",
        "exceed the lock limit",
        r"SEV: \d{1,20} total pages would exceed the lock limit of",
        "KVM did not pin memory of a SEV guest",
        "SEV and SEV-ES guests have all their RAM pinned, and the process's limit of locked memory"
        " is smaller",
        "Linux 7.3",
        "raise RLIMIT_MEMLOCK of the VMM, or give it CAP_IPC_LOCK",
        "Linux: arch/x86/kvm/svm/sev.c, sev_pin_memory()",
    ),
    Entry(
        "rmpupdate-failed",
        "RMPUPDATE failed",
        r"SEV-SNP: RMPUPDATE failed for PFN",
        "the owner of a page could not be changed (SNP)",
        "ret is the instruction's answer: 1 a wrong input, 2 not permitted (as for an immutable"
        " page), 3 in use, 4 an overlap of a large and a small page",
        "Linux up to 7.3",
        "a newer kernel; if a device is assigned, look for a mapping of the page that stayed. The"
        " page is lost until the host restarts",
        f"{_HOST_SNP}, rmpupdate()",
    ),
    Entry(
        "snp-pages-leaked",
        "Leaking PFN range",
        r"SEV-SNP: Leaking PFN range",
        "pages of an SNP guest were not given back to the host",
        "they could not be made shared again, see RMPUPDATE above it",
        "Linux 7.3",
        "restart the host when it matters; report it with the lines above",
        f"{_HOST_SNP}, snp_leak_pages()",
    ),
    Entry(
        "snp-unexpected-fault",
        "Unexpected RMP fault",
        r"SEV: Unexpected RMP fault",
        "KVM met a fault of the page owners' table that it cannot explain (SNP)",
        "the guest or the host touched a page whose state in KVM and in the table differ",
        "Linux 7.3",
        "look for a conversion that failed in the VMM's log before it",
        "Linux: arch/x86/kvm/svm/sev.c, sev_handle_rmp_fault()",
    ),
    Entry(
        "tdx-not-accepted",
        "access before accepting",
        r"Guest access before accepting 0x[0-9a-fA-F]{1,16} on vCPU",
        "KVM ended a TDX guest",
        "the guest used a private page that it has not accepted: a conversion that only KVM made,"
        " or a guest kernel without support of unaccepted memory",
        "Linux 7.3",
        "a guest kernel with CONFIG_UNACCEPTED_MEMORY; look for the page's last conversion",
        "Linux: arch/x86/kvm/vmx/tdx.c, tdx_handle_ept_violation()",
    ),
    Entry(
        "tdx-seamcall-failed",
        "SEAMCALL",
        r"SEAMCALL [^\n]{1,60}? failed: 0x",
        "the TDX module refused a call of KVM, which ends the guest",
        "a fault of KVM or of the module; the number is the module's status",
        "Linux 7.3",
        "update the TDX module and the kernel; report it with the number",
        "Linux: arch/x86/kvm/vmx/tdx.c, __TDX_BUG_ON()",
    ),
    Entry(
        "interrupts-unsafe",
        "interrupt remapping",
        r"No interrupt remapping support\. {1,2}Use the module param",
        "type1 did not take an IOMMU group",
        "the platform cannot isolate interrupts of devices",
        "Linux up to 7.3",
        "switch interrupt remapping on (firmware; no intremap=off); on a machine that you trust all"
        " guests of, vfio_iommu_type1.allow_unsafe_interrupts=1",
        "Linux: drivers/vfio/vfio_iommu_type1.c, vfio_iommu_type1_attach_group()",
    ),
    Entry(
        "interrupts-not-isolated",
        "interrupts are not secure",
        r"MSI interrupts are not secure, they cannot be isolated by the platform",
        "nothing: iommufd binds a device whose interrupts are not isolated, as allowed",
        "iommufd.allow_unsafe_interrupts is set, and the platform has no interrupt remapping",
        "Linux 7.3",
        "switch interrupt remapping on, and the parameter off",
        "Linux: drivers/iommu/iommufd/device.c",
    ),
    Entry(
        "firmware-wants-identity",
        "1:1 IOMMU mapping",
        r"Firmware has requested this device have a 1:1 IOMMU mapping",
        "a device was not taken out of the host's hands",
        "the firmware declared memory that the device has to reach untranslated (RMRR, IVMD)",
        "Linux 7.3",
        "switch the feature that declares it off in the firmware (often remote management), or ask"
        " the vendor; a guest cannot have the device as it is",
        "Linux: drivers/iommu/iommu.c",
    ),
    Entry(
        "vfio-in-use",
        "currently in use, task",
        r"Device is currently in use, task \W{0,4}[^\n]{1,40}? \(\d{1,10}\) blocked until device is"
        r" released",
        "a device is not given back to the host, since a process has it open",
        "a VMM runs still, or hangs",
        "Linux up to 7.3",
        "end the VMM that has it (fuser -v /dev/vfio/*)",
        "Linux: drivers/vfio/vfio_main.c, vfio_unregister_group_dev()",
    ),
    Entry(
        "bar-not-reserved",
        "can't reserve",
        r"BAR \d{1,2}: can't reserve \[mem",
        "a BAR of the device could not be taken by vfio-pci",
        "something of the host has it: the firmware's frame buffer (efifb, simpledrm) on a GPU",
        "Linux up to 7.3",
        "video=efifb:off or initcall_blacklist=sysfb_init for the host's kernel; or another GPU for"
        " the console",
        "Linux: drivers/pci/pci.c",
    ),
)
_GUESTS = (
    Entry(
        "psc-failed",
        "PSC failed",
        r"PSC failed ret=-?\d{1,10} exit_info_2=",
        "an SNP guest's conversion was refused by the host, and the guest ends",
        "exit_info_2 is the host's answer in hex: 10000000000 is KVM's when its VMM failed, as with"
        " a device's mapping that was refused; 100000001 and 100000002 are a wrong header or entry",
        "Linux up to 7.3 as the guest",
        "look into the VMM's log at that time: the refusal stands there",
        "Linux: arch/x86/coco/sev/core.c, vmgexit_psc()",
        ("AMDESE/AMDSEV#174",),
    ),
    Entry(
        "guest-conversion-refused",
        "failure to convert memory",
        r"CPA VMM failure to convert memory \(addr=",
        "a guest's conversion was refused by the host (TDX or SNP)",
        "the VMM answered with an error; the pages are in an unknown state, and the guest leaks"
        " them",
        _GUEST,
        "look into the VMM's log at that time: the refusal stands there",
        "Linux: arch/x86/mm/pat/set_memory.c, __set_memory_enc_pgtable()",
    ),
    Entry(
        "tdx-not-unshared",
        "Failed to unshare range",
        r"tdx: Failed to unshare range 0x",
        "a TDX guest could not make pages private again before kexec",
        "the VMM refused the conversion; the next kernel ends if it uses the page as private",
        _GUEST,
        "restart the guest instead of kexec; look into the VMM's log",
        "Linux: arch/x86/coco/tdx/tdx.c, tdx_kexec_finish()",
    ),
    Entry(
        "snp-page-not-shared",
        "mark page shared",
        r"SEV: failed to mark page shared, ret=",
        "a guest could not share a page for attestation (SNP)",
        "the VMM refused the conversion",
        _GUEST,
        "look into the VMM's log at that time",
        "Linux: arch/x86/coco/sev/core.c, alloc_shared_pages()",
    ),
    Entry(
        "swiotlb-full",
        "swiotlb buffer is full",
        r"swiotlb buffer is full \(sz: \d{1,20} bytes\)",
        "a driver of the guest got no bounce buffer, and its request failed",
        "a confidential guest moves all its DMA through one shared buffer (swiotlb), which is used"
        " up; 524,288 slots are 1 GiB, the most that the kernel chooses by itself",
        "Linux up to 7.3",
        "swiotlb=N for the guest's kernel, in slots of 2 KiB, as 2097152 for 4 GiB; that much is"
        " shared memory, so count it with `ramblock plan`",
        "Linux: kernel/dma/swiotlb.c, swiotlb_tbl_map_single()",
        ("AMDESE/AMDSEV#281",),
    ),
    Entry(
        "ovmf-conversion-refused",
        "TdVmcall(MAPGPA)",
        r"TdVmcall\(MAPGPA\) failed with",
        "a conversion of the firmware was refused by the host (TDX)",
        "the VMM answered the MapGPA call with an error, and the firmware stops",
        "edk2 of 2023 and newer",
        "look into the VMM's log at that time: the refusal stands there",
        "edk2: OvmfPkg/Library/BaseMemEncryptTdxLib/MemoryEncryption.c, SetOrClearSharedBit()",
        ("tianocore/edk2#5026",),
    ),
    Entry(
        "ovmf-conversion-again",
        "TdVmcall(MAPGPA)",
        r"TdVmcall\(MAPGPA\) Retry PhysicalAddress",
        "nothing: the firmware goes on with the rest of a long conversion (TDX)",
        "the host converts at most so much for each call, and firmware asks again",
        "edk2 of 2023 and newer, built with verbose output",
        "nothing",
        "edk2: OvmfPkg/Library/BaseMemEncryptTdxLib/MemoryEncryption.c, SetOrClearSharedBit()",
        ("tianocore/edk2#5026",),
    ),
    Entry(
        "ovmf-not-validated",
        " address 0x",
        r"(?:Double (?:Validate|Invalidate) detected for address 0x"
        r"|Failed to (?:Validate|Invalidate) address 0x)",
        "the firmware could not validate a page, and ends the guest (SNP)",
        "the page is not what the firmware believes: a conversion of the host's that it did not ask"
        " for, or that failed",
        "edk2 with support of SNP",
        "look into the VMM's log for a conversion of that address",
        "edk2: OvmfPkg/Library/BaseMemEncryptSevLib/X64/SnpPageStateChangeInternal.c",
    ),
)

ENTRIES = (*_HOST, *_GUESTS)
