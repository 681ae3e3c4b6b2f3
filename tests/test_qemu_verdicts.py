"""The verdict of `ramblock check` on each recording of QEMU's confidential guests."""

import gzip
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from ramblock.check import check_file, check_merged
from ramblock.check.job import CheckOptions
from ramblock.trace.findings import FAILURES
from ramblock.trace.findings import FindingKind as Kind
from ramblock.trace.readers.qemu_meaning import MIXTURE as _MIXTURE
from ramblock.trace.readers.qemu_meaning import STATES as _STATES
from ramblock.units import PAGE_SIZE

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


class Verdict(NamedTuple):
    found: dict[Kind, int]  #: Failures that have to be found, each with its bytes in pages.
    may: frozenset[Kind] | set[Kind] = frozenset()  #: Others that may be.


#: Of the unmap of all RAM at a start, when nothing is mapped: a note.
_START = {Kind.UNMAP_OF_NOTHING}
#: The shim shares the firmware's pages in KVM, which nobody maps: of the double alone.
_FIRMWARE = {Kind.MISSING}
_VERDICTS = {
    "qemu-snp-clean.trace": Verdict({}),
    "qemu-snp-hole.trace": Verdict({}),
    "qemu-snp-refused-map.trace": Verdict({}, {Kind.MISSING}),
    "qemu-snp-hot-plug.trace": Verdict({}),
    "qemu-snp-virtio-mem.trace": Verdict({}),
    "qemu-snp-reset.trace": Verdict({Kind.STALE: 16}),
    "qemu-snp-border.trace": Verdict({Kind.STALE: 8}, {Kind.MISSING}),
    # "invalid range", but the attributes are set: the guest is stopped with both mapped.
    "qemu-snp-two-backends.trace": Verdict({Kind.STALE: 32}),
    "qemu-snp-clean-iommufd.trace": Verdict({}),
    "qemu-snp-reset-iommufd.trace": Verdict({Kind.STALE: 16}),
    "qemu-snp-border-iommufd.trace": Verdict({Kind.STALE: 8}, {Kind.MISSING}),
    # Type1 has no events in QEMU's log: its mappings follow the page states.
    "qemu-snp-clean-type1.trace": Verdict({}),
    "qemu-snp-reset-type1.trace": Verdict({Kind.STALE: 16}),
    "qemu-snp-border-type1.trace": Verdict({Kind.STALE: 8}, {Kind.MISSING}),
    "ftrace-snp-clean-type1.txt": Verdict({}),
    "ftrace-snp-clean-iommufd.txt": Verdict({}),
    "ftrace-snp-reset-type1.txt": Verdict({Kind.STALE: 16}, _FIRMWARE),
    "ftrace-snp-reset-iommufd.txt": Verdict({Kind.STALE: 16}, _FIRMWARE),
    "ftrace-snp-border-type1.txt": Verdict({Kind.STALE: 8}, _FIRMWARE),
    "ftrace-snp-border-iommufd.txt": Verdict({Kind.STALE: 8}, _FIRMWARE),
}


@pytest.mark.parametrize("name", _VERDICTS)
def test_verdict(name: str) -> None:
    verdict = _VERDICTS[name]
    result = check_file(str(_DATA / f"{name}.gz"))

    assert (result.error, result.cannot_tell) == (None, [])
    assert result.judged_bytes > 0
    found = {
        kind: count.size // PAGE_SIZE
        for kind, count in result.counts.items()
        if kind in FAILURES and kind not in verdict.may
    }
    assert found == verdict.found
    assert set(result.counts) <= {*found, *verdict.may, Kind.TRANSITIONAL, *_START}


def test_each_recording_of_a_confidential_guest_has_a_verdict() -> None:
    recordings = {
        path.name.removesuffix(".gz")
        for kind in ("qemu", "ftrace")
        for path in _DATA.glob(f"{kind}-snp-*")
    }
    assert recordings == set(_VERDICTS)


@pytest.mark.parametrize("name", _BOTH)
def test_recordings_of_one_run_can_be_merged_by_their_clocks(name: str) -> None:
    qemu, kernel = (_DATA / f"{kind}.gz" for kind in _files(name))
    clock = int(gzip.decompress((_DATA / f"clock-snp-{name}.txt.gz").read_bytes()))
    result = check_merged([str(qemu), str(kernel)], CheckOptions(), [0, clock])

    # Each conversion is in both: QEMU tells of it after KVM has told of the hypercall.
    assert result.error is None
    merged = result.by_event
    assert merged["kvm_convert_memory"] == merged["kvm_hypercall"] > 1
    assert (Kind.STALE in result.counts) is not name.startswith("clean")
    if name.startswith("clean"):
        assert result.failures() == 0


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


def test_reader_knows_the_words_of_the_recordings_and_no_others() -> None:
    befores, afters = set(), set()
    for path in _DATA.glob("qemu-snp-*.trace.gz"):
        for before, after in re.findall(
            rb"from '(\w*)' to '(\w*)'", gzip.decompress(path.read_bytes())
        ):
            befores.add(before)
            afters.add(after)

    assert befores == {*_STATES, _MIXTURE}
    assert afters == set(_STATES)
