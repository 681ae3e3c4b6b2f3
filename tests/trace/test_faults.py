"""Faults of an audit: those of one device and page are one, with the event that took the page."""

import pytest

from made_trace import MS, PAGE, Made, mapped_and_shared, only
from ramblock.trace import faults, judge
from ramblock.trace.events import Access, Attributes, Detach, Discard, Map, Plug, Unmap, VcpuEntry
from ramblock.trace.findings import FindingKind

GPU = "0000:0a:00.0"


def fault(made: Made, ms: float, address: int, device: str | None = GPU) -> Made:
    return made.at(ms, Access, "t", address, None, True, True, device)


def test_a_storm_is_one_finding() -> None:
    made = mapped_and_shared()
    for number in range(5):
        fault(made, 10 + number, 40 * PAGE + 64 * number)
    fault(made, 20, 41 * PAGE)
    fault(made, 21, 40 * PAGE, "0000:0b:00.0")
    fault(made, 22, 40 * PAGE, "0a:00.0")  # Intel's driver prints no domain
    fault(made, 23, 40 * PAGE, None)
    made.at(24, Access, "t", 50 * PAGE, 51 * PAGE, True, False)  # this one was let through
    result = made.audit()
    found = sorted(only(result, FindingKind.FAULT), key=lambda f: f.opened.line)
    assert [(f.device, f.start // PAGE, f.count) for f in found] == [
        (GPU, 40, 6),
        (GPU, 41, 1),
        ("0000:0b:00.0", 40, 1),
        (None, 40, 1),
    ]
    assert (found[0].end, found[0].since, found[0].until) == (41 * PAGE, 10 * MS, 22 * MS)
    assert (found[0].note, found[0].target, found[0].opened.line) == ("", "t", 3)
    assert result.failures() == 0


@pytest.mark.parametrize(
    ("word", "steps"),
    [
        ("unmapped", [(Unmap, "t", 0, 16 * PAGE, 16 * PAGE)]),
        ("made private", [(Unmap, "t", 0, 16 * PAGE), (Attributes, 0, 16 * PAGE, True)]),
        ("unplugged", [(Unmap, "t", 0, 16 * PAGE), (Plug, 0, 16 * PAGE, False)]),
        ("given back to the host", [(Unmap, "x", 0, PAGE, 0), (Discard, 0, 16 * PAGE)]),
    ],
)
@pytest.mark.parametrize("address", [0, 3 * PAGE + 8, 16 * PAGE - 1])
def test_the_cause_is_the_newest_event_that_took_the_page(
    word: str, steps: list[tuple[type, object]], address: int
) -> None:
    made = mapped_and_shared()
    for number, (kind, *fields) in enumerate(steps):
        made.at(100 + number, kind, *fields)
    line = len(made.events)
    made.at(110, Attributes, 90 * PAGE, 91 * PAGE, True)
    fault(made, 150.5, address)
    (finding,) = only(made.audit(), FindingKind.FAULT)
    length = 150.5 - 99 - len(steps)
    assert finding.note == f"{word} {length:.3f} ms before, at made:{line}"


def test_what_is_beside_or_later_is_no_cause() -> None:
    made = mapped_and_shared().at(100, Unmap, "t", 0, 4 * PAGE, 4 * PAGE)
    made.at(101, Unmap, "t", 8 * PAGE, 9 * PAGE, done=False)
    for page in (4, 8):
        fault(made, 110, page * PAGE)
    fault(made, 111, 5 * PAGE)
    made.at(120, Attributes, 5 * PAGE, 6 * PAGE, True)
    assert [f.note for f in only(made.audit(), FindingKind.FAULT)] == ["", "", ""]


def test_the_line_of_one_unmap_in_a_run_and_without_times() -> None:
    made = Made().at(None, Map, "t", 0, 4 * PAGE)
    for page in range(4):
        made.at(None, Unmap, "t", page * PAGE, (page + 1) * PAGE, PAGE)
    fault(made, 0, 2 * PAGE).events[-1].time = None
    (finding,) = only(made.audit(), FindingKind.FAULT)
    assert finding.note == "unmapped before, at made:4"
    assert (finding.since, finding.until) == (None, None)


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_MOST", 3)
    made = mapped_and_shared()
    for page in range(5):
        fault(made, 10, page * PAGE)
    fault(made, 11, 0)
    assert [f.count for f in only(made.audit(), FindingKind.FAULT)] == [2, 1, 1]
    monkeypatch.setattr(judge, "_RECENT", 2)
    made = mapped_and_shared()
    for page in range(3):
        made.at(100 + page * 5, Unmap, "t", page * PAGE, (page + 1) * PAGE, PAGE)
    for page in range(3):
        fault(made, 200, page * PAGE)
    assert [bool(f.note) for f in only(made.audit(), FindingKind.FAULT)] == [False, True, True]


def test_a_trace_of_nothing_but_faults_is_judged() -> None:
    result = fault(Made(), 1, 0).audit()
    assert result.cannot_tell == []
    assert fault(Made(), 1, 0).at(2, Detach, "t").at(3, VcpuEntry, "v").audit().cannot_tell == []
