"""
Inputs in the shape of public reports, as people attach them: the verdict of each.

The files are in tests/data/reports; what each is like is beside its verdict. They were written for
these tests in the forms of the reports: loggers' prefixes, kernels and QEMU versions of their time.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from ramblock.check import CheckOptions, check_file, check_merged
from ramblock.check.verdict import judge
from ramblock.trace.events import Block
from ramblock.trace.findings import FindingKind as Kind

_REPORTS = Path(__file__).parent.parent / "data" / "reports"
_LAYOUT = (Block(name="ram", start=0, end=2 << 30, confidential=True),)


class Report(NamedTuple):
    like: str
    code: int
    #: Kind and address of what has to be found.
    found: tuple[tuple[Kind, int], ...] = ()
    options: CheckOptions = CheckOptions()


_STALE = ((Kind.STALE, 0x100000),)
_REPORTED = Kind.REPORTED
REPORTS = {
    "01-state-words-stale.trace": Report("QEMU's words for page states", 1, _STALE),
    "01b-state-words-stale-layout.trace": Report(
        "the same without memory slots", 1, _STALE, CheckOptions(layout=_LAYOUT)
    ),
    "02-state-words-clean.trace": Report("the same, and clean", 0),
    "03-whole-second.trace": Report("GLib's time without a fraction", 0),
    "04-notify-discard-failed.log": Report("an unmap that failed, without its address", 1, _STALE),
    "05-type1-region-add.trace": Report("type1 before 10.1, uncoordinated", 1, _STALE),
    "06-thread-prefix.trace": Report("-msg guest-name, and the thread", 1, _STALE),
    "07-qemu-trace-stap.txt": Report("qemu-trace-stap", 1, _STALE),
    "08-journal.txt": Report("journalctl -o short-iso-precise", 1, _STALE),
    "09-kata-shim.log": Report("kata's shim", 1, _STALE),
    "10-kubectl-ansi-crlf.log": Report("kubectl logs, colours, CR LF", 1, _STALE),
    "11-trace-marker.txt": Report("QEMU's ftrace backend", 1, _STALE),
    "12-two-guests.txt": Report("two guests of one host", 0),
    "13-host-dma-api.txt": Report("the host's own drivers map in QEMU's threads", 0),
    "14-old-kernel-map.txt": Report("iommu:map without an end", 1, _STALE),
    "16-dmesg-mixed.txt": Report("dmesg among the events", 1, ((Kind.FAULT, 0x200000),)),
    "16b-dmesg-only.txt": Report("dmesg alone", 0, ((Kind.FAULT, 0x200000),)),
    "17-perf-trace.txt": Report("perf trace", 0),
    "17b-perf-script-no-cpu.txt": Report("perf script without a CPU", 1, _STALE),
    "19-qemu-8.2-iommufd.trace": Report(
        "QEMU 8.2 without a private side", 1, (*_STALE, (Kind.FREED, 0x100000))
    ),
    "20-simpletrace-py.txt": Report("simpletrace.py; it ends in a conversion", 1, _STALE),
    "21-vfio-ap-iommufd.log": Report("a device that is given up again", 0),
    "22-unmap-all.trace": Report("an unmap of everything", 0),
    "23-dmabuf-console.log": Report("a device's own memory, and the guest's console", 0),
    "24-warning-and-event-on-one-line.log": Report(
        "a warning without an end of line", 1, ((Kind.STALE, 0x4000000),)
    ),
    "26-region-added-twice.log": Report(
        "a ROM over RAM, before 5.2", 1, ((Kind.DOUBLE_MAP, 0xC0000), (_REPORTED, 0xC0000))
    ),
    "27-type1-start.txt": Report("type1 tries for huge pages", 0),
    "28-fault-after-unmap.txt": Report(
        "a fault 6 ms after its unmap", 0, ((Kind.FAULT, 0xFE980000),)
    ),
    "29-iommu-dyndbg-dmesg.txt": Report("drivers/iommu's debug messages", 3),
    "30-viommu.trace": Report("the guest has an IOMMU", 0),
    "31-bar-above-iommu-width.log": Report(
        "a BAR above the IOMMU's width", 1, ((_REPORTED, 0x380000000000),)
    ),
    "32-kubevirt-discard-broken.log": Report("a device that needs all RAM", 3),
    "33-rmpupdate-dmesg.txt": Report("RMPUPDATE failed", 3),
    "34-sparse-unmap.bt.txt": Report("one unmap over a gap", 0),
    "36-three-slots.trace": Report("slots of one guest_memfd", 1, ((Kind.STALE, 0x100100000),)),
    "37-console-300k.log.gz": Report("300 KiB of a console before the first event", 1, _STALE),
    "38-perf-callchain.txt": Report("perf script with call chains", 1, _STALE),
    "41-two-domains-unmap.txt": Report("two domains, runs of other lengths", 0),
    "42-virt-launcher.jsonl": Report("KubeVirt's virt-launcher", 1, _STALE),
    "43-slow-attribute.trace": Report("a conversion of 15 ms", 0),
    "44-kata-journal-bar.log": Report(
        "one failed map, told four times", 1, ((_REPORTED, 0xFA800000),)
    ),
    "45-proxmox-journal.log": Report("Proxmox's journal", 1, ((_REPORTED, 0x3FFC00000000),)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_verdict(name: str) -> None:
    report = REPORTS[name]
    result = check_file(str(_REPORTS / name), report.options)
    assert judge(result, strict=False).exit_code == report.code, report.like
    for kind, page in report.found:
        assert any(
            finding.kind is kind and finding.start <= page < finding.end
            for finding in result.findings
        )
    if report.code == 0:
        assert result.failures() == 0


def test_logs_by_thread_of_one_qemu() -> None:
    """``-d tid -D qemu-%d.log``: who maps and who has the slots are different files."""
    names = [str(_REPORTS / f"39-tid-{tid}.log") for tid in (4711, 4712)]
    result = check_merged(names, CheckOptions(), [0, 0])
    assert [(finding.kind, finding.start) for finding in result.findings] == [*_STALE]
    alone = check_file(names[0])
    assert judge(alone, strict=False).exit_code == 4


def test_details() -> None:
    viommu = check_file(str(_REPORTS / "30-viommu.trace"))
    assert any("IOVAs are not guest addresses" in limit for limit in viommu.limits)
    (fault,) = check_file(str(_REPORTS / "28-fault-after-unmap.txt")).findings
    assert fault.note.startswith("unmapped 6.176 ms before")
    (storm,) = (
        each
        for each in check_file(str(_REPORTS / "16b-dmesg-only.txt")).findings
        if each.kind is Kind.FAULT
    )
    assert (storm.device, storm.count) == ("01:00.0", 2)
    assert len(check_file(str(_REPORTS / "44-kata-journal-bar.log")).findings) == 1
    unknown = check_file(str(_REPORTS / "33-rmpupdate-dmesg.txt"))
    assert "its format is not known" in str(unknown.error)


def test_each_report_has_a_verdict() -> None:
    files = {path.name for path in _REPORTS.iterdir()}
    assert files == {*REPORTS, "39-tid-4711.log", "39-tid-4712.log"}
