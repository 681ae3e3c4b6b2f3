# SPDX-License-Identifier: Apache-2.0
"""
Commands that record a trace for ``ramblock check``, ready to be pasted.

They are for ``sh``, one after the other in one shell, and the tests run them as they are printed.
"""

from __future__ import annotations

from typing import NamedTuple

from ramblock.trace.readers.qemu_table import EVENTS

__all__ = ["BPFTRACE", "HOW", "KERNEL_EVENTS", "QEMU_EVENTS", "RECIPES", "Recipe"]

#: Those that the readers make something of, by the first version that has them.
QEMU_EVENTS: dict[str, list[str]] = {}
for _name, _forms in EVENTS.items():
    QEMU_EVENTS.setdefault(_forms.since, []).append(_name)

#: ``subsystem:event``, as tracefs lists them.
KERNEL_EVENTS = (
    "iommu:map",
    "iommu:unmap",
    "iommu:attach_device_to_domain",
    "iommu:io_page_fault",
    "kvm:kvm_vm_set_mem_attributes",
    "kvm:kvm_hypercall",
    "kvm:kvm_entry",
)


class Recipe(NamedTuple):
    """How one recorder is used; each part is text for a shell."""

    start: str
    """Before the guest starts."""
    stop: str
    """When it has run for long enough; the last command is ``ramblock check``."""
    notes: str = ""
    """Comments."""

    def __str__(self) -> str:
        stop = f"# When it has run for long enough:\n{self.stop}"
        return "\n".join(part for part in (self.start, stop, self.notes) if part)


def _events_file() -> str:
    lines = []
    for version in sorted(QEMU_EVENTS, key=lambda text: [int(part) for part in text.split(".")]):
        lines += [f"# QEMU {version} and newer:", *QEMU_EVENTS[version]]
    return "".join(f"{line}\n" for line in lines)


_QEMU = Recipe(
    start=f"""\
# The events that tell of conversions and of mappings. Of one that it does not have (ram_block_-
# discard_range is ram_block_discard_shared_range in 11.1), QEMU warns, and records the others.
cat >events.txt <<'END'
{_events_file()}END

# Start QEMU as always, with these two options more. (A QEMU whose trace backend is `simple` writes
# the same to a binary file; `qemu-system-x86_64 -trace help` lists your QEMU's events.)
qemu-system-x86_64 ... -msg timestamp=on -trace events=events.txt,file=qemu.trace
""",
    stop="""\
ramblock check qemu.trace
""",
    notes="""\
# QEMU does not trace the maps of a VFIO type1 container (there is no such event), and it traces
# unmaps for a vfio-user server without their result. For type1, record the kernel beside it
# (`ramblock check --how ftrace`, or bpftrace); for vfio-user, the server's side (`ramblock probe
# --trace`). With virtio-mem, add --virtio-mem-block with its block-size (2M, say).
""",
)

# An unknown event ends perf and trace-cmd, so the kernel is asked first.
_CHOOSE_EVENTS = f"""\
# As root, on the host, in sh or bash. Of the events that are wanted, those that this kernel has:
TRACEFS=/sys/kernel/tracing
[ -e $TRACEFS/available_events ] || mount -t tracefs tracefs $TRACEFS
EVENTS=
for e in {" ".join(KERNEL_EVENTS[:4])} \\
         {" ".join(KERNEL_EVENTS[4:])}; do
    if grep -qx $e $TRACEFS/available_events; then EVENTS="$EVENTS $e"
    else echo "this kernel has no $e" >&2; fi
done
"""

_ABOUT_EVENTS = """\
# kvm_vm_set_mem_attributes tells which pages are private, since Linux 6.17. TDX and SEV-SNP guests
# do not convert by kvm_hypercall; it tells of them all the same. kvm_entry is by far the most
# frequent. Without it a conversion is taken for over when nothing of it was seen for 10 ms
# (--grace). iommu:map shows the calls to the IOMMU driver. Those to VFIO type1: `ramblock check
# --how bpftrace`.
"""

_FTRACE = Recipe(
    start=f"""\
{_CHOOSE_EVENTS}
# A buffer of its own, so that nobody else's tracing is disturbed:
T=$TRACEFS/instances/ramblock
mkdir $T
echo mono >$T/trace_clock        # the clock of ramblock's own traces, so that they can be merged
echo 16384 >$T/buffer_size_kb    # for each processor; a trace with lost events says so
echo 1 >$T/options/record-tgid   # which process maps: iommu:map names no device
for e in $EVENTS; do echo 1 >$T/events/${{e%:*}}/${{e#*:}}/enable; done

# Before the guest starts. (Only the reader is ended later: gzip has to write its file's end.)
{{ cat $T/trace_pipe & echo $! >trace_pipe.pid; wait; }} | gzip >kernel.txt.gz &
RECORDER=$!
""",
    stop="""\
echo 0 >$T/tracing_on
while grep -qm1 '^[^#]' $T/trace; do sleep 0.1; done   # until all that was recorded is read
kill $(cat trace_pipe.pid) 2>/dev/null                 # newer kernels have ended it already
wait $RECORDER
rmdir $T; rm trace_pipe.pid
ramblock check kernel.txt.gz
""",
    notes=_ABOUT_EVENTS,
)

_TRACE_CMD = Recipe(
    start=f"""\
{_CHOOSE_EVENTS}
# Before the guest starts. mono is the clock of ramblock's own traces, so that they can be merged;
# -b is a buffer in KiB, for each processor.
trace-cmd record -C mono -b 16384 -o trace.dat $(printf ' -e %s' $EVENTS) &
RECORDER=$!
""",
    stop="""\
kill -INT $RECORDER; wait $RECORDER
trace-cmd report -i trace.dat | gzip >kernel.txt.gz
ramblock check kernel.txt.gz
""",
    notes=f"""\
# The report names threads, not processes: all that is mapped is taken for one target. With several
# guests take ftrace or perf.
{_ABOUT_EVENTS}""",
)

_PERF = Recipe(
    start=f"""\
{_CHOOSE_EVENTS}
# Before the guest starts. CLOCK_MONOTONIC is the clock of ramblock's own traces, so that they can
# be merged; -m is a buffer for each processor.
perf record -a -k CLOCK_MONOTONIC -m 16M -o perf.data $(printf ' -e %s' $EVENTS) &
RECORDER=$!
""",
    stop="""\
kill -INT $RECORDER; wait $RECORDER
perf script -i perf.data --ns -F comm,pid,tid,cpu,time,event,trace | gzip >perf.txt.gz
ramblock check perf.txt.gz
""",
    notes=_ABOUT_EVENTS,
)

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

_BPFTRACE = Recipe(
    start=f"""\
# VFIO has no tracepoints. As root, on the host (vfio_iommu_type1 must be loaded, and its functions
# not inlined: `grep vfio_dma_do_ /proc/kallsyms` shows both):
cat >vfio.bt <<'END'
{BPFTRACE}END

# Before the guest starts. (Only bpftrace is ended later: gzip has to write its file's end.)
{{ bpftrace -B line vfio.bt & echo $! >bpftrace.pid; wait; }} | gzip >type1.txt.gz &
RECORDER=$!
""",
    stop="""\
kill $(cat bpftrace.pid); wait $RECORDER
rm bpftrace.pid
ramblock check type1.txt.gz
""",
    notes="""\
# It tells of mappings, and not which pages were private. Record that beside it, with the same
# clock, and check both as one:
#   ramblock check --how ftrace
#   ramblock check --merge type1.txt.gz kernel.txt.gz
""",
)

RECIPES = {
    "qemu": _QEMU,
    "ftrace": _FTRACE,
    "trace-cmd": _TRACE_CMD,
    "perf": _PERF,
    "bpftrace": _BPFTRACE,
}

#: By the name in ``--how``.
HOW = {name: str(recipe) for name, recipe in RECIPES.items()}
