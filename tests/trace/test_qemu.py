"""QEMU's text trace, event by event."""

import pytest

from trace_samples import Shown, as_shown, read, reader_of

_ISO = "2026-11-24T03:08:23.736102Z "
_TIME = 1795489703_736102000


def _shown(text: str, **options: int) -> list[Shown]:
    reader = reader_of("qemu", **options)
    shown = as_shown(read(reader, text.encode()))
    assert reader.counts.unknown == 0, reader.counts.examples
    return shown


# (what QEMU writes, the events without time and line)
_LINES: list[tuple[str, list[Shown]]] = [
    (
        "kvm_convert_memory start 0x100000 size 0x2000 shared_to_private",
        [
            ("Conversion", 0x100000, 0x102000, True, None),
            ("Attributes", 0x100000, 0x102000, True, None),
        ],
    ),
    (
        "kvm_convert_memory start 0x0 size 0x1000 private_to_shared",
        [("Conversion", 0, 0x1000, False, None), ("Attributes", 0, 0x1000, False, None)],
    ),
    (
        (
            "ram_block_attributes_state_change offset 0x1000 size 0x3000"
            " from 'populated' to 'discarded'"
        ),
        [("StateChange", None, 0x1000, 0x4000, True)],
    ),
    (
        "ram_block_discard_range pc.ram@0x7f0000000000 + 0x1000: madvise: 1 fallocate: 0 ret: 0",
        [("Discard", 0x7F0000000000, 0x7F0000001000, True, 0x7F0000000000, True)],
    ),
    (
        (
            "ram_block_discard_shared_range pc.ram@0x7f0000000000 + 0x1000: madvise: 1 fallocate:"
            " 0 ret: -22"
        ),
        [("Discard", 0x7F0000000000, 0x7F0000001000, True, 0x7F0000000000, False)],
    ),
    (
        (
            "iommufd_backend_map_dma  iommufd=10 ioas=2 iova=0x4000 size=0x1000 addr=0x7f0000004000"
            " readonly=1 (0)"
        ),
        [("Map", "iommufd=10 ioas=2", 0x4000, 0x5000, False, True, None, 0x7F0000004000)],
    ),
    (
        (
            "iommufd_backend_map_dma  iommufd=10 ioas=2 iova=0x4000 size=0x1000 addr=0x7f0000004000"
            " readonly=0 (-17)"
        ),
        [("Map", "iommufd=10 ioas=2", 0x4000, 0x5000, True, False, None, 0x7F0000004000)],
    ),
    (
        (
            "iommufd_backend_map_file_dma  iommufd=10 ioas=2 iova=0x4000 size=0x1000 fd=9"
            " start=4096 readonly=0 (0)"
        ),
        [("Map", "iommufd=10 ioas=2", 0x4000, 0x5000, True, True, None, None)],
    ),
    (
        "iommufd_backend_unmap_dma  iommufd=10 ioas=2 iova=0x4000 size=0x1000 (0)",
        [("Unmap", "iommufd=10 ioas=2", 0x4000, 0x5000, None, True)],
    ),
    (
        "iommufd_backend_unmap_dma  iommufd=10 ioas=2 iova=0x4000 size=0x1000 (-16)",
        [("Unmap", "iommufd=10 ioas=2", 0x4000, 0x5000, None, False)],
    ),
    (
        # The kernel says ENOENT also when the range cuts a mapping, which stays.
        (
            "iommufd_backend_unmap_dma_non_exist  Unmap nonexistent mapping:"
            " iommufd=10 ioas=2 iova=0x4000 size=0x1000 (0)"
        ),
        [("Unmap", "iommufd=10 ioas=2", 0x4000, 0x5000, 0, True)],
    ),
    ("iommufd_backend_alloc_ioas  iommufd=10 ioas=2", [("Attach", "iommufd=10 ioas=2", None)]),
    ("iommufd_backend_free_id  iommufd=10 id=2 (0)", [("Detach", "iommufd=10 ioas=2")]),
    ("iommufd_backend_free_id  iommufd=10 id=2 (-16)", []),
    (
        "vfio_user_dma_map  iova 0xfffc0000 size 0x40000 off 0x0 flags 0x1 async_ops 1",
        [("Map", "vfio-user", 0xFFFC0000, 0x100000000, False, True, None, None)],
    ),
    (
        "vfio_user_dma_unmap  iova 0x0 size 0x1000 flags 0x0 async_ops 1",
        [("Unmap", "vfio-user", 0, 0x1000, None, True)],
    ),
    # Known, and of no meaning for the audit.
    ("kvm_memory_fault start 0x0 size 0x1000 flags 0x8", []),
    (
        "vfio_listener_region_add_ram region_add [ram] 0x0 - 0x1fffffff [0x7f0d6ffff000]",
        [("Region", 0, 0x20000000, True, 0x7F0D6FFFF000)],
    ),
    (
        "vfio_listener_region_del region_del 0xfef00000 - 0xffffffffffffffff",
        [("Region", 0xFEF00000, 1 << 64, False, None)],
    ),
    ("vfio_listener_region_add_iommu region_add [iommu] vtd 0x0 - 0xfedfffff", [("Viommu",)]),
    ("vfio_listener_region_add_iommu region_add [iommu] 0x0 - 0xfedfffff", [("Viommu",)]),
    ("vfio_iommu_map_notify iommu UNMAP @ 0xfffff000 - 0xffffffff", [("Viommu",)]),
    ("kvm_sev_init ", [("Reset",)]),
    ("tdx_handle_reset ", [("Reset",)]),
    ("iommufd_backend_alloc_ioas  iommufd=10 ioas=2 (0)", [("Attach", "iommufd=10 ioas=2", None)]),
    ("iommufd_backend_alloc_ioas  iommufd=10 ioas=2 (-28)", []),
    ("virtio_mem_resized_usable_region old_size=0x0new_size=0x0", []),
    ('vfio_user_version  major 0 minor 0 caps: {"capabilities": {}}', []),
]


@pytest.mark.parametrize(("line", "expected"), _LINES)
@pytest.mark.parametrize(
    ("stamp", "time"), [("", None), (_ISO, _TIME), ("1234@17.000042:", 17_000_042_000)]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line(stamp: str, time: int | None, line: str, expected: list[Shown], end: str) -> None:
    # The number before the @ is a thread's, and only these two events have one.
    thread = "1234" if "@" in stamp else None
    wanted = [
        (*each[1:-1], thread) if each[0] in ("Conversion", "Attributes") else each[1:]
        for each in expected
    ]
    assert [shown[3:] for shown in _shown(stamp + line + end)] == wanted
    for shown, each in zip(_shown(stamp + line + end), expected, strict=True):
        assert shown[:3] == (each[0], time, 1)


def test_slots_tell_where_memory_is() -> None:
    """
    kvm_set_user_memory: a slot that is set again replaces what it was, size 0 removes it.

    SMM's address space is a copy.
    """
    text = (
        "kvm_set_user_memory AddrSpace#0 Slot#3 flags=0x4 gpa=0x100000000 size=0x40000000"
        " ua=0x7f0000000000"
        " guest_memfd=12 guest_memfd_offset=0x1000 ret=0\n"
        "kvm_set_user_memory AddrSpace#1 Slot#3 flags=0x4 gpa=0x100000000 size=0x40000000"
        " ua=0x7f0000000000"
        " guest_memfd=-1 guest_memfd_offset=0x0 ret=0\n"
        "kvm_set_user_memory AddrSpace#0 Slot#4 flags=0x0 gpa=0x0 size=0x1000 ua=0x7f0000000000"
        " guest_memfd=-1 guest_memfd_offset=0x0 ret=-22\n"
        "kvm_set_user_memory AddrSpace#0 Slot#3 flags=0x0 gpa=0x100000000 size=0x0"
        " ua=0x7f0000000000"
        " guest_memfd=-1 guest_memfd_offset=0x0 ret=0\n"
    )
    placed, removed = _shown(text)
    blocks = placed[3]
    assert isinstance(blocks, tuple)
    (block,) = blocks
    assert (block.start, block.end, block.offset) == (1 << 32, (1 << 32) + (1 << 30), 0x1000)
    assert (block.confidential, block.host) == (True, 0x7F0000000000)
    assert (removed[3], removed[6]) == ((block,), True)


_PLUG = (
    "virtio_mem_plug_request addr=0x100000000 nb_blocks=2\n"
    "virtio_mem_send_response type=0\n"
    "virtio_mem_plug_request addr=0x100400000 nb_blocks=1\n"
    "virtio_mem_send_response type=1\n"  # NACK
    "virtio_mem_unplug_request addr=0x100000000 nb_blocks=1\n"
    "virtio_mem_send_response type=0\n"
    "virtio_mem_unplugged_all \n"
)


def test_plugging_counts_when_it_is_acknowledged() -> None:
    start = 1 << 32
    shown = _shown(_PLUG, virtio_mem_block_size=2 << 20)
    assert [(each[0], *each[3:]) for each in shown] == [
        ("PlugRequest", start, start + (4 << 20), True),
        ("Plug", start, start + (4 << 20), True, True),
        ("PlugRequest", start + (4 << 20), start + (6 << 20), True),
        ("Plug", start + (4 << 20), start + (6 << 20), True, False),
        ("PlugRequest", start, start + (2 << 20), False),
        ("Plug", start, start + (2 << 20), False, True),
        ("Plug", start, start + (4 << 20), False, True),
    ]


def test_without_the_size_of_blocks_it_says_what_is_missing() -> None:
    reader = reader_of("qemu")
    shown = as_shown(read(reader, _PLUG.encode()))
    # Which block of RAM it is about is known all the same.
    assert {each[0] for each in shown} == {"PlugRequest"}
    assert all(each[3] == each[4] for each in shown)
    assert "--virtio-mem-block" in reader.needs["virtio-mem"]


def test_memory_that_is_given_back_tells_the_size_of_blocks() -> None:
    """tests/data/qemu-snp-virtio-mem.trace.gz: unplugging gives back as much as was asked for."""
    text = (
        "virtio_mem_unplug_request addr=0x108000000 nb_blocks=64\n"
        "ram_block_discard_shared_range vm@0x7fb7a7ffe000 + 0x8000000: madvise: 1 fallocate: 1"
        " ret: 0\n"
        "virtio_mem_send_response type=0\n"
        "virtio_mem_plug_request addr=0x100000000 nb_blocks=1\n"
    )
    shown = [each for each in _shown(text) if each[0] != "Discard"]
    assert [(each[0], *each[3:]) for each in shown] == [
        ("PlugRequest", 0x108000000, 0x108000000, False),
        ("PlugRequest", 0x108000000, 0x110000000, False),
        ("Plug", 0x108000000, 0x110000000, False, True),
        ("PlugRequest", 0x100000000, 0x100200000, True),
    ]


def test_messages_about_failures() -> None:
    """QEMU reports a mapping that failed as a message, not as an event (PEERS.md, 1.10)."""
    text = (
        "vfio_user_dma_unmap  iova 0x108000000 size 0x8000000 flags 0x0 async_ops 1\n"
        f"{_ISO}qemu-system-x86_64: vfio_container_dma_unmap(0x55d0, 0x108000000,"
        " 0x8000000) = -22 (Invalid argument)\n"
        "qemu-system-x86_64: vfio_container_dma_map(0x55d0, 0x1000, 0x2000,"
        " 0x7f00) = -17 (File exists)\n"
    )
    _, unmap, map_ = _shown(text)
    assert unmap[1] == _TIME
    assert unmap[3] == "unmap failed"
    assert unmap[5:] == ("vfio-user", 0x108000000, 0x110000000, True, False)
    assert map_[3] == "map failed"
    assert map_[5:] == ("vfio-user", 0x1000, 0x3000, False, False)


def test_other_lines_are_counted() -> None:
    reader = reader_of("qemu")
    text = "SeaBIOS (version 1.16)\n\nkvm_convert_memory start 0xzz\nkvm_convert_memory\n" * 40
    assert read(reader, text.encode()) == []
    counts = reader.counts
    assert (counts.lines, counts.unknown, counts.unreadable_lines) == (160, 40, 80)
    assert counts.examples[0] == (1, "SeaBIOS (version 1.16)")
    assert counts.unreadable[:2] == [
        (3, "kvm_convert_memory start 0xzz"),
        (4, "kvm_convert_memory"),
    ]
    assert (len(counts.examples), len(counts.unreadable)) == (5, 80)


def test_a_date_that_is_none() -> None:
    shown = _shown("2026-99-99T03:08:23.000001Z iommufd_backend_alloc_ioas  iommufd=1 ioas=2\n")
    assert shown[0][0] == "Attach"


@pytest.mark.parametrize(
    ("before", "after", "private"),
    [
        ("discarded", "populated", False),
        ("populated", "discarded", True),
        ("mixture", "populated", False),
        ("mixture", "discarded", True),
        ("populated", "populated", False),
        ("discarded", "discarded", True),
    ],
)
def test_words_of_a_state_change(before: str, after: str, *, private: bool) -> None:
    (shown,) = _shown(_state_change(before, after))
    assert shown[3:] == (None, 0x1000, 0x2000, private)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("shared", "discarded", "shared"),
        ("populated", "private", "private"),
        ("populated", "mixture", "mixture"),
        ("", "populated", ""),
    ],
)
@pytest.mark.parametrize("end", ["\n", ""], ids=["whole line", "last line"])
def test_unknown_word_of_a_state_change_is_no_state(
    before: str, after: str, word: str, end: str
) -> None:
    """It is counted by its line, and the reading goes on."""
    good = _state_change("discarded", "populated")
    bad = _state_change(before, after).rstrip("\n") + end
    reader = reader_of("qemu")
    events = read(reader, (good + "SeaBIOS\n" + bad + (good if end else "")).encode())

    assert len(events) == (2 if end else 1)
    assert reader.counts.unreadable_lines == 1
    ((line, text),) = reader.counts.unreadable
    assert line == 3
    assert f"'{word}'" in text


def _state_change(before: str, after: str) -> str:
    return (
        "ram_block_attributes_state_change offset 0x1000 size 0x1000 "
        f"from '{before}' to '{after}'\n"
    )
