"""
QEMU's words for failures: each is found, placed, and told once.

The texts are those of QEMU 11.1.3 (its binary has them), and of the reports that are named.
"""

import pytest

from ramblock.trace.messages.catalogue import find_failure
from trace_samples import Shown, as_shown, read, reader_of

_EVENTS = (
    "kvm_convert_memory start 0x1000 size 0x2000 shared_to_private\n"
    "vfio_user_dma_map  iova 0x8000 size 0x1000 off 0x0 flags 0x3 async_ops 1\n"
    "vfio_user_dma_unmap  iova 0x1000 size 0x2000 flags 0x0 async_ops 1\n"
    "ram_block_discard_range pc.ram@0x7f0000001000 + 0x2000: madvise: 1 fallocate: 0 ret: 0\n"
)
_USER = "vfio-user"

# (lines, what is remarked: rule, target, start, end, stale; how a conversion ends)
_CASES: list[tuple[list[str], list[tuple[object, ...]], bool]] = [
    (["vfio_ram_discard_notify_discard: vfio_container_dma_unmap() failed: No such file or directory"],
     [("unmap failed", _USER, 0x1000, 0x3000, True)], False),
    (["vfio_container_dma_unmap(0x55d0, 0x1000, 0x1000) = -22 (Invalid argument)"],
     [("unmap failed", _USER, 0x1000, 0x2000, True)], False),
    (["VFIO_UNMAP_DMA failed: Invalid argument",
      "vfio_ram_discard_notify_discard: vfio_container_dma_unmap() failed: Invalid argument"],
     [("unmap failed", _USER, 0x1000, 0x3000, True)], False),
    # kata-containers, on a BAR
    (["IOMMU_IOAS_MAP failed: Bad address, PCI BAR?",
      "vfio_container_dma_map(0x5555, 0xfa800000, 0x4000, 0x7788) = -14 (Bad address)"],
     [("map failed", _USER, 0xFA800000, 0xFA804000, False)], False),
    (["vfio_dma_map(0x557b8fd281b0, 0xc0000, 0x1000, 0x7f66406c0000) = -22 (Resource temporarily)"],
     [("map failed", _USER, 0xC0000, 0xC1000, False)], False),
    # proxmox: one of type1 in two lines, and one of KVM
    (["VFIO_MAP_DMA failed: Invalid argument",
      "vfio_container_dma_map(0x5ae4, 0x3ffc00000000, 0x400000000, 0x706d) = -22 (Invalid argument)",
      "kvm_set_user_memory_region: KVM_SET_USER_MEMORY_REGION failed, slot=10, start=0x40000000, size=0x2000000: Invalid argument"],
     [("map failed", _USER, 0x3FFC00000000, 0x400000000000, False),
      ("slot failed", None, 0x40000000, 0x42000000, False)], False),
    (["kvm_set_user_memory_region: KVM_SET_USER_MEMORY_REGION2 failed, slot=2, start=0xffc84000, size=0x37c000, flags=0x2, guest_memfd=-1, guest_memfd_offset=0x0: Invalid argument",
      "kvm_set_phys_mem: error registering slot: Invalid argument"],
     [("slot failed", None, 0xFFC84000, 0x100000000, False)], False),
    (["ram_block_attributes_state_change, invalid range: offset 0xb8000, size 0x10000",
      "Failed to notify the listener the state change of (0x1000 + 0x2000) to private"],
     [("conversion failed", None, 0x1000, 0x3000, False)], True),
    (["VFIO_MAP_DMA failed: No space left on device",
      "Failed to notify the listener the state change of (0x1000 + 0x2000) to shared"],
     [("map failed", _USER, 0x8000, 0x9000, False)], True),
    (["Convert non guest_memfd backed memory region (0x1000 ,+ 0x2000) to private"],
     [("conversion failed", None, 0x1000, 0x3000, False)], True),
    (["failed to set memory (0x1000+0x2000) with attr 0x8 error 'Invalid argument'"],
     [("conversion failed", None, 0x1000, 0x3000, False)], True),
    (["vfio_user_process: error reply on async "],
     [("unmap failed", _USER, 0x1000, 0x3000, True)], False),
    (["ram_block_discard_range: Failed to discard range pc.ram:1000 +2000 (-22)"],
     [("discard failed", None, 0x7F0000001000, 0x7F0000003000, False)], False),
    (["vfio_container_dma_map(0x5, 0x1000, 0x1000, 0x7) = -22 (x)",
      "vfio_container_dma_map(0x5, 0x2000, 0x1000, 0x7) = -22 (x)"],
     [("map failed", _USER, 0x1000, 0x2000, False), ("map failed", _USER, 0x2000, 0x3000, False)], False),
]  # fmt: skip


def _remarks(shown: list[Shown]) -> list[tuple[object, ...]]:
    return [(each[3], *each[5:9]) for each in shown if each[0] == "Remark"]


@pytest.mark.parametrize(("lines", "expected", "ends"), _CASES)
def test_a_failure_is_told_once(
    lines: list[str], expected: list[tuple[object, ...]], *, ends: bool
) -> None:
    text = _EVENTS + "".join(f"qemu-system-x86_64: {line}\n" for line in lines) + _EVENTS
    reader = reader_of("qemu")
    shown = as_shown(read(reader, text.encode()))
    assert _remarks(shown) == expected
    assert [each[3:] for each in shown if each[0] == "ConversionEnd"] == (
        [(0x1000, 0x3000, True, None, "failed")] if ends else []
    )
    # In its place: between the events before and those behind.
    numbers = [int(str(each[2])) for each in shown]
    assert numbers == sorted(numbers)
    assert reader.counts.unknown == 0


def test_by_two_loggers_it_is_one() -> None:
    lines = next(case[0] for case in _CASES if "IOMMU_IOAS_MAP" in case[0][0])
    text = "".join(
        f'Feb 19 13:46:44 n {who}: time="2026-02-19T13:46:44.45{place}+01:00" msg="qemu: {line}"'
        " qemuPid=1\n"
        for who in ("kata[1]", "containerd[2]")
        for place, line in enumerate(lines)
    )
    reader = reader_of("qemu")
    (remark,) = read(reader, text.encode())
    assert remark.source.guest == "1"
    assert reader.counts.duplicates == 2


def test_a_failed_start_alone_is_no_trace() -> None:
    """Nothing else is in the file, so there is nothing to judge."""
    reader = reader_of("qemu")
    line = b"qemu-kvm: vfio 0000:21:00.0: Cannot set discarding of RAM broken: Device busy\n"
    assert read(reader, line) == []
    assert not reader.recognized
    assert "discarding of RAM broken" in " ".join(reader.needs.values())


def test_other_lines_are_no_messages() -> None:
    for line in (
        b"vfio_dma_mapped",
        b"PCI BAR?",
        b"DMA mappings of nobody",
        b"failed to set memory",
    ):
        assert find_failure(line) is None
