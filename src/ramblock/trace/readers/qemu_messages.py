# SPDX-License-Identifier: Apache-2.0
"""
QEMU's words for failures: the catalogue, and one remark for one failure.

QEMU reports a failure as a message, not as a trace event; often several functions do, each with a
part of it. The table says what a message is about and where QEMU writes it (11.1, where no other
version is named); :class:`Failures` ties it to the event that failed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ramblock.trace.events import ConversionEnd, Event, Remark
from ramblock.trace.readers.base import MAX_NAME, shorten
from ramblock.trace.readers.qemu_meaning import At, QemuMeaning

__all__ = ["MESSAGES", "Failures", "Message", "find_message"]


class Message(NamedTuple):
    """One of QEMU's messages."""

    words: str
    """As a pattern, with a group for each number in hex."""
    about: str
    """
    What failed: ``map``, ``unmap``, ``discard``, ``conversion``, ``slot`` or ``device``.

    ``call`` is the newest map or unmap.
    """
    meaning: str
    where: str
    place: str = ""
    """What the groups are: ``range`` start and size, ``offset`` the same inside a block."""
    evidence: bool = True
    """Whether it tells of a mapping or conversion that failed; others are limits of the trace."""


_HEX = r"0x([0-9a-fA-F]{1,16})(?![0-9a-fA-F])"
#: Object, address and size, and -errno.
_CALL = rf"\([^,()\n]{{0,40}}, {_HEX}, {_HEX}[^()\n]{{0,80}}\) = -\d{{1,9}}"
_PART = rf"\({_HEX} ?,? ?\+ ?{_HEX}\)"

MESSAGES = (
    Message(
        rf"v(?:fio|host)\w{{0,24}}_dma_map{_CALL}",
        "map", "a mapping was refused", "hw/vfio/listener.c, hw/virtio/vhost-vdpa.c", "range",
    ),
    Message(
        rf"v(?:fio|host)\w{{0,24}}_dma_unmap{_CALL}",
        "unmap", "an unmap was refused, and what was mapped stays",
        "hw/vfio/listener.c, hw/virtio/vhost-vdpa.c", "range",
    ),
    Message(
        r"vfio\w{0,24}_dma_unmap\(\) failed", "unmap",
        "pages became private, and their mapping stays",
        "hw/vfio/listener.c, vfio_ram_discard_notify_discard()",
    ),
    Message(
        r"VFIO_(?:IOMMU_)?MAP_DMA failed", "map", "type1 refused a mapping",
        "hw/vfio/container-legacy.c",
    ),
    Message(
        r"VFIO_(?:IOMMU_)?UNMAP_DMA (?:failed|with DIRTY_BITMAP ?:)", "unmap",
        "type1 refused an unmap, and what was mapped stays", "hw/vfio/container-legacy.c",
    ),
    Message(
        r"IOMMU_IOAS_MAP(?:_FILE)? failed", "map",
        "iommufd refused a mapping; for a PCI BAR that is expected, and peers cannot reach it",
        "backends/iommufd.c",
    ),
    Message(
        r"IOMMU_IOAS_UNMAP failed", "unmap", "iommufd refused an unmap, and what was mapped stays",
        "backends/iommufd.c, to 10.0",
    ),
    Message(
        r"vfio_user_\w{1,24}:? (?:- )?error reply on async", "call",
        "a vfio-user server refused a map or an unmap", "hw/vfio-user/proxy.c",
    ),
    Message(
        r"Failed to (?:notify|register|unregister) RAM discard listener", "map",
        "a listener refused pages that became shared",
        "system/ram-block-attributes.c, 10.1 and 10.2",
    ),
    Message(
        rf"Failed to notify the listener the state change of {_PART} to (?:private|shared)",
        "conversion", "a conversion failed half-way: KVM has changed, devices have not",
        "accel/kvm/kvm-all.c, kvm_convert_memory()", "range",
    ),
    Message(
        rf"ram_block_attributes_\w{{1,40}}, invalid range: offset {_HEX}, size {_HEX}",
        "conversion", "a conversion over two regions failed: KVM has changed, devices have not",
        "system/ram-block-attributes.c", "offset",
    ),
    Message(
        rf"Convert non guest_memfd backed memory region {_PART} to (?:private|shared)",
        "conversion", "a conversion of memory without a private side was refused",
        "accel/kvm/kvm-all.c, kvm_convert_memory()", "range",
    ),
    Message(
        rf"failed to set memory {_PART} with attr",
        "conversion", "KVM refused the attribute: the conversion did not begin",
        "accel/kvm/kvm-all.c, kvm_set_memory_attributes()", "range",
    ),
    Message(
        r"Failed to discard (?:range|RAM range) ", "discard",
        "memory could not be given back to the host", "system/physmem.c",
    ),
    Message(
        rf"KVM_SET_USER_MEMORY_REGION2? failed, slot=\d{{1,10}}, start={_HEX}, size={_HEX}",
        "slot", "KVM refused a place of memory", "accel/kvm/kvm-all.c", "range",
    ),
    Message(
        r"kvm_set_phys_mem: error (?:un)?registering slot", "slot", "KVM refused a place of memory",
        "accel/kvm/kvm-all.c",
    ),
    Message(
        r"Cannot set discarding of RAM broken", "device",
        "a device could not be attached: something else in the guest needs to discard RAM",
        "hw/vfio, hw/vfio-user, hw/virtio/vhost-vdpa.c", evidence=False,
    ),
    Message(
        r"possibly running out of DMA mappings", "device",
        "the device's limit of mappings may not hold for all pages of the guest",
        "hw/vfio/listener.c",
        evidence=False,
    ),
)  # fmt: skip

# One of these words is in each message, and in few other lines.
_HINT = re.compile(
    rb"_dma_|_DMA |IOMMU_IOAS_|error reply on async|RAM discard listener|the state change of"
    rb"|invalid range: offset|non guest_memfd|failed to set memory|Failed to discard"
    rb"|KVM_SET_USER|registering slot|discarding of RAM|DMA mappings"
)
_RULES = {
    "map": "map failed",
    "unmap": "unmap failed",
    "discard": "discard failed",
    "conversion": "conversion failed",
    "slot": "slot failed",
}
#: The parts of one failure: a message of the first kind may be followed by one of the others.
_FOLLOWS = {
    "map": {"map", "conversion"},
    "unmap": {"unmap"},
    "conversion": {"conversion"},
    "slot": {"slot"},
}


@cache
def _patterns() -> tuple[tuple[Message, re.Pattern[bytes]], ...]:
    return tuple((message, re.compile(message.words.encode())) for message in MESSAGES)


def find_message(line: bytes) -> tuple[Message, re.Match[bytes]] | None:
    """Find QEMU's message in a line."""
    if _HINT.search(line) is None:
        return None
    for message, pattern in _patterns():
        match = pattern.search(line)
        if match is not None:
            return message, match
    return None


class _Told(NamedTuple):
    """A failure that is being told."""

    about: str
    remark: Remark
    placed: bool
    """Whether QEMU itself named the range."""


class Failures:
    """
    Remarks on one guest's failures.

    A failure is kept until something else is told, since its next message may say more of it.
    """

    def __init__(self) -> None:
        self._told: _Told | None = None
        self._ends: ConversionEnd | None = None

    def flush(self, found: list[Event]) -> None:
        """Something else happened: append what is kept."""
        if self._told is not None:
            found.append(self._told.remark)
            self._told = None
        if self._ends is not None:
            found.append(self._ends)
            self._ends = None

    def tell(
        self,
        message: Message,
        match: re.Match[bytes],
        line: bytes,
        at: At,
        meaning: QemuMeaning,
        found: list[Event],
    ) -> None:
        """Note a message; what was told before and is another failure is appended."""
        about = message.about
        if about == "call":
            about = _newest(meaning)
        start = end = None
        if message.place == "range":
            start = int(match[1], 16)
            end = start + int(match[2], 16)
            if end > 1 << 64:
                start = end = None
        placed = start is not None
        told = self._told
        if told is not None:
            same = about in _FOLLOWS.get(told.about, ()) and not (
                about == told.about and placed and told.placed and start != told.remark.start
            )
            if not same:
                self.flush(found)
                told = None
        if about == "conversion":
            self._end_conversion(at, meaning, start, end)
        if told is not None and (told.placed or not placed or about != told.about):
            return  # it was told better before
        text = line[match.start() : match.start() + MAX_NAME].split(b"\\n")[0].rstrip(b'\r" \\')
        text = text.split(b'" ')[0]
        time, source, number, _ = at
        remark = Remark(
            time,
            source,
            number,
            _RULES[about],
            f"QEMU says: {shorten(text)}",
            *_place(about, start, end, meaning),
            stale=about == "unmap",
        )
        self._told = _Told(about, remark, placed)

    def _end_conversion(
        self, at: At, meaning: QemuMeaning, start: int | None, end: int | None
    ) -> None:
        newest = meaning.conversion
        if newest is None:
            return
        if start is not None and start != newest.start:
            return
        self._ends = ConversionEnd(
            *at[:3],
            newest.start,
            newest.end,
            newest.private,
            newest.time,
            "failed",
        )


def _newest(meaning: QemuMeaning) -> str:
    """Say whether the newest call was a map or an unmap."""
    if meaning.unmap is None:
        return "map"
    return "map" if meaning.map is not None and meaning.map.line > meaning.unmap.line else "unmap"


def _place(
    about: str, start: int | None, end: int | None, meaning: QemuMeaning
) -> tuple[str | None, int | None, int | None]:
    """Return target, start and end of what failed: as told, or of the newest of its kind."""
    if about in ("map", "unmap"):
        newest = meaning.map if about == "map" else meaning.unmap
        other = meaning.unmap if about == "map" else meaning.map
        call = newest or other
        target = None if call is None else call.target
        if start is None and newest is not None:
            return target, newest.start, newest.end
        return target, start, end
    if start is None and about == "discard" and meaning.discard is not None:
        return None, meaning.discard.start, meaning.discard.end
    if start is None and about == "conversion" and meaning.conversion is not None:
        return None, meaning.conversion.start, meaning.conversion.end
    return None, start, end
