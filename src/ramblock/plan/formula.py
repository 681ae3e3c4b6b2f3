# SPDX-License-Identifier: Apache-2.0
"""
A guest's needs of one target under one policy, by arithmetic.

At each end of a range the number is exact for that end: the simulation of the same guest at that
end comes to the same (tests/plan/test_simulation.py). The low end of a count of runs has one
mapping for each request of the guest: so it is for a device that is attached when the guest is up,
or with a VMM that joins the slices of a request. The high end has one for each slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ramblock.dma.target import MappingPolicy
from ramblock.plan.guest import Guest, Profile
from ramblock.plan.shares import (
    Share,
    boot_shares,
    buffers,
    conversion_rate,
    firmware,
    later_shares,
)
from ramblock.plan.span import Span
from ramblock.plan.targets import TargetKind
from ramblock.units import GIB, MIB, PAGE_SIZE

__all__ = ["Need", "need", "pages", "pieces", "total_size"]

_LEAF = 2 * MIB  # span of one table of an IOMMU with four levels: 512 pages
_NOTHING = Span.exactly(0)
# Buffers that come and go after boot: powers of two from 4 KiB to 2 MiB, 102 pages on average.
_PAGES_OF_A_BUFFER = Span(1, 102, 512)


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """
    Needs of one target (of each device's, where they have one each).

    Bytes unless it says otherwise.
    """

    boot_entries: Span
    """Mappings when the guest is up."""
    peak_entries: Span
    """Most mappings at once, after so many conversions as the guest was said to make."""
    final_entries: Span
    worst_entries: int
    """One for each page of the guest: reached by a guest that wants to use up mappings."""
    boot_maps: Span
    """Calls, until the guest is up; those of firmware among them."""
    boot_unmaps: Span
    maps_per_second: Span
    unmaps_per_second: Span
    shared: Span
    """Most bytes shared at once."""
    pinned: Span
    held_twice: Span
    """Memory that the host holds on both sides at once."""
    page_tables: Span
    """The IOMMU's, which maps pages of 4 KiB: anything larger could not be unmapped in part."""


def pages(size: int) -> int:
    """Count pages."""
    return size // PAGE_SIZE


def pieces(size: int, requests: int, slice_size: int | None) -> int:
    """Count the conversions of *requests* of like sizes, none of more than *slice_size* bytes."""
    count = min(requests, pages(size))
    if slice_size is None or not count:
        return count
    each, larger = divmod(pages(size), count)
    in_slice = slice_size // PAGE_SIZE
    return larger * -(-(each + 1) // in_slice) + (count - larger) * -(-each // in_slice)


def total_size(shares: Sequence[Share]) -> Span:
    """Add up bytes."""
    total = _NOTHING
    for share in shares:
        total += share.size
    return total


def need(guest: Guest, policy: MappingPolicy, target: TargetKind) -> Need:
    """Work out the needs of *guest*."""
    boot = boot_shares(guest)
    staying = boot + later_shares(guest)
    everything = [*staying, buffers(guest)]
    shared = total_size(everything).at_most(Span.exactly(guest.most_memory))
    boot_entries = _entries(guest, policy, boot)
    peak = _entries(guest, policy, everything)
    if policy is MappingPolicy.RUN:
        # Mappings and the gaps between them grow by two with each conversion at most: a cut leaves
        # a mapping and a gap more, and sharing over gaps fills each with a mapping. There are never
        # more than one for each page.
        most = _entries(guest, policy, staying).high + 2 * guest.conversions
        fragmented = min(most, pages(shared.high))
        peak = Span(peak.low, peak.expected, max(fragmented, peak.expected))
    transient = firmware()
    by_page = policy is MappingPolicy.PAGE
    rate = conversion_rate(guest).each(lambda number: -(-number // 2))
    in_pages = Span(
        rate.low * _PAGES_OF_A_BUFFER.low,
        rate.expected * _PAGES_OF_A_BUFFER.expected,
        rate.high * _PAGES_OF_A_BUFFER.high,
    )
    return Need(
        boot_entries=boot_entries,
        peak_entries=peak,
        final_entries=Span(boot_entries.low, boot_entries.expected, peak.high),
        worst_entries=pages(guest.most_memory),
        boot_maps=boot_entries + (transient.size.each(pages) if by_page else transient.requests),
        boot_unmaps=transient.size.each(pages)
        if by_page and target.exact
        else transient.requests,
        maps_per_second=in_pages if by_page else rate,
        unmaps_per_second=in_pages if by_page and target.exact else rate,
        shared=shared,
        pinned=_pinned(guest, target, shared, total_size(boot)),
        held_twice=_held_twice(guest, everything, shared),
        page_tables=_page_tables(guest, everything, shared) if target.pins else _NOTHING,
    )  # fmt: skip


def _entries(guest: Guest, policy: MappingPolicy, shares: Sequence[Share]) -> Span:
    if policy is MappingPolicy.PAGE:
        return total_size(shares).at_most(Span.exactly(guest.most_memory)).each(pages)
    slice_size = guest.technology.slice_size
    low = sum(pieces(share.size.low, share.requests.low, None) for share in shares)
    expected = sum(
        pieces(share.size.expected, share.requests.expected, slice_size) for share in shares
    )
    high = sum(pieces(share.size.high, share.requests.high, slice_size) for share in shares)
    found = Span(low, expected, max(high, expected))
    return found.at_most(_entries(guest, MappingPolicy.PAGE, shares))


def _pinned(guest: Guest, target: TargetKind, shared: Span, boot: Span) -> Span:
    if not target.pins:
        return _NOTHING
    devices = sum(profile is not Profile.NONE for profile in guest.devices)
    tables = max(devices, 1) if target.per_device else 1
    return Span(min(boot.low, shared.low) * tables, shared.expected * tables, shared.high * tables)


def _held_twice(guest: Guest, shares: Sequence[Share], shared: Span) -> Span:
    """
    Work out the memory that the host holds on both sides.

    With pages of 4 KiB one side of a conversion is held until it is committed and the other is
    freed. A huge page of the shared side is held as long as any of it is shared, and each
    contiguous piece has two ends in one.
    """
    unit = guest.backing_page
    slice_size = guest.technology.slice_size
    moving = min(slice_size, shared.high)
    if unit == PAGE_SIZE:
        return Span(0, 0, moving)

    def kept(size: int, requests: int) -> int:
        touched = min(-(-size // unit) + requests, -(-guest.most_memory // unit))
        return min(max(touched * unit - size, 0), guest.most_memory - size)

    expected = kept(shared.expected, sum(share.requests.expected for share in shares))
    requests = sum(share.requests.high for share in shares)
    # The less is shared of as many huge pages, the more of them is held for nothing.
    most = max(kept(size, requests) for size in (shared.low, shared.expected, shared.high))
    return Span(0, expected, max(most + moving, expected))


def _page_tables(guest: Guest, shares: Sequence[Share], shared: Span) -> Span:
    """
    Count tables of four levels, 4 KiB each.

    Unmapping single pages frees none, so they are those of all that was ever mapped.
    """
    reach = guest.most_memory + 2 * GIB  # the hole below 4 GiB

    def size(mapped: int, requests: int) -> int:
        leaves = min(-(-mapped // _LEAF) + requests, -(-reach // _LEAF))
        middle = min(leaves, -(-reach // GIB))
        upper = min(middle, -(-reach // (512 * GIB)))
        return (leaves + middle + upper + 1) * PAGE_SIZE

    return Span(
        size(total_size(boot_shares(guest)).low, 0),
        size(shared.expected, sum(share.requests.expected for share in shares)),
        size(shared.high, sum(share.requests.high for share in shares) + guest.conversions),
    )
