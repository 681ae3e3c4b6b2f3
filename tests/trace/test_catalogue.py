"""The catalogue of messages: each entry is complete, finds its own message, and no other's."""

import re

import pytest

from message_samples import SAMPLES
from ramblock.trace.messages.catalogue import (
    ENTRIES,
    compiled,
    find_failure,
    find_messages,
    text_of,
)
from ramblock.trace.messages.entry import Entry

_PROGRAMS = ("Cloud Hypervisor", "Linux", "QEMU", "edk2", "kata", "libvirt")
_by_name = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def _names(line: str) -> list[str]:
    told = sorted(find_messages(line.encode()), key=lambda each: each.match.start())
    return [each.entry.name for each in told]


def test_each_has_a_name_and_a_sample_of_its_own() -> None:
    assert len(ENTRIES) >= 40
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert sorted(SAMPLES) == sorted(entry.name for entry in ENTRIES)


@_by_name
def test_a_sample_is_found_as_its_entry_and_as_no_other(entry: Entry) -> None:
    assert _names(SAMPLES[entry.name]) == [entry.name]


@_by_name
def test_an_entry_is_complete(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    for text in (entry.failed, entry.cause, entry.versions, entry.remedy, entry.source):
        assert text == text.strip()
        assert len(text) > 5 or text == "nothing"
        assert not text.endswith(".")
    assert entry.source.startswith(_PROGRAMS)
    for report, address in zip(entry.reports, entry.addresses, strict=True):
        assert re.fullmatch(r"[\w-]+/[\w.-]+#\d+", report)
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+/issues/\d+", address)


@_by_name
def test_what_an_audit_reads_of_it_is_there(entry: Entry) -> None:
    assert entry.about in ("", "map", "unmap", "call", "conversion", "discard", "slot", "device")
    if entry.about:
        assert re.compile(entry.words).groups == (2 if entry.place else 0)
        told = find_failure(SAMPLES[entry.name].encode())
        assert told is not None
        assert told[0] is entry
    else:
        assert not entry.place
        assert find_failure(SAMPLES[entry.name].encode()) is None


@_by_name
def test_the_mark_stands_in_each_line_that_the_pattern_matches(entry: Entry) -> None:
    """Without it the pattern finds nothing, so nothing is lost by looking for the mark first."""
    line = SAMPLES[entry.name].encode()
    mark = entry.mark.encode()
    assert mark in line
    assert compiled(entry).search(line.replace(mark, b"\0")) is None


@_by_name
def test_a_pattern_repeats_nothing_without_bound(entry: Entry) -> None:
    """So a line costs no more than its length, whatever is in it."""
    # Without escaped characters and without sets, which may hold the signs themselves.
    bare = re.sub(r"\[\^?[^\]]+\]", "x", re.sub(r"\\.", "x", entry.words))
    assert not re.search(r"[*+]|\{\d*,\}", bare)


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        ("", ""),
        ("qemu-system-x86_64: ", ""),
        ("2025-12-24T08:00:00.000000Z qemu-kvm: -device vfio-pci,host=0000:21:00.0: ", "\r"),
        # journald, and kata in it
        ("Feb 19 13:46:44 node qemu-system-x86_64[4711]: ", ""),
        (
            'Feb 19 13:46:44 node kata[1]: time="2026-02-19T13:46:44.45+01:00" msg="qemu: ',
            '" name=containerd-shim-v2 pid=1 qemuPid=2 sandbox=sb1 source=virtcontainers',
        ),
        # virt-launcher
        (
            '{"component":"virt-launcher","level":"error","msg":"qemu-kvm: ',
            '","subcomponent":"qemu","timestamp":"2026-11-24T03:08:30.193222Z"}',
        ),
        # kubectl, with colours
        ("2026-11-24T03:08:30.193122345Z [pod/gpu/compute] ", ""),
        ("\x1b[32m", "\x1b[0m"),
        # dmesg
        ("[255267.410514] ", ""),
        ("<4>[   12.3] node kernel: ", ""),
        # docker's JSON, and an event of Kubernetes
        ('{"log":"qemu-system-x86_64: ', '\\n","stream":"stderr"}'),
        ("Warning  Failed  10s  kubelet  Error: failed to create containerd task: ", ": unknown"),
    ],
    ids=range(12),
)
def test_a_message_is_found_in_the_lines_of_loggers(head: str, tail: str) -> None:
    for name, sample in SAMPLES.items():
        assert name in _names(head + sample + tail)


def test_a_line_with_several_messages_has_them_in_their_order() -> None:
    line = (
        f"failed to launch qemu: {SAMPLES['container-not-set-up']}\\n"
        f"{SAMPLES['type1-map-no-entries']}"
    )
    assert _names(line) == [
        "kata-qemu-not-launched",
        "container-not-set-up",
        "type1-map-no-entries",
    ]


def test_the_text_ends_where_its_logger_goes_on() -> None:
    line = b'{"msg":"VFIO_MAP_DMA failed: No space left on device\\n","level":"error"}'
    (told,) = find_messages(line)
    assert text_of(line, told.match, 256) == b"VFIO_MAP_DMA failed: No space left on device"
    line = b'msg="VFIO_MAP_DMA failed: No space left on device" name=containerd-shim-v2'
    (told,) = find_messages(line)
    assert text_of(line, told.match, 256) == b"VFIO_MAP_DMA failed: No space left on device"


def test_words_that_are_no_messages() -> None:
    for line in (
        "DMAR: IOMMU enabled",
        "AMD-Vi: Interrupt remapping enabled",
        "software IO TLB: mapped [mem 0x1000-0x2000] (64MB)",
        "vfio_iommu_type1.dma_entry_limit",
        "iommufd_backend_map_dma  iommufd=20 ioas=2 iova=0x0 size=0x1000 addr=0x7 readonly=0 (0)",
        "VFIO_MAP_DMA",
        "RLIMIT_MEMLOCK",
    ):
        assert _names(line) == []
