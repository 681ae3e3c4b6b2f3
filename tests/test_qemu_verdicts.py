"""
What the recordings of QEMU's confidential guests are, and which verdict `ramblock check` has to
come to on each.

Verdicts that it does not reach are marked as expected failures, strictly: whoever repairs one has
to take its mark away.
"""

import gzip
import json
import re
from pathlib import Path

import pytest

from ramblock.check import check_file, check_merged
from ramblock.check.job import CheckOptions
from ramblock.trace.findings import FAILURES
from ramblock.trace.findings import FindingKind as Kind

_DATA = Path(__file__).parent / "data"
_CALL = re.compile(r"vfio_user_dma_(map|unmap) +iova (0x[0-9a-f]+) size (0x[0-9a-f]+) ")
_PRETEND = ("border", "clean", "hole", "reset", "refused-map", "two-backends", "virtio-mem")
_BOTH = (
    "border-iommufd",
    "border-type1",
    "clean-iommufd",
    "clean-type1",
    "reset-iommufd",
    "reset-type1",
)

_START = "the unmap of all RAM at a start, when nothing is mapped, is taken for a fault"
_RESET = "a reset is not recognised: a new VM, all of whose pages are private"
_BORDER = "pages of the second region count as part of a conversion that goes on"

Verdict = tuple[str, set[Kind], set[Kind], str | None]
# Recording; kinds of failures that have to be found; others that may be; why it is not so (None: it
# is).
_VERDICTS: list[Verdict] = [
    ("qemu-snp-clean.trace", set(), set(), _START),
    ("qemu-snp-hole.trace", set(), set(), _START),
    ("qemu-snp-hot-plug.trace", set(), set(), "vfio-user's events name no device"),
    ("qemu-snp-virtio-mem.trace", {Kind.FREED}, set(), "unplugged pages count as missing"),
    ("qemu-snp-reset.trace", {Kind.STALE}, set(), _RESET),
    ("qemu-snp-border.trace", {Kind.STALE}, {Kind.MISSING}, _BORDER),
    ("qemu-snp-two-backends.trace", {Kind.STALE}, set(), "a conversion that stopped the guest"),
    ("qemu-snp-clean-iommufd.trace", set(), set(), _START),
    ("qemu-snp-reset-iommufd.trace", {Kind.STALE}, set(), _RESET),
    ("qemu-snp-border-iommufd.trace", {Kind.STALE}, {Kind.MISSING}, _BORDER),
    # type1 has no events in QEMU's log: there is nothing to judge, and nothing may be found.
    ("qemu-snp-clean-type1.trace", set(), set(), None),
    ("qemu-snp-reset-type1.trace", set(), set(), None),
    ("qemu-snp-border-type1.trace", set(), set(), None),
    ("ftrace-snp-clean-type1.txt", set(), set(), None),
    ("ftrace-snp-clean-iommufd.txt", set(), set(), None),
    # The shim shares the firmware's pages in KVM, which nobody maps: missing, and of the double
    # alone.
    ("ftrace-snp-reset-type1.txt", {Kind.STALE}, {Kind.MISSING}, None),
    ("ftrace-snp-reset-iommufd.txt", {Kind.STALE}, {Kind.MISSING}, None),
    ("ftrace-snp-border-type1.txt", {Kind.STALE}, {Kind.MISSING}, None),
    ("ftrace-snp-border-iommufd.txt", {Kind.STALE}, {Kind.MISSING}, None),
]


def _cases() -> list[object]:
    return [
        pytest.param(
            name,
            must,
            may,
            id=name,
            marks=[] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)],
        )
        for name, must, may, reason in _VERDICTS
    ]


@pytest.mark.parametrize(("name", "must", "may"), _cases())
def test_verdict(name: str, must: set[Kind], may: set[Kind]) -> None:
    result = check_file(str(_DATA / f"{name}.gz"))

    assert result.error is None
    found = {kind for kind in result.counts if kind in FAILURES}
    assert must <= found <= must | may


@pytest.mark.parametrize("name", _BOTH)
def test_recordings_of_one_run_can_be_merged_by_their_clocks(name: str) -> None:
    qemu, kernel = (_DATA / f"{kind}.gz" for kind in _files(name))
    clock = int(gzip.decompress((_DATA / f"clock-snp-{name}.txt.gz").read_bytes()))
    result = check_merged([str(qemu), str(kernel)], CheckOptions(), [0, clock])

    # Each conversion is in both: QEMU tells of it after KVM has told of the hypercall.
    assert result.error is None
    merged = result.by_event
    assert merged["kvm_convert_memory"] == merged["kvm_hypercall"] > 1
    stale = Kind.STALE in result.counts
    assert stale is not name.startswith("clean")


def _files(name: str) -> tuple[str, str]:
    return f"qemu-snp-{name}.trace", f"ftrace-snp-{name}.txt"


@pytest.mark.parametrize("name", _PRETEND)
def test_probe_and_qemu_tell_of_the_same_calls(name: str) -> None:
    log = gzip.decompress((_DATA / f"qemu-snp-{name}.trace.gz").read_bytes()).decode()
    by_qemu = [(m[1], int(m[2], 16), int(m[3], 16)) for m in _CALL.finditer(log)]
    trace = gzip.decompress((_DATA / f"probe-snp-{name}.jsonl.gz").read_bytes())
    kinds = {"too_many": "map", "not_mapped": "unmap"}
    by_probe = [
        (kinds.get(event.get("rule", ""), event["event"]), event["iova"], event["size"])
        for event in map(json.loads, trace.splitlines())
        if event["event"] in ("map", "unmap") or event.get("rule") in kinds
    ]

    assert len(by_qemu) > 4
    assert by_probe == by_qemu


def test_words_of_the_recordings_are_those_of_the_reader() -> None:
    words = set()
    for path in _DATA.glob("qemu-snp-*.trace.gz"):
        text = gzip.decompress(path.read_bytes()).decode()
        words |= set(re.findall(r"from '(\w*)' to '(\w*)'", text))

    assert words == {
        ("discarded", "populated"),
        ("populated", "discarded"),
        ("mixture", "populated"),
        ("mixture", "discarded"),
        ("discarded", "discarded"),
        ("populated", "populated"),
    }
