# SPDX-License-Identifier: Apache-2.0
"""
Watches a run from outside and shares no code with what it watches.

It wraps the IOMMUs, the attribute setter and the backings, and keeps a picture of its own that is as naive as can be: one
byte per page and fact. At each call it looks whether a page that is private or freed is mapped; at the end it compares
everything with everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from threading import Lock, get_ident
from time import perf_counter_ns
from typing import NamedTuple, TypeAlias

__all__ = ["Region", "Verifier", "Violation", "ViolationKind"]

_PAGE = 4096
# In the picture of what is mapped, beside 0 and 1: an interrupted call may or may not have been carried out.
_PERHAPS = 2
_RANGES_KEPT = 64

Stretches: TypeAlias = Iterator[tuple[int, int]]


class ViolationKind(Enum):
    """What must never happen; worst first."""

    DEVICE_REACHED_PRIVATE = "a device reached a private page"
    PRIVATE_SEEN = "the host sees what the guest wrote to a private page"
    LOST_WRITE = "a device's write was never seen by the guest"
    LOST_DATA = "the guest does not find what it wrote"
    HOST_BLIND = "the host does not see what the guest wrote to a shared page"
    FREED = "a freed page is mapped"
    STALE = "stale mapping: a private page is mapped"
    MISSING = "missing mapping: a shared page is not mapped"
    DEVICE_FAULTED = "a device could not reach its own buffer"
    LOST_FREE = "a page in use was freed"
    DOUBLE = "a page is mapped twice"
    UNMAP_COUNT = "an unmap told a wrong number of bytes"
    SURVIVED = "memory of the old guest is there after a reset"
    STATE = "page states and attributes differ"


class Violation(NamedTuple):
    """A range in which something happened that must not."""

    kind: ViolationKind
    target: str
    gpa: int
    size: int


@dataclass
class Region:
    """A section as the verifier sees it: guest addresses, and one byte per page and fact."""

    gpa: int
    size: int
    confidential: bool
    shared: bytearray = field(init=False)
    freed: bytearray = field(init=False)
    since: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        pages = self.size // _PAGE
        self.shared = bytearray(pages) if self.confidential else bytearray(b"\1") * pages
        self.freed = bytearray(pages)

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.gpa + self.size


class _Span(NamedTuple):
    region: int
    start: int
    end: int


class Verifier:
    """
    The naive picture, and what it found.

    :param regions: The sections of the guest.
    :param targets: Names of the IOMMUs.
    """

    def __init__(self, regions: list[Region], targets: list[str]) -> None:
        self.regions = regions
        self.mapped = {
            name: [bytearray(len(region.shared)) for region in regions] for name in targets
        }
        #: How often each kind happened.
        self.counts: Counter[ViolationKind] = Counter()
        self.checks = 0
        #: The guest is being reset: private memory that it used is freed.
        self.resetting = False
        self._spent: Counter[int] = Counter()
        self._flagged: dict[tuple[ViolationKind, str], list[bytearray]] = {}
        self._lock = Lock()
        self._sequence = 0

    def spent_ns(self) -> int:
        """Nanoseconds that all threads together spent in here."""
        return self._spent.total()

    def spent_here_ns(self) -> int:
        """Nanoseconds that the calling thread spent in here."""
        return self._spent[get_ident()]

    # -- what the wrappers call -----------------------------------------------------------------------------------

    def about_to_map(self, target: str, gpa: int, size: int) -> None:
        """Check a map before it is made: every page shared, none freed, none mapped."""
        with self._lock, self._timed():
            mapped = self.mapped[target]
            for region, start, end in self._spans(gpa, size):
                here = self.regions[region]
                self._flag(ViolationKind.STALE, target, region, _where(here.shared, 0, start, end))
                self._flag(ViolationKind.FREED, target, region, _where(here.freed, 1, start, end))
                self._flag(
                    ViolationKind.DOUBLE,
                    target,
                    region,
                    _where(mapped[region], 1, start, end),
                )

    def has_mapped(self, target: str, gpa: int, size: int) -> None:
        """Note a map that was made."""
        with self._lock, self._timed():
            for region, start, end in self._spans(gpa, size):
                self.mapped[target][region][start:end] = b"\1" * (end - start)

    def note_uncertain(self, target: str, gpa: int, size: int) -> None:
        """Note a call of which nobody knows whether it was carried out; the next one over these pages settles it."""
        with self._lock, self._timed():
            for region, start, end in self._spans(gpa, size):
                self.mapped[target][region][start:end] = bytes((_PERHAPS,)) * (end - start)

    def has_unmapped(self, target: str, gpa: int, size: int, told: int) -> None:
        """Note an unmap that was made, and check the bytes it told."""
        with self._lock, self._timed():
            known = perhaps = 0
            for region, start, end in self._spans(gpa, size):
                mapped = self.mapped[target][region]
                known += mapped.count(1, start, end)
                perhaps += mapped.count(_PERHAPS, start, end)
                mapped[start:end] = bytes(end - start)
            if not known * _PAGE <= told <= (known + perhaps) * _PAGE:
                self._flag_range(ViolationKind.UNMAP_COUNT, target, gpa, size)

    def about_to_set_attribute(self, gpa: int, size: int, *, private: bool) -> None:
        """Check a change of attributes before it is made: what becomes private is mapped nowhere."""
        with self._lock, self._timed():
            self._sequence += 1
            for region, start, end in self._spans(gpa, size):
                here = self.regions[region]
                if private:
                    self._check_unmapped(ViolationKind.STALE, region, start, end)
                    for low, high in _where(here.shared, 1, start, end):
                        here.since.update(dict.fromkeys(range(low, high), self._sequence))
                    here.shared[start:end] = bytes(end - start)
                else:
                    here.shared[start:end] = b"\1" * (end - start)
                    here.freed[start:end] = bytes(end - start)

    def about_to_free_shared(self, gpa: int, size: int) -> None:
        """Check a free of the shared side before it is made: private, and mapped nowhere."""
        with self._lock, self._timed():
            for region, start, end in self._spans(gpa, size):
                here = self.regions[region]
                self._check_unmapped(ViolationKind.FREED, region, start, end)
                self._flag(ViolationKind.LOST_FREE, "", region, _where(here.shared, 1, start, end))
                here.freed[start:end] = b"\1" * (end - start)

    def about_to_free_private(self, gpa: int, size: int) -> None:
        """Check a free of the private side before it is made: the guest has given it up."""
        with self._lock, self._timed():
            for region, start, end in self._spans(gpa, size):
                here = self.regions[region]
                if not self.resetting:
                    lost = _where(here.shared, 0, start, end)
                    self._flag(ViolationKind.LOST_FREE, "", region, lost)

    def before_access(self) -> int:
        """Take a time stamp before a device's access, for :meth:`device_reached`."""
        with self._lock:
            return self._sequence

    def device_reached(self, target: str, gpa: int, size: int, since: int) -> None:
        """
        Check an access that succeeded: no page of it was private all the while.

        A page that became private during the access may have been reached before, rightly; that is what *since* is for.
        """
        with self._lock, self._timed():
            for region, start, end in self._spans(gpa, size):
                here = self.regions[region]
                private = (
                    (page, page + 1)
                    for low, high in _where(here.shared, 0, start, end)
                    for page in range(low, high)
                    if here.since.get(page, 0) <= since
                )
                self._flag(ViolationKind.DEVICE_REACHED_PRIVATE, target, region, private)

    def violation(self, kind: ViolationKind, target: str, gpa: int, size: int) -> None:
        """Note a violation that somebody else saw."""
        with self._lock, self._timed():
            self._flag_range(kind, target, gpa, size)

    def note_time(self, nanoseconds: int) -> None:
        """Note time that the calling thread spent in here."""
        self._spent[get_ident()] += nanoseconds

    # -- at the end -----------------------------------------------------------------------------------------------

    def compare(
        self,
        shared: Iterable[tuple[int, int]],
        mappings: dict[str, list[tuple[int, int]]],
        *,
        attached: bool,
    ) -> None:
        """
        Compare everything: page states with attributes, and each IOMMU's table with both.

        :param shared: What the memory says is shared, as (gpa, size).
        :param mappings: What each IOMMU says is mapped, as (iova, size). Of one that does not say it is what was seen to
            be mapped.
        :param attached: Whether the IOMMUs are meant to map exactly what is shared.
        """
        with self._lock, self._timed():
            says = self._paint(shared)
            for index, region in enumerate(self.regions):
                self._differ(ViolationKind.STATE, "", index, says[index], region.shared)
            for target, seen in self.mapped.items():
                painted = self._paint(mappings[target]) if target in mappings else seen
                for index, region in enumerate(self.regions):
                    self._differ(
                        ViolationKind.UNMAP_COUNT,
                        target,
                        index,
                        painted[index],
                        self.mapped[target][index],
                    )
                    self._flag(
                        ViolationKind.STALE,
                        target,
                        index,
                        _only_first(painted[index], region.shared),
                    )
                    if attached:
                        self._flag(
                            ViolationKind.MISSING,
                            target,
                            index,
                            _only_first(region.shared, painted[index]),
                        )

    def violations(self) -> list[Violation]:
        """List what was found, as ranges: worst kind first, then largest first, so many of each kind."""
        by_kind: dict[ViolationKind, list[Violation]] = {kind: [] for kind in ViolationKind}
        for (kind, target), flags in self._flagged.items():
            for region, marks in zip(self.regions, flags, strict=True):
                for start, end in _where(marks, 1, 0, len(marks)):
                    by_kind[kind].append(
                        Violation(kind, target, region.gpa + start * _PAGE, (end - start) * _PAGE)
                    )
        return [
            violation
            for found in by_kind.values()
            for violation in sorted(found, key=lambda item: (-item.size, item.gpa, item.target))[
                :_RANGES_KEPT
            ]
        ]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.counts

    # -- the naive part -------------------------------------------------------------------------------------------

    def _timed(self) -> _Timed:
        return _Timed(self)

    def _spans(self, gpa: int, size: int) -> Iterator[_Span]:
        """Pages of each region that the range touches."""
        end = gpa + size
        for index, region in enumerate(self.regions):
            low, high = max(gpa, region.gpa), min(end, region.end)
            if low < high:
                yield _Span(index, (low - region.gpa) // _PAGE, -(-(high - region.gpa) // _PAGE))

    def _check_unmapped(self, kind: ViolationKind, region: int, start: int, end: int) -> None:
        for target, regions in self.mapped.items():
            self._flag(kind, target, region, _where(regions[region], 1, start, end))

    def _flag(self, kind: ViolationKind, target: str, region: int, stretches: Stretches) -> None:
        """Note one violation, in stretches of pages; without any there is none."""
        flags: bytearray | None = None
        for start, end in stretches:
            if flags is None:
                self.counts[kind] += 1
                flags = self._flags(kind, target)[region]
            flags[start:end] = b"\1" * (end - start)

    def _flags(self, kind: ViolationKind, target: str) -> list[bytearray]:
        flags = self._flagged.get((kind, target))
        if flags is None:
            flags = [bytearray(len(region.shared)) for region in self.regions]
            self._flagged[kind, target] = flags
        return flags

    def _flag_range(self, kind: ViolationKind, target: str, gpa: int, size: int) -> None:
        for region, start, end in self._spans(gpa, size):
            self._flag(kind, target, region, iter(((start, end),)))

    def _paint(self, ranges: Iterable[tuple[int, int]]) -> list[bytearray]:
        canvas = [bytearray(len(region.shared)) for region in self.regions]
        for gpa, size in ranges:
            for region, start, end in self._spans(gpa, size):
                canvas[region][start:end] = b"\1" * (end - start)
        return canvas

    def _differ(
        self, kind: ViolationKind, target: str, region: int, one: bytearray, other: bytearray
    ) -> None:
        self._flag(kind, target, region, chain(_only_first(one, other), _only_first(other, one)))


class _Timed:
    """
    A clock for what is done under the verifier's lock; it does not count waiting for it.

    The lock itself is taken by a ``with`` of its own: taken in here, it would stay taken where Ctrl-C comes before the
    ``with`` has begun.
    """

    __slots__ = ("_start", "_verifier")

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def __enter__(self) -> None:
        self._start = perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._verifier.checks += 1
        self._verifier.note_time(perf_counter_ns() - self._start)


def _where(flags: bytearray, value: int, start: int, end: int) -> Stretches:
    """Yield the stretches of [start, end) in which every flag equals *value*, as (start, end)."""
    position = flags.find(value, start, end)
    while position >= 0:
        stop = flags.find(1 - value, position, end)
        if stop < 0:
            stop = end
        yield position, stop
        position = flags.find(value, stop, end)


def _only_first(one: bytearray, other: bytearray) -> Stretches:
    """Yield the stretches that are set in *one* and not in *other*."""
    if one == other:
        return
    for start, end in _where(one, 1, 0, len(one)):
        yield from _where(other, 0, start, end)
