"""The kernel's events as text, from ftrace, trace-cmd and perf."""

import pytest

from trace_samples import Shown, as_shown, read, reader_of

_HEADS = {
    "ftrace with tgid": (
        "          python-62      (     62) [000] .....    23.969546: ",
        23_969_546_000,
        "62",
        "iommu of process 62",
    ),
    "ftrace": (
        "           <...>-62      [001] d..1.    23.969546: ",
        23_969_546_000,
        "62",
        "iommu",
    ),
    "ftrace, tgid not known": (
        "     CPU 0/KVM-63      (-------) [001] .....    23.969546: ",
        23_969_546_000,
        "63",
        "iommu",
    ),
    "trace-cmd": (
        "     CPU 0/KVM-63      [001]    23.969546: ",
        23_969_546_000,
        "63",
        "iommu",
    ),
    "perf": (
        "CPU 0/KVM 62/63 [001]    23.969546123: ",
        23_969_546_123,
        "63",
        "iommu of process 62",
    ),
}
_PERF_SUBSYSTEM = {"map": "iommu:", "unmap": "iommu:"}

# (event and arguments, what it means; T stands for the target, C for the thread)
_LINES: list[tuple[str, Shown | None]] = [
    (
        (
            "map: IOMMU: iova=0x0000000102000000 - 0x0000000102001000 paddr=0x000000000f7b3000"
            " size=4096"
        ),
        ("Map", "T", 0x102000000, 0x102001000, True, True, 0xF7B3000, None),
    ),
    (
        # The size is what was mapped, the range what was asked for.
        (
            "map: IOMMU: iova=0x0000000000000000 - 0x0000000000003000 paddr=0x0000000000001000"
            " size=4096"
        ),
        ("Map", "T", 0, 0x1000, True, True, 0x1000, None),
    ),
    (
        "map: IOMMU: iova=0x0000000000000000 - 0x0000000000003000 paddr=0x0000000000001000 size=0",
        ("Map", "T", 0, 0x3000, True, False, 0x1000, None),
    ),
    (
        "unmap: IOMMU: iova=0x0000000102000000 - 0x0000000102002000 size=8192 unmapped_size=4096",
        ("Unmap", "T", 0x102000000, 0x102002000, 4096, True),
    ),
    ("attach_device_to_domain: IOMMU: device=0000:00:09.0", ("Attach", "T", "0000:00:09.0")),
    (
        (
            "io_page_fault: IOMMU:pci 0000:00:09.0 driver=vfio-pci iova=0x0000000000005000"
            " flags=0x0001"
        ),
        ("Access", "faults", 0x5000, None, True, True, "0000:00:09.0"),
    ),
    (
        "kvm_vm_set_mem_attributes: 0x00000000000010 -- 0x00000000000020 [0x8]",
        ("Attributes", 0x10000, 0x20000, True, "C"),
    ),
    (
        "kvm_vm_set_mem_attributes: 0x00000000000010 -- 0x00000000000020 [0x0]",
        ("Attributes", 0x10000, 0x20000, False, "C"),
    ),
    (
        "kvm_hypercall: nr 0xc a0 0x10000 a1 0x2 a2 0x10 a3 0x0",
        ("Conversion", 0x10000, 0x12000, True, "C"),
    ),
    (
        "kvm_hypercall: nr 0xc a0 0x10000 a1 0x2 a2 0x0 a3 0x0",
        ("Conversion", 0x10000, 0x12000, False, "C"),
    ),
    ("kvm_hypercall: nr 0x5 a0 0x10000 a1 0x2 a2 0x0 a3 0x0", None),
    ("kvm_hypercall: nr 0xc a0 0xffffffffffffffff a1 0xffffffffffffffff a2 0x0 a3 0x0", None),
    ("kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x00000000", ("VcpuEntry", "C")),
    ("kvm_exit: reason EXIT_HLT rip 0xfff0 info 0 0", None),
]


@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize(("text", "expected"), _LINES)
def test_line(head: str, text: str, expected: Shown | None) -> None:
    prefix, time, thread, target = _HEADS[head]
    if head == "perf":
        prefix += "kvm:" if text.startswith("kvm_") else "iommu:"
    reader = reader_of("ftrace")
    shown = as_shown(read(reader, f"{prefix}{text}\n".encode()))
    assert reader.counts.unknown == 0, reader.counts.examples
    names = {"T": target, "C": thread}
    wanted = [] if expected is None else [tuple(names.get(str(each), each) for each in expected)]
    assert [(each[0], *each[3:]) for each in shown] == wanted
    assert all(each[1:3] == (time, 1) for each in shown)


def test_without_processes_it_says_so() -> None:
    reader = reader_of("ftrace")
    read(reader, (_HEADS["ftrace"][0] + _LINES[0][0]).encode())
    assert "record-tgid" in reader.needs["process"]


@pytest.mark.parametrize(
    "line", ["CPU:0 [LOST 62 EVENTS]", "CPU:1 [LOST EVENTS]", "perf: LOST 17 events!"]
)
def test_lost_events(line: str) -> None:
    (remark,) = as_shown(read(reader_of("ftrace"), line.encode()))
    assert remark[3:5] == ("lost", line)
    assert remark[-1] is True


def test_comments_and_other_events() -> None:
    head = _HEADS["ftrace"][0]
    text = (
        "# tracer: nop\n#\ncpus=2\n\n##### CPU 1 buffer started ####\n"
        f"{head}sched_switch: prev_comm=x\n{head}map: IOMMU: iova=nonsense\nwhat is this\n"
    )
    reader = reader_of("ftrace")
    assert read(reader, text.encode()) == []
    assert [line for line, _ in reader.counts.examples] == [6, 8]
    assert reader.counts.unreadable == [(7, f"{head}map: IOMMU: iova=nonsense")]
