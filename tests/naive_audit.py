"""
The audit of a trace with conversions' ends, as naively as it can be said: one page after the other,
each event in turn.

It shares nothing with the real one but the events and the kinds.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ramblock.trace.events import (
    Attributes,
    ConversionEnd,
    Discard,
    Event,
    Map,
    Plug,
    PlugRequest,
    Unmap,
)
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


#: Windows are told apart by a word: an unmap that was refused leaves a page stale too.
_KINDS = {
    "private": FindingKind.STALE,
    "refused": FindingKind.STALE,
    "missing": FindingKind.MISSING,
    "unplugged": FindingKind.UNPLUGGED,
    "freed": FindingKind.FREED,
}


class _Window:
    def __init__(self, line: int, *, told: bool) -> None:
        self.line = line
        #: It is a failure: no conversion excuses it, or not any more.
        self.told = told


class _Target:
    """One target. A page in a further layer is mapped once more, by another domain."""

    def __init__(self) -> None:
        #: Each page with the physical address of page 0, as the call that mapped it has it.
        self.layers: list[dict[int, int | None]] = [{}]
        #: Pages that an unmap was to remove, and did not.
        self.refused: set[int] = set()
        #: Pages whose memory was given back since they were mapped.
        self.freed: set[int] = set()

    def map(self, event: Map) -> None:
        if not event.done:
            return
        pages = _pages(event.start, event.end)
        base = None if event.key is None else event.key - event.start
        mapped = self.layers[0]
        if base is not None and any(mapped.get(page) == base for page in pages):
            for layer in self.layers[1:]:
                if not layer.keys() & set(pages):
                    break
            else:
                self.layers.append(layer := {})
            layer |= dict.fromkeys(pages, base)
        for page in pages:
            if page not in mapped:
                mapped[page] = base

    def unmap(self, event: Unmap) -> None:
        pages = set(_pages(event.start, event.end))
        layers = [layer for layer in self.layers if layer.keys() & pages]
        if not layers:
            return
        there = sorted(layers[-1].keys() & pages)
        count = len(there)
        if not event.done:
            count = 0
        elif event.unmapped is not None:
            count = min(count, event.unmapped // PAGE_SIZE)
        for page in there[:count]:
            del layers[-1][page]
        if count < len(there):
            first, last = (event.start, event.end) if not event.done else _hull(there[count:])
            self.refused |= self.layers[0].keys() & set(_pages(first, last))
        self.layers[1:] = [layer for layer in self.layers[1:] if layer]
        self.refused &= self.layers[0].keys()
        self.freed &= self.layers[0].keys()


def naive_audit(events: Sequence[Event], targets: Sequence[str], pages: range) -> set[PageWindow]:
    """Find the windows that outlive their conversion, or have none."""
    private: dict[int, bool] = {}
    plugged: dict[int, bool] = {}
    pluggable: set[int] = set()
    known = {target: _Target() for target in targets}
    opened: dict[tuple[str, str, int], _Window] = {}
    found = set()

    def bad(name: str, page: int) -> Iterator[tuple[str, bool]]:
        target = known[name]
        mapped = page in target.layers[0]
        expected = private.get(page) is False and (page not in pluggable or plugged.get(page))
        yield "refused", page in target.refused  # before the state, which may have told of it
        yield "private", mapped and private.get(page) is True
        yield "missing", bool(expected) and not mapped
        yield "unplugged", mapped and plugged.get(page) is False
        yield "freed", page in target.freed

    def close(word: str, name: str, page: int, line: int | None) -> None:
        window = opened.pop((word, name, page))
        if word == "refused":
            state = opened.get(("private", name, page))
            if state is not None and state.told:
                return  # that is told
        if window.told:
            found.add(PageWindow(_KINDS[word], name, page, window.line, line))

    for event in events:
        if isinstance(event, ConversionEnd):
            for window in opened.values():
                window.told = True
        elif isinstance(event, Attributes):
            private |= dict.fromkeys(_pages(event.start, event.end), event.private)
        elif isinstance(event, PlugRequest) or (isinstance(event, Plug) and event.done):
            new = set(_pages(event.start, event.end)) - pluggable
            pluggable |= new
            for key in [key for key in opened if key[0] == "missing" and key[2] in new]:
                del opened[key]  # who knows whether it was ever plugged
        if isinstance(event, Plug) and event.done:
            plugged |= dict.fromkeys(_pages(event.start, event.end), event.plugged)
        elif isinstance(event, Discard) and event.shared and event.done:
            for target in known.values():
                target.freed |= target.layers[0].keys() & set(_pages(event.start, event.end))
        elif isinstance(event, Map):
            known[event.target].map(event)
        elif isinstance(event, Unmap):
            known[event.target].unmap(event)
        for name in targets:
            for page in pages:
                for word, is_bad in bad(name, page):
                    key = word, name, page
                    if is_bad and key not in opened:
                        # Mapping a page that is private is never a part of a conversion; mapping
                        # one that is not yet told as plugged is.
                        told = word == "refused" or (word == "private" and isinstance(event, Map))
                        opened[key] = _Window(event.line, told=told)
                    elif not is_bad and key in opened:
                        close(*key, event.line)
    for key in sorted(opened, key=lambda key: key[0] != "refused"):
        close(*key, None)
    return found


def _pages(start: int, end: int) -> range:
    return range(start // PAGE_SIZE, end // PAGE_SIZE)


def _hull(pages: list[int]) -> tuple[int, int]:
    return pages[0] * PAGE_SIZE, (pages[-1] + 1) * PAGE_SIZE
