# SPDX-License-Identifier: Apache-2.0
"""Which settings would make a guest fit: exact names and numbers, the best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from ramblock.plan.formula import Need
from ramblock.plan.guest import Guest
from ramblock.plan.row import Row, Verdict
from ramblock.plan.shares import boot_shares
from ramblock.plan.swiotlb import SLAB, least_of_areas, swiotlb_bytes
from ramblock.units import KIB, MIB, PAGE_SIZE, format_size

__all__ = ["Advice", "advise"]

_MOST_OF_TYPE1 = (1 << 32) - 1  # the parameter is an unsigned int
_MOST_OF_VHOST = (1 << 31) - 1  # this one is signed
_MOST_OF_LIBVFIO_USER = 1_000_000  # LIBVFIO_USER_MAX_DMA_REGIONS
_LEAST_SWIOTLB = 64 * MIB


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to set."""

    target: str
    """Which target it is about."""
    setting: str
    """The text to write, and its place."""
    number: int | None = None
    """The value that is set; None: there is none."""
    effect: str
    caveat: str = ""


def advise(guest: Guest, rows: Sequence[Row]) -> list[Advice]:
    """
    Give advice for the rows that do not fit; empty where all fit.

    Ranked: remove the limit, then raise it, then make the guest smaller.
    """
    lacking = [each for each in rows if each.need is not None and not _starts(each)]
    if not lacking:
        return []
    found: list[Advice] = []
    short = [each for each in lacking if _lacks_mappings(each)]
    if any(each.target == "type1" for each in short):
        found += _other_targets(rows)
    for each in short:
        if each.need is not None:
            found += _RAISE[each.target](each, each.need)
    found += _pinning(lacking)
    found += _smaller_pool(guest, short)
    return found


def _lacks_mappings(each: Row) -> bool:
    """Whether it is mappings that are short, and not memory."""
    if each.qemu is not None and not each.qemu.passes:
        return True
    return any(room.counts_mappings and room.verdict is not Verdict.FITS for room in each.headroom)


def _starts(each: Row) -> bool:
    return each.verdict is Verdict.FITS and (each.qemu is None or each.qemu.passes)


def _other_targets(rows: Sequence[Row]) -> Iterator[Advice]:
    for each in sorted(rows, key=lambda each: each.policy != "run"):
        need = each.need
        if need is None or each.verdict is Verdict.REFUSED:
            continue
        if each.target == "iommufd-cutting" and each.policy == "run":
            yield Advice(
                target="iommufd-cutting",
                setting="iommufd with mappings that are cut: IommufdIoas in mode cutting,"
                " policy run"
                " (IOMMU_OPTION_HUGE_PAGES=0, VFIO_IOMMU_UNMAP_DMA on /dev/iommu)",
                effect=f"{need.boot_entries} mappings at boot, no limit",
                caveat="needs a VMM that does it; QEMU maps page by page",
            )
        elif each.target == "iommufd" and each.policy == "page":
            yield Advice(
                target="iommufd",
                setting="QEMU: -object iommufd,id=iommufd0 -device"
                " vfio-pci,host=...,iommufd=iommufd0;"
                " kata: iommufd devices (/dev/vfio/devices/vfioN) in the CDI file",
                effect=f"{need.peak_entries} mappings, no limit; QEMU does not check",
                caveat="kernel memory and calls for each page remain",
            )


def _type1(each: Row, need: Need) -> Iterator[Advice]:
    enough = max(need.peak_entries.high, each.qemu.needed if each.qemu else 0)
    number = _round_up(enough, 65_536)
    if number > _MOST_OF_TYPE1:
        return
    text = f"{need.peak_entries.high:,} mappings at most"
    if each.qemu is not None and not each.qemu.passes:
        text += f", and {each.qemu.needed:,} for QEMU's own check"
    yield Advice(
        target="type1",
        setting=f"options vfio_iommu_type1 dma_entry_limit={number} (in /etc/modprobe.d,"
        " or /sys/module/vfio_iommu_type1/parameters)",
        number=number,
        effect=text,
        caveat="counts for containers that are opened later; the host's memory pays for each"
        " mapping",
    )


def _vdpa(each: Row, need: Need) -> Iterator[Advice]:
    number = _round_up(need.peak_entries.high, 2_048)
    if number <= _MOST_OF_VHOST:
        yield Advice(
            target="vhost-vdpa",
            setting=f"modprobe vhost_vdpa max_iotlb_entries={number} (and mlx5_vdpa,"
            " where that drives the device)",
            number=number,
            effect=f"{need.peak_entries.high:,} mappings at most, for each device",
            caveat="read-only while the module is loaded",
        )


def _vfio_user(each: Row, need: Need) -> Iterator[Advice]:
    enough = max(need.peak_entries.high, each.qemu.needed if each.qemu else 0)
    number = _round_up(enough, 65_536)
    caveat = "the server and its client each have a limit; the smaller counts"
    if number > _MOST_OF_LIBVFIO_USER:
        caveat += (
            f"; libvfio-user takes no more than {_MOST_OF_LIBVFIO_USER:,}, so its servers cannot"
        )
    yield Advice(
        target="vfio-user",
        setting=f"the server's max_dma_maps={number} (libvfio-user:"
        " max_regions of vfu_setup_device_dma())",
        number=number,
        effect=f"{need.peak_entries.high:,} mappings at most, for each device",
        caveat=caveat,
    )


_RAISE: dict[str, Callable[[Row, Need], Iterator[Advice]]] = {
    "type1": _type1,
    "vhost-vdpa": _vdpa,
    "vfio-user": _vfio_user,
}


def _pinning(lacking: Sequence[Row]) -> Iterator[Advice]:
    for name, setting in (
        ("RLIMIT_MEMLOCK", "ulimit -l {kib} (LimitMEMLOCK={size} for a service)"),
        ("memory of the control group", "memory.max of the control group: {size}"),
    ):
        short = [
            room
            for each in lacking
            for room in each.headroom
            if room.name == name and room.verdict is not Verdict.FITS
        ]
        if short:
            number = _round_up(max(room.need.high for room in short), MIB)
            yield Advice(
                target="all that pin" if name == "RLIMIT_MEMLOCK" else "all",
                setting=setting.format(kib=number // KIB, size=number),
                number=number,
                effect=f"{format_size(number)} at most",
            )


def _smaller_pool(guest: Guest, lacking: Sequence[Row]) -> Iterator[Advice]:
    """Size a pool that fits the smallest limit, if it is one that a guest can live with."""
    limits = [
        room.limit
        for each in lacking
        for room in each.headroom
        if room.fails_at is not None and each.target == "type1"
    ]
    if not limits:
        return
    others = sum(share.size.high for share in boot_shares(guest) if share.name != "SWIOTLB pool")
    room = min(limits) * PAGE_SIZE - others
    if room < _LEAST_SWIOTLB:
        return
    pool = 1 << (room.bit_length() - 1)  # the kernel rounds up to a power of two
    if pool >= swiotlb_bytes(guest.memory, guest.vcpus).high or pool < least_of_areas(guest.vcpus):
        return
    yield Advice(
        target="type1",
        setting=f"swiotlb={pool // SLAB} on the guest's kernel command line",
        number=pool // SLAB,
        effect=f"a SWIOTLB pool of {format_size(pool)}, so that the guest comes up below the limit",
        caveat="too small a pool makes its DMA fail (\"swiotlb buffer is full\");"
        " QEMU's own check counts all memory all the same",
    )  # fmt: skip


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
