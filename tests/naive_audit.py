"""
The audit of a trace with conversions' ends, as naively as it can be said: one page after the other,
each event in turn.

It shares nothing with the real one but the events and the kinds.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ramblock.trace.events import Attributes, ConversionEnd, Event, Map, Unmap
from ramblock.trace.findings import FindingKind
from ramblock.units import PAGE_SIZE

__all__ = ["PageWindow", "naive_audit"]


class PageWindow(NamedTuple):
    """A page of a target that was in a state in which it should not be."""

    kind: FindingKind
    target: str
    page: int
    opened: int
    closed: int | None
    """Lines; None: still so at the end."""


def naive_audit(events: Sequence[Event], targets: Sequence[str], pages: range) -> set[PageWindow]:
    """Find the windows that outlive their conversion, or have none."""
    private: dict[int, bool] = {}
    mapped: set[tuple[str, int]] = set()
    opened: dict[tuple[FindingKind, str, int], tuple[int, bool]] = {}
    found = set()
    ended: set[tuple[FindingKind, str, int]] = set()
    for event in events:
        if isinstance(event, ConversionEnd):
            ended |= opened.keys()
        elif isinstance(event, Attributes):
            private |= dict.fromkeys(_pages(event.start, event.end), event.private)
        elif isinstance(event, Map):
            mapped |= {(event.target, page) for page in _pages(event.start, event.end)}
        elif isinstance(event, Unmap):
            assert event.unmapped is not None
            there = [p for p in _pages(event.start, event.end) if (event.target, p) in mapped]
            mapped -= {(event.target, page) for page in there[: event.unmapped // PAGE_SIZE]}
        for target in targets:
            for page in pages:
                for kind, bad in (
                    (FindingKind.STALE, private.get(page) is True and (target, page) in mapped),
                    (
                        FindingKind.MISSING,
                        private.get(page) is False and (target, page) not in mapped,
                    ),
                ):
                    key = kind, target, page
                    if bad and key not in opened:
                        # Mapping a page that is private is never a part of a conversion.
                        opened[key] = event.line, isinstance(event, Map)
                    elif not bad and key in opened:
                        line, without = opened.pop(key)
                        if without or key in ended:
                            found.add(PageWindow(kind, target, page, line, event.line))
                        ended.discard(key)
    for key, (line, without) in opened.items():
        if without or key in ended:
            found.add(PageWindow(*key, line, None))
    return found


def _pages(start: int, end: int) -> range:
    return range(start // PAGE_SIZE, end // PAGE_SIZE)
