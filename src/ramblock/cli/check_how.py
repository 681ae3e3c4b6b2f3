# SPDX-License-Identifier: Apache-2.0
"""Commands that record a trace for ``ramblock check``, ready to be pasted."""

from __future__ import annotations

__all__ = ["BPFTRACE", "HOW", "QEMU_EVENTS"]

#: A name that a QEMU does not have is a warning there, so one list serves many versions.
QEMU_EVENTS = """\
kvm_convert_memory
kvm_hc_map_gpa_range
kvm_memory_fault
kvm_set_user_memory
ram_block_attributes_state_change
ram_block_discard_range
ram_block_discard_shared_range
iommufd_backend_alloc_ioas
iommufd_backend_free_id
iommufd_backend_map_dma
iommufd_backend_map_file_dma
iommufd_backend_unmap_dma
iommufd_backend_unmap_dma_non_exist
vfio_listener_region_add_ram
vfio_listener_region_del
vfio_user_dma_map
vfio_user_dma_unmap
vfio_user_version
virtio_mem_plug_request
virtio_mem_unplug_request
virtio_mem_unplug_all_request
virtio_mem_unplugged_all
virtio_mem_resized_usable_region
virtio_mem_send_response
"""

_QEMU = f"""\
# 1. The events that tell of conversions and of mappings:
cat >events.txt <<'END'
{QEMU_EVENTS}END

# 2. Start QEMU as always, with these two options more. (A QEMU whose trace backend is `simple`
#    writes the same to a binary file; `qemu-system-x86_64 -trace help` lists your QEMU's events.)
qemu-system-x86_64 ... -msg timestamp=on -trace events=events.txt,file=qemu.trace

# 3. When it has run for long enough, or has ended:
ramblock check qemu.trace

# QEMU does not trace the maps of a VFIO type1 container (there is no such event), and it traces
# unmaps for a vfio-user server without their result. For type1, record the kernel beside it
# (`ramblock check --how ftrace`, or bpftrace); for vfio-user, the server's side (`ramblock probe
# --trace`). With virtio-mem, add --virtio-mem-block with its block-size (2M, say).
"""

_FTRACE = """\
# As root, on the host. A buffer of its own, so that nobody else's tracing is disturbed:
T=/sys/kernel/tracing/instances/ramblock
mkdir $T
echo mono >$T/trace_clock        # the clock of ramblock's own traces, so that they can be merged
echo 65536 >$T/buffer_size_kb    # for each processor; a trace with lost events says so
echo 1 >$T/options/record-tgid   # which process maps: iommu:map names no device
for e in iommu/map iommu/unmap iommu/attach_device_to_domain iommu/io_page_fault \\
         kvm/kvm_vm_set_mem_attributes kvm/kvm_hypercall kvm/kvm_entry; do
    echo 1 >$T/events/$e/enable
done

# Before the guest starts:
cat $T/trace_pipe | gzip >kernel.txt.gz &

# When it has run for long enough:
kill %1; rmdir $T
ramblock check kernel.txt.gz

# kvm_entry is by far the most frequent. Without it a conversion is taken for over when nothing of
# it was seen for 10 ms (--grace). TDX and SEV-SNP guests do not convert by kvm_hypercall;
# kvm_vm_set_mem_attributes tells of them all the same. The same with perf:
perf record -a -k CLOCK_MONOTONIC -e 'iommu:*' -e \\
    kvm:kvm_vm_set_mem_attributes,kvm:kvm_hypercall,kvm:kvm_entry -- sleep 60
perf script -F comm,pid,tid,cpu,time,event,trace --ns | gzip >perf.txt.gz

# iommu:map shows the calls to the IOMMU driver. Those to VFIO type1: `ramblock check --how
# bpftrace`.
"""

#: struct vfio_iommu_type1_dma_map: u32 argsz, u32 flags, u64 vaddr, u64 iova, u64 size; dma_unmap:
#: u32 argsz, u32 flags, u64 iova, u64 size, which the call replaces by the unmapped size
#: (include/uapi/linux/vfio.h). The structures are on the caller's stack, so they are still there
#: when the probed function returns.
BPFTRACE = r"""#!/usr/bin/env bpftrace
// Maps and unmaps of VFIO type1, with their results; one line each, for `ramblock check`.
kprobe:vfio_dma_do_map {
    @map[tid] = 1;
    @map_iova[tid] = *(uint64 *)(arg1 + 16);
    @map_size[tid] = *(uint64 *)(arg1 + 24);
}
kretprobe:vfio_dma_do_map /@map[tid]/ {
    printf("ramblock-vfio map %llu %d %d 0x%llx 0x%llx 0x%llx %d %s\n", nsecs, pid, tid,
        @map_iova[tid], @map_size[tid], retval == 0 ? @map_size[tid] : 0, (int32)retval, comm);
    delete(@map[tid]); delete(@map_iova[tid]); delete(@map_size[tid]);
}
kprobe:vfio_dma_do_unmap {
    @unmap[tid] = arg1;
    @unmap_iova[tid] = *(uint64 *)(arg1 + 8);
    @unmap_size[tid] = *(uint64 *)(arg1 + 16);
}
kretprobe:vfio_dma_do_unmap /@unmap[tid]/ {
    printf("ramblock-vfio unmap %llu %d %d 0x%llx 0x%llx 0x%llx %d %s\n", nsecs, pid, tid,
        @unmap_iova[tid], @unmap_size[tid], *(uint64 *)(@unmap[tid] + 16), (int32)retval, comm);
    delete(@unmap[tid]); delete(@unmap_iova[tid]); delete(@unmap_size[tid]);
}
END {
    clear(@map); clear(@map_iova); clear(@map_size);
    clear(@unmap); clear(@unmap_iova); clear(@unmap_size);
}
"""

_BPFTRACE = f"""\
# VFIO has no tracepoints. As root, on the host (vfio_iommu_type1 must be loaded, and its functions
# not inlined: `grep vfio_dma_do_ /proc/kallsyms` shows both):
cat >vfio.bt <<'END'
{BPFTRACE}END
bpftrace -B line vfio.bt | gzip >type1.txt.gz     # before the guest starts, until Ctrl-C

# It tells of mappings, and not which pages were private. Record that beside it, with the same
# clock:
#   ramblock check --how ftrace
ramblock check --merge type1.txt.gz kernel.txt.gz
"""

#: By the name in ``--how``.
HOW = {"qemu": _QEMU, "ftrace": _FTRACE, "bpftrace": _BPFTRACE}
