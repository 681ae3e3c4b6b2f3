# SPDX-License-Identifier: Apache-2.0
"""
QEMU's trace events: name, text, fields by name and type, and the versions that print it so.

The texts are those of QEMU's ``trace-events`` files (accel/kvm, backends, hw/vfio, hw/vfio-user,
hw/virtio, system, target/i386/kvm), as facts of 7.2 to 11.1. The text log prints them after the
event's name; the binary format has the same fields in the same order, each as 64 bits or as a
string; ``simpletrace.py`` prints ``field=value``. A field's name here is QEMU's, so that all three
come to the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

__all__ = ["EVENTS", "IGNORED", "Form", "Forms", "Value", "forms_of"]

Value = int | bytes


class Form(NamedTuple):
    """How an event is printed by some versions."""

    text: str
    """With ``{field:kind}``: x unsigned in hex, d signed, w 32 bits that are printed as signed, p
    pointer, s string of any characters, a a word."""
    versions: str = ""
    """Empty: all that have the event."""


class Forms(NamedTuple):
    """An event's texts, of two that begin alike the longer one first."""

    since: str
    """
    The first version of QEMU that has it.

    Debian's 7.2, 10.0.13 and 11.1.3 have the events that this says, and no others of them (the
    names in the programs). Where between two of these an event came, its publication says.
    """
    forms: tuple[Form, ...]


def _one(text: str, since: str = "7.2") -> Forms:
    return Forms(since, (Form(text),))


_SLOT = (
    "Slot#{slot:d} flags=0x{flags:x} gpa=0x{guest_phys_addr:x} size=0x{memory_size:x}"
    " ua=0x{userspace_addr:x}"
)
_DISCARD = (
    "{rbname:s}@{hva:p} + 0x{length:x}: madvise: {need_madvise:d} fallocate: {need_fallocate:d}"
    " ret: {ret:d}"
)
_IOAS = " iommufd={iommufd:d} ioas={ioas:d}"
_RANGE = " iova=0x{iova:x} size=0x{size:x}"

EVENTS: dict[str, Forms] = {
    "kvm_convert_memory": _one("start 0x{start:x} size 0x{size:x} {msg:a}", "9.1"),
    "kvm_set_user_memory": Forms(
        "7.2",
        (
            Form(
                f"AddrSpace#{{as:d}} {_SLOT} guest_memfd={{fd:w}}"
                " guest_memfd_offset=0x{fd_offset:x} ret={ret:d}",
                "9.1",
            ),
            Form(
                f"AddrSpace#{{as:d}} {_SLOT} ret={{ret:d}}",
                "8.0 to 9.0",
            ),
            Form(
                f"{_SLOT} ret={{ret:d}}",
                "7.2",
            ),
        ),
    ),
    "kvm_sev_init": _one(""),
    "kvm_arch_on_vmfd_change": _one("", "11.0"),
    "tdx_handle_reset": _one("", "11.0"),
    "ram_block_attributes_state_change": _one(
        "offset 0x{offset:x} size 0x{size:x} from '{from:s}' to '{to:s}'", "10.1"
    ),
    "ram_block_discard_range": _one(_DISCARD),
    "ram_block_discard_shared_range": _one(_DISCARD, "11.1"),
    "iommufd_backend_map_dma": _one(
        f"{_IOAS}{_RANGE} addr={{vaddr:p}} readonly={{readonly:d}} ({{ret:d}})", "8.2"
    ),
    "iommufd_backend_map_file_dma": _one(
        f"{_IOAS}{_RANGE} fd={{fd:d}} start={{start:d}} readonly={{readonly:d}} ({{ret:d}})", "10.1"
    ),
    "iommufd_backend_unmap_dma": _one(f"{_IOAS}{_RANGE} ({{ret:d}})", "8.2"),
    "iommufd_backend_unmap_dma_non_exist": _one(
        f" Unmap nonexistent mapping:{_IOAS}{_RANGE} ({{ret:d}})", "8.2"
    ),
    "iommufd_backend_alloc_ioas": Forms(
        "8.2", (Form(f"{_IOAS} ({{ret:d}})", "8.2 to 9.0"), Form(_IOAS, "9.1"))
    ),
    "iommufd_backend_free_id": _one(" iommufd={iommufd:d} id={id:d} ({ret:d})", "8.2"),
    "vfio_user_version": _one(" major {major:d} minor {minor:d} caps: {caps:s}", "10.1"),
    "vfio_user_dma_map": _one(
        " iova 0x{iova:x} size 0x{size:x} off 0x{off:x} flags 0x{flags:x} async_ops {async_ops:d}",
        "10.1",
    ),
    "vfio_user_dma_unmap": _one(
        " iova 0x{iova:x} size 0x{size:x} flags 0x{flags:x} async_ops {async_ops:d}", "10.1"
    ),
    "virtio_mem_send_response": _one("type={type:d}"),
    "virtio_mem_plug_request": _one("addr=0x{addr:x} nb_blocks={nb_blocks:d}"),
    "virtio_mem_unplug_request": _one("addr=0x{addr:x} nb_blocks={nb_blocks:d}"),
    "virtio_mem_unplugged_all": _one(""),
    "vfio_listener_region_add_ram": _one(
        "region_add [ram] 0x{iova_start:x} - 0x{iova_end:x} [{vaddr:p}]"
    ),
    "vfio_listener_region_del": _one("region_del 0x{start:x} - 0x{end:x}"),
    "vfio_region_dmabuf": Forms(
        "11.0",
        (
            Form(
                'Device {name:s}, dmabuf fd {fd:d} region {index:d} "{region:s}",'
                " offset: 0x{offset:x}, size: 0x{size:x}",
                "11.1",
            ),
            Form('Device {name:s}, region "{region:s}", offset: 0x{offset:x}, size: 0x{size:x}'),
        ),
    ),
    "vfio_listener_region_add_iommu": Forms(
        "7.2",
        (
            Form("region_add [iommu] {name:s} 0x{start:x} - 0x{end:x}", "8.0"),
            Form("region_add [iommu] 0x{start:x} - 0x{end:x}", "7.2"),
        ),
    ),
    "vfio_iommu_map_notify": _one("iommu {op:a} @ 0x{iova_start:x} - 0x{iova_end:x}"),
}

#: Events that are expected beside the others and say nothing more.
IGNORED = frozenset(
    {
        "iommufd_backend_connect",
        "iommufd_backend_disconnect",
        "iommufd_backend_alloc_hwpt",
        "iommufd_cdev_alloc_ioas",
        "iommufd_cdev_attach_ioas_hwpt",
        "iommufd_cdev_connect_and_bind",
        "iommufd_cdev_detach_ioas_hwpt",
        "iommufd_cdev_device_info",
        "iommufd_cdev_getfd",
        "iommufd_cdev_pasid_attach_ioas_hwpt",
        "iommufd_cdev_pasid_detach_ioas_hwpt",
        "kvm_hc_map_gpa_range",
        "kvm_memory_fault",
        "kvm_reset_vmfd",
        "kvm_sev_change_state",
        "kvm_sev_launch_finish",
        "kvm_sev_launch_start",
        "kvm_sev_snp_launch_finish",
        "kvm_sev_snp_launch_start",
        "kvm_sev_snp_launch_update",
        "ram_block_attributes_create",
        "sev_handle_reset",
        "vfio_listener_region_add_no_dma_map",
        "vfio_listener_region_add_skip",
        "vfio_listener_region_del_iommu",
        "vfio_listener_region_del_skip",
        "vfio_listener_region_skip",
        "vfio_user_get_info",
        "vfio_user_get_irq_info",
        "vfio_user_get_region_info",
        "vfio_user_recv_hdr",
        "vfio_user_recv_read",
        "vfio_user_recv_request",
        "vfio_user_region_rw",
        "vfio_user_send_write",
        "vfio_user_set_irqs",
        "virtio_mem_resized_usable_region",
        "virtio_mem_state_request",
        "virtio_mem_state_response",
        "virtio_mem_unplug_all_request",
    }
)

_FIELD = re.compile(r"\{(\w+):(\w)\}")
# Digits are bounded: Python refuses to read numbers of more than 4,300, and slows down before.
_PATTERNS = {
    "x": "([0-9a-fA-F]{1,16})(?![0-9a-fA-F])",
    "d": r"(-?\d{1,19})(?!\d)",
    "w": r"(-?\d{1,10})(?!\d)",
    "p": r"(0x[0-9a-fA-F]{1,16}(?![0-9a-fA-F])|\(nil\))",
    "s": "([^\n]{0,256}?)",
    "a": r"(\w{1,64})",
}


def _pointer(digits: bytes) -> int:
    return 0 if digits == b"(nil)" else int(digits, 16)


#: What makes a number of digits.
_TAKES: dict[str, Callable[[bytes], int] | None] = {
    "x": partial(int, base=16),
    "d": int,
    "w": int,
    "p": _pointer,
    "s": None,
    "a": None,
}
_SIGNS = {"d": 1 << 64, "w": 1 << 32}


class Reading:
    """One form, ready to read."""

    def __init__(self, text: str) -> None:
        found = _FIELD.findall(text)
        self.fields = tuple(name for name, _ in found)
        self.kinds = "".join(kind for _, kind in found)
        self._takes = [_TAKES[kind] for kind in self.kinds]
        #: Places of signed words: 64 bits that were sign-extended when written, or 32.
        self._signs = [
            (place, _SIGNS[kind] // 2, _SIGNS[kind])
            for place, kind in enumerate(self.kinds)
            if kind in _SIGNS
        ]
        literals = re.split(r"\{\w+:\w\}", text)
        # Blanks at either end come and go with QEMU's versions and with who cut the line.
        pattern = re.escape(literals[0].lstrip())
        for kind, literal in zip(self.kinds, literals[1:], strict=True):
            pattern += _PATTERNS[kind] + re.escape(literal)
        if self.kinds.endswith("s") and not literals[-1]:
            pattern = pattern.removesuffix("{0,256}?)") + "*)"  # to the end of the line
        # Something else may follow in the line; a longer word would be another text.
        self._pattern = re.compile(rf"{pattern}(?!\w)".encode())
        self._printed = re.compile(
            "".join(
                rf"\s{re.escape(name)}="
                + ("([^\n]{0,256}?)" if kind in "sa" else "0x([0-9a-f]{1,16})")
                for name, kind in found
            ).encode()
            + rb"\s*\Z"
        )

    def from_text(self, line: bytes, position: int) -> tuple[tuple[Value, ...], int] | None:
        """Read the fields off a line; return them and where they end. None: not this text."""
        match = self._pattern.match(line, position)
        if match is None:
            return None
        values = tuple(
            [
                group if take is None else take(group)
                for take, group in zip(self._takes, match.groups(), strict=True)
            ]
        )
        return values, match.end()

    def from_words(self, values: list[Value]) -> tuple[Value, ...]:
        """Give the fields of a binary record the values that the text shows."""
        for place, half, whole in self._signs:
            value = values[place]
            assert isinstance(value, int)
            value %= whole
            values[place] = value - whole if value >= half else value
        return tuple(values)

    def from_printed(self, text: bytes) -> tuple[Value, ...] | None:
        """Read ``field=value`` of QEMU's ``simpletrace.py``; None: not this event's fields."""
        match = self._printed.match(text)
        if match is None:
            return None
        return self.from_words(
            [
                group if kind in "sa" else int(group, 16)
                for kind, group in zip(self.kinds, match.groups(), strict=True)
            ]
        )


@cache
def forms_of(name: str) -> tuple[Reading, ...]:
    """Return an event's forms in the order of the table; made when first needed."""
    return tuple(Reading(form.text) for form in EVENTS[name].forms)
