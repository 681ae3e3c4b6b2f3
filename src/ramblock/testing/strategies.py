# SPDX-License-Identifier: Apache-2.0
"""
Hypothesis strategies: ranges of pages, page states, targets, operations of a guest and a device.

Like :mod:`ramblock.testing.conformance` it imports hypothesis (``pip install ramblock[testing]``)::

    @given(st.lists(operations(64 * KIB)))
    def test_my_vmm(sequence: list[Operation]) -> None:
        for operation in sequence:
            if operation.verb is Verb.SHARE:
                my_vmm.convert(operation.offset, operation.size, shared=True)
            ...
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hypothesis import strategies as st

from ramblock.discard.attributes import PageState
from ramblock.dma.soft import SoftIommu
from ramblock.dma.target import MappingPolicy
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_granularity, check_range

__all__ = [
    "Operation",
    "TargetKind",
    "Verb",
    "hostile_ranges",
    "operations",
    "page_ranges",
    "page_states",
    "target_kinds",
]


def page_states() -> st.SearchStrategy[PageState]:
    """Give page states; the simplest is private."""
    return st.sampled_from(PageState)


def page_ranges(
    size: int, *, start: int = 0, granularity: int = PAGE_SIZE
) -> st.SearchStrategy[tuple[int, int]]:
    """
    Give non-empty ranges inside ``[start, start + size)``, as (offset, size) in bytes.

    Both ends are drawn alike, so that ranges that touch an end, or are all of it, turn up often;
    the simplest is the first granule.

    :param size: In bytes; a multiple of *granularity*.
    :param start: In bytes; a multiple of *granularity*.
    :param granularity: In bytes; a power of two.
    :raises UsageError: One of these is not so.
    """
    check_granularity(granularity, "ranges")
    check_range(start, size, limit=ADDRESS_LIMIT, align=granularity, what="ranges")
    first, count = start // granularity, size // granularity

    def span(ends: tuple[int, int]) -> tuple[int, int]:
        low, high = min(ends), max(ends)
        return (first + low) * granularity, (high - low + 1) * granularity

    granule = st.integers(0, count - 1) | st.sampled_from([0, count - 1])
    return st.tuples(granule, granule).map(span)


def hostile_ranges(
    size: int, *, start: int = 0, granularity: int = PAGE_SIZE
) -> st.SearchStrategy[tuple[int, int]]:
    """
    Give (address, size) that a guest can send and must not get.

    Unaligned, empty, outside, past 2**64.

    :param size: Of the range that is there, in bytes; see :func:`page_ranges`.
    :param start: Where it begins.
    :param granularity: In bytes; at least 2, so that something can be unaligned.
    """
    check_granularity(granularity, "ranges")
    check_range(start, size, limit=ADDRESS_LIMIT, align=granularity, what="ranges")
    end = start + size
    interesting = [
        0,
        1,
        start,
        end,
        granularity,
        1 << 32,
        1 << 63,
        ADDRESS_LIMIT,
        ADDRESS_LIMIT - 1,
    ]
    number = st.builds(
        lambda base, granules, bytes_: max(base + granules * granularity + bytes_, 0),
        st.sampled_from(interesting),
        st.integers(-3, 3),
        st.sampled_from([0, 0, 0, -1, 1, granularity // 2]),
    ) | st.integers(0, ADDRESS_LIMIT)

    def is_hostile(pair: tuple[int, int]) -> bool:
        address, length = pair
        inside = start <= address and length > 0 and address + length <= end
        return not inside or bool((address | length) % granularity)

    return st.tuples(number, number).filter(is_hostile)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetKind:
    """A kind of DMA target, and how a guest memory is to drive it."""

    cut: bool = True
    exact: bool = False
    page_size: int = PAGE_SIZE
    target_limit: int | None = None
    """Entries that the target has."""
    policy: MappingPolicy = MappingPolicy.AUTO
    budget: int | None = None
    """Entries that the operator allows."""

    def make(self) -> SoftIommu:
        """Make a target of this kind; attach it with :attr:`policy` and :attr:`budget`."""
        return SoftIommu(
            cut=self.cut,
            exact=self.exact,
            page_size=self.page_size,
            max_mappings=self.target_limit,
        )


def target_kinds(*, max_limit: int | None = None) -> st.SearchStrategy[TargetKind]:
    """
    Give kinds of targets that can be attached; the simplest cuts and has no limit.

    :param max_limit: The largest limit on mappings, of the target or the operator; None: no limits.
    """
    limits = st.none() if max_limit is None else st.none() | st.integers(1, max_limit)
    cutting = st.builds(
        TargetKind,
        policy=st.sampled_from([MappingPolicy.AUTO, MappingPolicy.RUN, MappingPolicy.PAGE]),
        target_limit=limits,
        budget=limits,
    )
    # RUN needs a target that cuts.
    whole = st.builds(
        TargetKind,
        cut=st.just(value=False),
        exact=st.booleans(),
        policy=st.sampled_from([MappingPolicy.AUTO, MappingPolicy.PAGE]),
        target_limit=limits,
        budget=limits,
    )
    return cutting | whole


class Verb(Enum):
    """What a guest, its virtio-mem device or its other device does."""

    SHARE = "share"
    MAKE_PRIVATE = "make private"
    PLUG = "plug"
    UNPLUG = "unplug"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that happens to a range of guest memory."""

    verb: Verb
    offset: int
    """In bytes, from where the memory begins."""
    size: int
    """In bytes."""


def operations(
    size: int, *, start: int = 0, granularity: int = PAGE_SIZE, plug: int | None = None
) -> st.SearchStrategy[Operation]:
    """
    Give operations on ``[start, start + size)``.

    A device's reads and writes have any alignment and may lie where nothing is shared; plugging
    comes in whole blocks and may be refused because a part is plugged already.

    :param plug: virtio-mem's block size in bytes; None: nothing is plugged or unplugged.
    """
    pages = page_ranges(size, start=start, granularity=granularity)
    bytes_ = page_ranges(size, start=start, granularity=1)
    choices = [
        _operations((Verb.SHARE, Verb.MAKE_PRIVATE), pages),
        _operations((Verb.READ, Verb.WRITE), bytes_),
    ]
    if plug is not None:
        blocks = page_ranges(size, start=start, granularity=plug)
        choices.append(_operations((Verb.PLUG, Verb.UNPLUG), blocks))
    return st.one_of(choices)


def _operations(
    verbs: tuple[Verb, ...], ranges: st.SearchStrategy[tuple[int, int]]
) -> st.SearchStrategy[Operation]:
    return st.builds(lambda verb, where: Operation(verb, *where), st.sampled_from(verbs), ranges)
