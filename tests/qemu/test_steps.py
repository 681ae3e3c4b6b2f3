"""
The table of QEMU's steps and words, held against the running binary: a QEMU that differs is
noticed, and where.

What our readers of traces take for QEMU's words (ramblock.trace) are these.
"""

from typing import NamedTuple

import pytest

from lab.qemu_double import KIB, MIB, Double, GuestOptions, Technology
from lab.qemu_double.log import joined
from qemu_steps import compare_steps


class Row(NamedTuple):
    """One conversion, and what QEMU does."""

    title: str
    gpa: int
    size: int
    private: bool
    steps: tuple[str, ...]


def _change(offset: int, size: int, before: str, after: str) -> str:
    where = f"offset {offset:#x} size {size:#x}"
    return f"ram_block_attributes_state_change {where} from '{before}' to '{after}'"


# One guest of 64 MiB, from the top; each row starts from what those before have left.
TABLE = (
    Row("a page to shared", 2 * MIB, 4 * KIB, False, (
        "kvm_convert_memory start 0x200000 size 0x1000 private_to_shared",
        _change(0x200000, 0x1000, "discarded", "populated"),
        "vfio_user_dma_map [0x200000, 0x201000) in 1 calls",
    )),
    Row("and back", 2 * MIB, 4 * KIB, True, (
        "kvm_convert_memory start 0x200000 size 0x1000 shared_to_private",
        _change(0x200000, 0x1000, "populated", "discarded"),
        "vfio_user_dma_unmap [0x200000, 0x201000) in 1 calls",
        "ram_block_discard_shared_range ram@HVA + 0x1000: madvise: 1 fallocate: 1 ret: 0",
    )),
    Row("2 MiB to shared: a map for each page", 4 * MIB, 2 * MIB, False, (
        "kvm_convert_memory start 0x400000 size 0x200000 private_to_shared",
        _change(0x400000, 0x200000, "discarded", "populated"),
        "vfio_user_dma_map [0x400000, 0x600000) in 512 calls",
    )),
    Row("a part of it to private", 4 * MIB + 64 * KIB, 16 * KIB, True, (
        "kvm_convert_memory start 0x410000 size 0x4000 shared_to_private",
        _change(0x410000, 0x4000, "populated", "discarded"),
        "vfio_user_dma_unmap [0x410000, 0x414000) in 1 calls",
        "ram_block_discard_shared_range ram@HVA + 0x4000: madvise: 1 fallocate: 1 ret: 0",
    )),
    Row("a mixture to shared: only the pages that are not", 4 * MIB, 2 * MIB, False, (
        "kvm_convert_memory start 0x400000 size 0x200000 private_to_shared",
        _change(0x400000, 0x200000, "mixture", "populated"),
        "vfio_user_dma_map [0x410000, 0x414000) in 4 calls",
    )),
    Row("2 MiB to private: one unmap", 4 * MIB, 2 * MIB, True, (
        "kvm_convert_memory start 0x400000 size 0x200000 shared_to_private",
        _change(0x400000, 0x200000, "populated", "discarded"),
        "vfio_user_dma_unmap [0x400000, 0x600000) in 1 calls",
        "ram_block_discard_shared_range ram@HVA + 0x200000: madvise: 1 fallocate: 1 ret: 0",
    )),
    Row("16 KiB to shared", 8 * MIB, 16 * KIB, False, (
        "kvm_convert_memory start 0x800000 size 0x4000 private_to_shared",
        _change(0x800000, 0x4000, "discarded", "populated"),
        "vfio_user_dma_map [0x800000, 0x804000) in 4 calls",
    )),
    Row("a mixture to private: page by page", 8 * MIB, 32 * KIB, True, (
        "kvm_convert_memory start 0x800000 size 0x8000 shared_to_private",
        _change(0x800000, 0x8000, "mixture", "discarded"),
        "vfio_user_dma_unmap [0x800000, 0x804000) in 4 calls",
        "ram_block_discard_shared_range ram@HVA + 0x8000: madvise: 1 fallocate: 1 ret: 0",
    )),
    Row("private again: no unmap, and freed once more", 8 * MIB, 16 * KIB, True, (
        "kvm_convert_memory start 0x800000 size 0x4000 shared_to_private",
        _change(0x800000, 0x4000, "discarded", "discarded"),
        "ram_block_discard_shared_range ram@HVA + 0x4000: madvise: 1 fallocate: 1 ret: 0",
    )),
    Row("a page to shared for the next row", 8 * MIB, 4 * KIB, False, (
        "kvm_convert_memory start 0x800000 size 0x1000 private_to_shared",
        _change(0x800000, 0x1000, "discarded", "populated"),
        "vfio_user_dma_map [0x800000, 0x801000) in 1 calls",
    )),
    Row("shared again: nothing", 8 * MIB, 4 * KIB, False, (
        "kvm_convert_memory start 0x800000 size 0x1000 private_to_shared",
        _change(0x800000, 0x1000, "populated", "populated"),
    )),
    Row("a hole to shared: nothing", 128 * MIB, 4 * KIB, False, (
        "kvm_convert_memory start 0x8000000 size 0x1000 private_to_shared",
    )),
    Row("registers of the IO-APIC to shared: nothing", 0xFEC0_0000, 4 * KIB, False, (
        "kvm_convert_memory start 0xfec00000 size 0x1000 private_to_shared",
    )),
)  # fmt: skip


@pytest.mark.parametrize("technology", Technology, ids=lambda technology: technology.name)
def test_conversions_have_the_steps_and_words_of_the_table(
    double: Double, technology: Technology
) -> None:
    guest = double.guest(GuestOptions(technology=technology), double.vfio_user_device())
    guest.log.skip()
    differing = []
    for number, row in enumerate(TABLE, 1):
        assert guest.convert(row.gpa, row.size, private=row.private) == 0, row.title
        if text := compare_steps(row.steps, joined(guest.log.new())):
            differing.append(f"row {number} ({row.title}), {text}")

    assert not differing, "\n".join(differing)


def test_start_names_each_block_and_its_guest_memfd(double: Double) -> None:
    guest = double.guest(GuestOptions(nodes=(32 * MIB, 32 * MIB)), double.vfio_user_device())
    slots = [line for line in guest.log.new() if line.name == "kvm_set_user_memory"]
    regions = guest.memory_regions()

    # The last slot that was set at an address is the one that is there.
    placed: dict[int, tuple[int, int]] = {}
    for line in slots:
        assert " guest_memfd=" in line.text
        assert " guest_memfd_offset=" in line.text
        flags, gpa, size = line.numbers()[:3]
        if size:
            placed[gpa] = size, flags
    assert {(gpa, gpa + size) for gpa, (size, _) in placed.items()} >= {
        (start, end) for start, end, _, _ in regions
    }
    # KVM_MEM_GUEST_MEMFD: private from then on.
    assert {flags for _, flags in placed.values()} == {4}
    assert [region.name for region in regions] == ["node0", "pc.rom", "node0", "node1", "pc.bios"]


def test_tdx_guest_has_no_rom_and_its_start_unmaps_nothing(double: Double) -> None:
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(technology=Technology.TDX), device)

    assert [(region.name, region.start) for region in guest.memory_regions()] == [
        ("ram", 0),
        ("pc.bios", 0xFFFF_0000),
    ]
    steps = joined(guest.log.new())
    assert not [step for step in steps if step.startswith("vfio_user_dma")]
    # QEMU frees its own copy of the firmware, which KVM has copied into private memory.
    freed = "ram_block_discard_shared_range pc.bios@HVA + 0x10000: madvise: 1 fallocate: 0 ret: 0"
    assert freed in steps
    assert device.probe.record.clean


def test_start_unmaps_all_of_ram_though_nothing_is_mapped(double: Double) -> None:
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(), device)

    steps = joined(guest.log.new())
    assert "vfio_user_dma_unmap [0x0, 0x4000000) in 1 calls" in steps
    assert "kvm_sev_init" in steps
    [violation] = device.probe.record.violations
    assert str(violation).endswith("unmap of nothing: nothing is mapped there")
