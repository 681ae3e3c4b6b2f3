# SPDX-License-Identifier: Apache-2.0
"""
QEMU's trace events: how each is printed, and so which arguments it has.

The texts are those of QEMU's ``trace-events`` files (accel/kvm, backends, hw/vfio, hw/vfio-user,
hw/virtio, system). The text log prints them after the event's name; the binary format has the same
arguments in the same order, each as 64 bits or as a string.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["FORMATS", "EventFormat", "QemuValue"]

QemuValue = int | bytes

# %x unsigned in hex, %d signed, %w 32 bits that are printed as signed, %p pointer, %s string.
_TEXTS = {
    "kvm_convert_memory": "start 0x%x size 0x%x %s",
    "kvm_memory_fault": "start 0x%x size 0x%x flags 0x%x",
    "kvm_hc_map_gpa_range": "gpa 0x%x size 0x%x attributes 0x%x flags 0x%x",
    "kvm_set_user_memory": (
        "AddrSpace#%d Slot#%d flags=0x%x gpa=0x%x size=0x%x ua=0x%x guest_memfd=%w"
        " guest_memfd_offset=0x%x ret=%d"
    ),
    "ram_block_attributes_state_change": "offset 0x%x size 0x%x from '%s' to '%s'",
    "ram_block_discard_range": "%s@%p + 0x%x: madvise: %d fallocate: %d ret: %d",
    "ram_block_discard_shared_range": "%s@%p + 0x%x: madvise: %d fallocate: %d ret: %d",
    "ram_block_discard_guest_memfd_range": "%s@%p + 0x%x: fallocate: %d ret: %d",
    "iommufd_backend_map_dma": (" iommufd=%d ioas=%d iova=0x%x size=0x%x addr=%p readonly=%d (%d)"),
    "iommufd_backend_map_file_dma": (
        " iommufd=%d ioas=%d iova=0x%x size=0x%x fd=%d start=%d readonly=%d (%d)"
    ),
    "iommufd_backend_unmap_dma": " iommufd=%d ioas=%d iova=0x%x size=0x%x (%d)",
    "iommufd_backend_unmap_dma_non_exist": (
        " Unmap nonexistent mapping: iommufd=%d ioas=%d iova=0x%x size=0x%x (%d)"
    ),
    "iommufd_backend_alloc_ioas": " iommufd=%d ioas=%d",
    "iommufd_backend_free_id": " iommufd=%d id=%d (%d)",
    "vfio_user_dma_map": " iova 0x%x size 0x%x off 0x%x flags 0x%x async_ops %d",
    "vfio_user_dma_unmap": " iova 0x%x size 0x%x flags 0x%x async_ops %d",
    "virtio_mem_send_response": "type=%d",
    "virtio_mem_plug_request": "addr=0x%x nb_blocks=%d",
    "virtio_mem_unplug_request": "addr=0x%x nb_blocks=%d",
    "virtio_mem_state_request": "addr=0x%x nb_blocks=%d",
    "virtio_mem_state_response": "state=%d",
    "virtio_mem_unplug_all_request": "",
    "virtio_mem_unplugged_all": "",
    # No blank between the two: QEMU's own format has none.
    "virtio_mem_resized_usable_region": "old_size=0x%xnew_size=0x%x",
    "vfio_listener_region_add_ram": "region_add [ram] 0x%x - 0x%x [%p]",
    "vfio_listener_region_del": "region_del 0x%x - 0x%x",
}

#: Events that are expected beside the others and say nothing more.
IGNORED = frozenset(
    {
        "ram_block_attributes_create",
        "vfio_iommu_map_notify",
        "vfio_listener_region_add_iommu",
        "vfio_listener_region_add_no_dma_map",
        "vfio_listener_region_skip",
        "vfio_user_version",
    }
)

_TOKEN = re.compile(r"%[xdwps]")
_PATTERNS = {
    "x": "([0-9a-fA-F]+)",
    "d": r"(-?\d+)",
    "w": r"(-?\d+)",
    "p": r"(0x[0-9a-fA-F]+|\(nil\))",
    "s": "(.*)",
}
_U32, _U64 = 1 << 32, 1 << 64


class EventFormat(NamedTuple):
    """One event's text and arguments."""

    pattern: re.Pattern[bytes]
    """Of the text after the event's name and one blank."""
    kinds: str
    """A letter for each argument: ``x``, ``d``, ``w``, ``p``, ``s``."""

    def from_text(self, text: bytes) -> tuple[QemuValue, ...] | None:
        """Read the arguments off a line; None: it does not look like this event."""
        match = self.pattern.fullmatch(text)
        if match is None:
            return None
        return tuple(
            value if kind == "s" else _number(kind, value)
            for kind, value in zip(self.kinds, match.groups(), strict=True)
        )

    def from_words(self, values: list[QemuValue]) -> tuple[QemuValue, ...]:
        """Give the arguments of a binary record the values that the text shows."""
        return tuple(
            value if isinstance(value, bytes) else _signed(kind, value)
            for kind, value in zip(self.kinds, values, strict=True)
        )


def _number(kind: str, digits: bytes) -> int:
    if kind == "x":
        return int(digits, 16)
    if kind == "p":
        return 0 if digits == b"(nil)" else int(digits, 16)
    return int(digits)


def _signed(kind: str, word: int) -> int:
    if kind == "d":  # sign-extended when it was written
        return word - _U64 if word >= _U64 // 2 else word
    if kind == "w":
        word %= _U32
        return word - _U32 if word >= _U32 // 2 else word
    return word


def _make(text: str) -> EventFormat:
    kinds = "".join(token[1] for token in _TOKEN.findall(text))
    literals = _TOKEN.split(text)
    # Blanks at either end come and go with QEMU's versions and with who cut the line.
    pattern = re.escape(literals[0].lstrip())
    for kind, literal in zip(kinds, literals[1:], strict=True):
        pattern += _PATTERNS[kind] + re.escape(literal)
    return EventFormat(re.compile(rf"\s*{pattern}\s*".encode(), re.DOTALL), kinds)


#: By the event's name.
FORMATS = {name: _make(text) for name, text in _TEXTS.items()}
