"""
An event is found in its line whatever its loggers wrote around it.

The ways of writing are those of the programs: QEMU's util/message.c and scripts/tracetool, GLib's ISO
times, journald's output modes, kata's shim, virt-launcher, docker and CRI logs, kubectl.
"""

import pytest

from trace_samples import as_shown, read, reader_of

_EVENT = "kvm_convert_memory start 0x100000 size 0x1000 shared_to_private"
_NS = 1795489710_193122000  # 2026-11-24T03:08:30.193122Z
_SECOND = 1795489710_000000000
#: Of a leap year, since syslog does not tell which: 2000-11-24T03:08:30.
_SYSLOG = 975035310_000000000

# (line with {} for the event, time, process, thread)
_LINES: list[tuple[str, int | None, str | None, str | None]] = [
    ("{}", None, None, None),
    ("60@1795489710.193122:{}", _NS, None, "60"),
    ("2026-11-24T03:08:30.193122Z {}", _NS, None, None),
    ("2026-11-24T03:08:30Z {}", _SECOND, None, None),
    ("2026-11-24T04:08:30.193122+01:00 {}", _NS, None, None),
    ("2026-11-23T21:38:30.193122-0530 {}", _NS, None, None),
    ("2026-11-24 03:08:30,193 {}", _SECOND + 193_000_000, None, None),
    ("2026-11-24T03:08:30.193122Z [td0] qemu-system-x86_64: (4711:main): {}", _NS, None, "4711"),
    ("[my vm: 2] qemu: (7:CPU 1/KVM): {}", None, None, "7"),
    ("qemu: (7:IO (a): b (c)): {}", None, None, "7"),
    ("4711@1795489710193122345 {}", _NS + 345, "4711", None),
    ("2026-11-24T03:08:30.193122+00:00 node7 qemu-system-x86_64[4711]: {}", _NS, "4711", None),
    ("Nov 24 03:08:30 node7 QEMU[4711]: kvm: {}", _SYSLOG, "4711", None),
    ("Nov  4 03:08:30.5 node7 qemu-kvm[4711]: {}", _SYSLOG - 20 * 86_400 * 10**9 + 500_000_000, "4711", None),
    ("11月 24 03:08:30 node7 qemu-kvm[4711]: {}", _SYSLOG, "4711", None),
    ("1795489710.193122 node7 qemu-kvm[4711]: {}", _NS, "4711", None),
    ("[   12.700010] node7 qemu-kvm[4711]: {}", 12_700_010_000, "4711", None),
    ("Nov 24 03:08:30 node7 libvirtd[33]: 2026-11-24T03:08:30.193122Z {}", _NS, None, None),
    ('time="2026-11-24T03:08:30.193122Z" level=info msg="{}" name=x pid=4700 qemuPid=4711 a=b', _NS, "4711", None),
    ("2026-11-24T03:08:30.193122345Z \x1b[32m{}\x1b[0m\r", _NS + 345, None, None),
    ("2026-11-24T03:08:30.193122345Z stdout F {}", _NS + 345, None, None),
    ('{{"msg": "{}", "subcomponent": "qemu", "timestamp": "2026-11-24T03:08:30.193122Z"}}', _NS, None, None),
    ('{{"timestamp":"2026-11-24T03:08:30.193122Z","msg":"{}"}}', _NS, None, None),
    ('{{"log":"{}\\n","stream":"stderr","time":"2026-11-24T03:08:30.193122345Z"}}', _NS + 345, None, None),
    ('{{"log":"time=\\"2026-11-24T03:08:30.193122Z\\" msg=\\"{}\\" qemuPid=4711\\n"}}', _NS, "4711", None),
    ('{{"__REALTIME_TIMESTAMP":"1795489710193122","_COMM":"qemu-system-x86","_PID":"4711","MESSAGE":"{}"}}', _NS, "4711", None),
    ('{{"level":"info","ts":1795489710.193122,"msg":"{}"}}', _NS, None, None),
    ("\ufeff{}", None, None, None),
    ("qemu-system-x86_64: warning: memory fault: GPA 0x4000000 {}", None, None, None),
    ("     CPU 0/KVM-82      (     60) [001] .....   12.000200: tracing_mark_write: {}", 12_000_200_000, "60", "82"),
    ("  qemu-kvm-82    [001]    12.000200: print:       tracing_mark_write: {}", 12_000_200_000, None, "82"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "time", "process", "thread"), _LINES)
def test_what_stands_around_an_event(
    line: str, time: int | None, process: str | None, thread: str | None
) -> None:
    reader = reader_of("qemu")
    events = read(reader, line.format(_EVENT).encode())
    assert [type(event).__name__ for event in events] == ["Conversion", "Attributes"]
    for event in events:
        assert (event.time, event.source.guest) == (time, process)
        assert (event.start, event.end, event.vcpu) == (0x100000, 0x101000, thread)  # type: ignore[union-attr]
    assert (reader.counts.unknown, reader.counts.unreadable_lines) == (0, 0)


@pytest.mark.parametrize("month", ["Okt", "říj", "10月", "окт", "lokakuu"])
def test_months_of_any_language_go_on(month: str) -> None:
    text = f"{month} 24 03:08:30 n qemu[1]: {_EVENT}\n{month} 25 03:08:30 n qemu[1]: {_EVENT}\n"
    first, _, second, _ = read(reader_of("qemu"), text.encode())
    assert second.time is not None
    assert first.time is not None
    assert second.time - first.time == 86_400 * 10**9


def test_two_events_in_one_line() -> None:
    """Two threads write at once."""
    data = f"60@1.000001:{_EVENT} 61@1.000002:{_EVENT}"
    assert len(read(reader_of("qemu"), data.encode())) == 4


@pytest.mark.parametrize(
    "line",
    [
        "-trace kvm_convert_memory -m 4G",
        "qemu -d trace:kvm_convert_memory -m 4G",
        "-trace enable=kvm_convert_memory -m 4G",
        "qemu: kvm_convert_memory_range start 0x0",
        "see /usr/share/kvm_convert_memory for more",
    ],
)
def test_a_name_that_is_no_event(line: str) -> None:
    reader = reader_of("qemu")
    assert read(reader, line.encode()) == []
    assert (reader.counts.unknown, reader.counts.unreadable_lines) == (1, 0)


_KATA = (
    'Feb 19 13:46:44 node {}: time="2026-02-19T13:46:44.457589851+01:00" level=warning msg="{}"'
    " name=containerd-shim-v2 pid=15969 qemuPid=15984 sandbox=sb1\n"
)


def test_a_second_logger_counts_once() -> None:
    lines = [_KATA.format(who, _EVENT) for who in ("kata[15969]", "containerd[14192]")]
    reader = reader_of("qemu")
    assert len(read(reader, "".join(lines).encode())) == 2
    assert reader.counts.duplicates == 1
    assert "another logger" in reader.needs["duplicates"]


def test_the_same_line_twice_by_one_logger_counts_twice() -> None:
    reader = reader_of("qemu")
    assert len(read(reader, (_KATA.format("kata[15969]", _EVENT) * 2).encode())) == 4
    assert reader.counts.duplicates == 0


def test_two_guests_that_do_the_same_are_two() -> None:
    text = "".join(f"Nov 24 03:08:30 n qemu-kvm[{guest}]: {_EVENT}\n" for guest in (1, 2))
    events = read(reader_of("qemu"), text.encode())
    assert [event.source.guest for event in events] == ["1", "1", "2", "2"]
    assert len({id(event.source) for event in events}) == 2


def test_faults_of_dmesg() -> None:
    text = (
        "[   12.7] DMAR: DRHD: handling fault status reg 2\n"
        "[   12.700010] DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x200000"
        " [fault reason 0x05] PTE Write access is not set\n"
        "DMAR:[DMA Read] Request device [0b:00.1] fault addr 69d9a000\n"
        "DMAR: [DMA Write] Request device [02:00.0] PASID ffffffff fault addr ffe5d000 [fault\n"
        "[   13.000001] vfio-pci 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0012"
        " address=0x200800 flags=0x0020]\n"
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=01:00.0 domain=0x0012 address=0x1000"
        " flags=0x0000]\n"
        "Nov 24 03:08:30 n kernel: DMAR: [DMA Read NO_PASID] Request device [0x00:0x14.0] fault"
        " addr 0x0\n"
    )
    shown = as_shown(read(reader_of("ftrace"), text.encode()))
    assert [each[1:3] + each[4:5] + each[6:] for each in shown] == [
        (12_700_010_000, 2, 0x200000, True, True, "01:00.0"),
        (None, 3, 0x69D9A000, False, True, "0b:00.1"),
        (None, 4, 0xFFE5D000, True, True, "02:00.0"),
        (13_000_001_000, 5, 0x200800, True, True, "0000:01:00.0"),
        (None, 6, 0x1000, False, True, "01:00.0"),
        (_SYSLOG, 7, 0, False, True, "0x00:0x14.0"),
    ]


_MAP = ("Map", "iommu", 0x100000, 0x101000, True, True, 0x11110000, None)
_PRIVATE = ("Attributes", 0x100000, 0x101000, True, "82")
_HEX = "iova=0x0000000000100000 - 0x0000000000101000 paddr=0x0000000011110000 size=4096"


@pytest.mark.parametrize(
    ("line", "time", "expected"),
    [
        # before 2022 (iommu: "Add iova and size as parameters in iommu_map"), without an end
        ("  qemu-82  [001] .....  12.000200: map: IOMMU: iova=0x100000 paddr=0x11110000 size=4096", 12_000_200_000, _MAP),
        ("  qemu-82  [001] .....  123456: map: IOMMU: " + _HEX, 123456, _MAP),
        ("    qemu-82      1d..1.  306us+: map: IOMMU: " + _HEX, 306_000, _MAP),
        ("  qemu-82  [001]  12.000200:      map:                  iova=1048576 paddr=286326784 size=4096", 12_000_200_000, _MAP),
        ("  qemu-82  [001]  12.000200: (+100) map: IOMMU: " + _HEX, 12_000_200_000, _MAP),
        ("  qemu-82  [001]  12.000200 (+100): map: IOMMU: " + _HEX, 12_000_200_000, _MAP),
        ("qemu    82 12.000200: iommu:map: IOMMU: " + _HEX, 12_000_200_000, _MAP),
        ("qemu    82 12.000200123: iommu:map: IOMMU: " + _HEX, 12_000_200_123, _MAP),
        ("     0.100 CPU 0/KVM/82 iommu:map(iova: 1048576, paddr: 286326784, size: 4096)", 100_000, _MAP),
        ("     0.100 ( 0.002 ms): CPU 0/KVM/82 kvm:kvm_vm_set_mem_attributes(start: 256, end: 257, attr: 8)", 100_000, _PRIVATE),
        ("CPU (a-1): b/KVM-82 [001] d..1.  12.000200: kvm_vm_set_mem_attributes: 0x00000000000100 -- 0x00000000000101 [0x8]", 12_000_200_000, _PRIVATE),
        ("  qemu-82 [001]  12.000200: kvm_vm_set_mem_attributes: start=0x100 end=0x101 attr=0x8", 12_000_200_000, _PRIVATE),
    ],
)  # fmt: skip
def test_ways_of_the_kernel(line: str, time: int, expected: tuple[object, ...]) -> None:
    reader = reader_of("ftrace")
    (shown,) = as_shown(read(reader, line.encode()))
    assert (shown[0], *shown[3:]) == expected
    assert shown[1] == time
    assert reader.counts.unreadable_lines == 0
    assert ("clock" in reader.needs) == ("123456:" in line)


def test_perf_trace_leaves_zeros_out() -> None:
    line = b"0.1 x\n 0.100 CPU 0/KVM/82 kvm:kvm_vm_set_mem_attributes(start: 256, end: 257)\n"
    (shown,) = as_shown(read(reader_of("perf"), line))
    assert shown[3:6] == (0x100000, 0x101000, False)


def test_call_chains_are_no_unknown_lines() -> None:
    reader = reader_of("perf")
    read(
        reader, b"\tffffffff8112 iommu_map+0x10 ([kernel.kallsyms])\n\t    7f12 main (/bin/qemu)\n"
    )
    assert reader.counts.unknown == 0


@pytest.mark.parametrize(
    "line",
    [
        "[ 1189.113527] iommu: map: iova 0x6e200000 pa 0x00000004f4800000 size 0x400000",
        "[255267.410514] SEV-SNP: RMPUPDATE failed for PFN 56700, pg_level: 1, ret: 2",
    ],
)
def test_dynamic_debug_is_no_trace(line: str) -> None:
    reader = reader_of("ftrace")
    assert read(reader, line.encode()) == []
    assert not reader.recognized
