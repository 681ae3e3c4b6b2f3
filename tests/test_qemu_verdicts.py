"""
The verdict of `ramblock check` on each recording of QEMU's confidential guests.

Some are wrong. For them the table says which verdict is reached today: whoever repairs one has to
take it out.
"""

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


class Verdict(NamedTuple):
    must: set[Kind]  #: Failures that have to be found.
    may: frozenset[Kind] | set[Kind] = frozenset()  #: Others that may be.
    today: set[Kind] | None = None  #: Those that are found now, where that is wrong,
    why: str = ""  #: and why it is.


_VERDICTS = {
    "qemu-snp-clean.trace": Verdict(set(), set(), {Kind.UNMAP_OF_NOTHING}, _START),
    "qemu-snp-hole.trace": Verdict(set(), set(), {Kind.UNMAP_OF_NOTHING}, _START),
    "qemu-snp-refused-map.trace": Verdict(set(), {Kind.MISSING}, {Kind.UNMAP_OF_NOTHING}, _START),
    "qemu-snp-hot-plug.trace": Verdict(
        set(),
        set(),
        {Kind.DOUBLE_MAP, Kind.UNMAP_OF_NOTHING},
        f"vfio-user's events name no device; {_START}",
    ),
    "qemu-snp-virtio-mem.trace": Verdict(
        {Kind.FREED},
        set(),
        {Kind.FREED, Kind.MISSING, Kind.UNMAP_OF_NOTHING},
        f"unplugged pages count as missing; {_START}",
    ),
    "qemu-snp-reset.trace": Verdict(
        {Kind.STALE}, set(), {Kind.UNMAP_OF_NOTHING}, f"{_RESET}; {_START}"
    ),
    "qemu-snp-border.trace": Verdict(
        {Kind.STALE}, {Kind.MISSING}, {Kind.UNMAP_OF_NOTHING}, f"{_BORDER}; {_START}"
    ),
    "qemu-snp-two-backends.trace": Verdict(
        {Kind.STALE},
        set(),
        {Kind.UNMAP_OF_NOTHING},
        f"a conversion that stopped the guest; {_START}",
    ),
    "qemu-snp-clean-iommufd.trace": Verdict(
        set(),
        set(),
        {Kind.MISSING, Kind.UNMAP_OF_NOTHING},
        f"a page counts as missing; {_START}",
    ),
    "qemu-snp-reset-iommufd.trace": Verdict(
        {Kind.STALE}, set(), {Kind.UNMAP_OF_NOTHING}, f"{_RESET}; {_START}"
    ),
    "qemu-snp-border-iommufd.trace": Verdict(
        {Kind.STALE}, {Kind.MISSING}, {Kind.STALE, Kind.UNMAP_OF_NOTHING}, _START
    ),
    # type1 has no events in QEMU's log: there is nothing to judge, and nothing may be found.
    "qemu-snp-clean-type1.trace": Verdict(set()),
    "qemu-snp-reset-type1.trace": Verdict(set()),
    "qemu-snp-border-type1.trace": Verdict(set()),
    "ftrace-snp-clean-type1.txt": Verdict(set()),
    "ftrace-snp-clean-iommufd.txt": Verdict(set()),
    # The shim shares the firmware's pages in KVM, which nobody maps: missing, and of the double
    # alone.
    "ftrace-snp-reset-type1.txt": Verdict({Kind.STALE}, {Kind.MISSING}),
    "ftrace-snp-reset-iommufd.txt": Verdict({Kind.STALE}, {Kind.MISSING}),
    "ftrace-snp-border-type1.txt": Verdict({Kind.STALE}, {Kind.MISSING}),
    "ftrace-snp-border-iommufd.txt": Verdict({Kind.STALE}, {Kind.MISSING}),
}


@pytest.mark.parametrize("name", _VERDICTS)
def test_verdict(name: str) -> None:
    verdict = _VERDICTS[name]
    result = check_file(str(_DATA / f"{name}.gz"))

    assert result.error is None
    found = {kind for kind in result.counts if kind in FAILURES}
    if verdict.today is not None:
        assert found == verdict.today, "another verdict: is it right now? Then `today` goes"
        pytest.xfail(verdict.why)
    assert verdict.must <= found <= verdict.must | verdict.may


def test_a_verdict_of_today_is_a_wrong_one() -> None:
    for name, (must, may, today, why) in _VERDICTS.items():
        assert (today is not None) == bool(why), name
        assert today is None or not must <= today <= must | may, name


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
