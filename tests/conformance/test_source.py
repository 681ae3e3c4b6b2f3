"""The kit accepts right sources, and tells the story of wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from doubles import PageSource, RunSource
from ramblock import PageState, RamBlock, RamBlockAttributes, Source, VirtioMem
from ramblock.errors import UsageError
from ramblock.testing.conformance import check_source

PAGE = 4096
SIZE = 16 * PAGE


def plug_or_unplug(device: VirtioMem, offset: int, size: int, populate: bool) -> None:
    (device.plug if populate else device.unplug)(offset, size)


@pytest.mark.parametrize("block_size", [PAGE, 4 * PAGE, SIZE])
def test_virtio_mem(block_size: int) -> None:
    check_source(lambda block: VirtioMem(block, block_size), change=plug_or_unplug)


def test_page_attributes() -> None:
    def attributes_of(block: RamBlock) -> RamBlockAttributes:
        return RamBlockAttributes(block)

    def convert(source: RamBlockAttributes, offset: int, size: int, populate: bool) -> None:
        source.state_change(offset, size, PageState.SHARED if populate else PageState.PRIVATE)

    check_source(attributes_of, change=convert)


def test_stand_ins() -> None:
    pages = {1, 2, 5, 15}
    check_source(lambda _: PageSource(pages))
    check_source(lambda _: Populated())
    check_source(lambda _: RunSource([(0, 2 * PAGE), (4 * PAGE, 12 * PAGE)]))


# -- wrong ones -----------------------------------------------------------------------------------


class Populated(PageSource):
    def __init__(self, *, granularity: int = PAGE) -> None:
        super().__init__({1, 2, 5, 15}, granularity=granularity)

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for page in sorted(self.populated):
            low, high = max(page * PAGE, offset), min((page + 1) * PAGE, offset + size)
            if low < high:
                yield low, high - low


class AnyWillDo(Populated):
    def is_populated(self, offset: int, size: int) -> bool:
        return any(
            page in self.populated for page in range(offset // PAGE, -(-(offset + size) // PAGE))
        )


class RoundsDown(Populated):
    def is_populated(self, offset: int, size: int) -> bool:
        return all(
            page in self.populated for page in range(offset // PAGE, (offset + size) // PAGE)
        )


class ANumber(Populated):
    def is_populated(self, offset: int, size: int) -> bool:
        return int(super().is_populated(offset, size))  # type: ignore[return-value]


class WholePages(Populated):
    """Not clipped to the range that was asked for."""

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for page in sorted(self.populated):
            if offset < (page + 1) * PAGE and page * PAGE < offset + size:
                yield page * PAGE, PAGE


class Descending(Populated):
    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        yield from reversed(list(super().ranges(offset, size)))


class StartsAndEnds(Populated):
    """(start, end) instead of (offset, size)."""

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for low, length in super().ranges(offset, size):
            yield low, low + length


class ForgetsTheLast(Populated):
    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        yield from list(super().ranges(offset, size))[:-1]


class Counts(Populated):
    """Populated is only what nobody has asked for too often."""

    def is_populated(self, offset: int, size: int) -> bool:
        return super().is_populated(offset, size) and self.asked < 40

    ranges = None  # type: ignore[assignment]


class Odd(Populated):
    def __init__(self) -> None:
        super().__init__(granularity=3 * PAGE)


class Huge(Populated):
    def __init__(self) -> None:
        super().__init__(granularity=64 * PAGE)


class CannotBeAsked(Populated):
    def is_populated(self, offset: int, size: int) -> bool:
        if offset % PAGE:
            raise ValueError("not aligned")
        return super().is_populated(offset, size)


WRONG: list[tuple[Callable[[], Source], str]] = [
    (AnyWillDo, "answered True; its granules say False"),
    (RoundsDown, "its granules say"),
    (ANumber, "answered [01]; its granules say"),
    (WholePages, "not ascending, or not inside"),
    (Descending, "not ascending, or not inside"),
    (StartsAndEnds, "not ascending, or not inside"),
    (ForgetsTheLast, "is_populated differs at 0x"),
    (Counts, "change with being asked|granules say|a listener holds"),
    (Odd, "which is no power of two"),
    (Huge, "no multiple of 0x40000"),
    (CannotBeAsked, "raised ValueError"),
]


@pytest.mark.parametrize(("kind", "story"), WRONG, ids=lambda it: getattr(it, "__name__", ""))
def test_a_source_with_wrong_answers_is_caught(kind: Callable[[], Source], story: str) -> None:
    with pytest.raises(AssertionError, match=story):
        check_source(lambda _: kind())


class Switch:
    """A source that changes, with each mistake that can be made at it."""

    granularity = PAGE

    def __init__(self, block: RamBlock, mistake: str) -> None:
        self.manager = block.discard_manager
        self.mistake = mistake
        self.populated: set[int] = set()

    def is_populated(self, offset: int, size: int) -> bool:
        return set(range(offset & -PAGE, offset + size, PAGE)) <= self.populated

    def change(self, offset: int, size: int, populate: bool) -> None:
        pages, before = set(range(offset, offset + size, PAGE)), set(self.populated)
        if self.mistake != "tells of what has not changed" and pages & before != (
            set() if populate else pages
        ):
            raise UsageError("not all of it is in the other state")
        if self.mistake != "tells first":
            self.populated = before | pages if populate else before - pages
        tell = self.manager.notify_populate if populate else self.manager.notify_discard
        if self.mistake == "tells the other":
            tell = self.manager.notify_discard if populate else self.manager.notify_populate
        try:
            if self.mistake != "tells nobody":
                if self.mistake == "tells of a part":
                    size = PAGE
                tell(self, offset, size)
        except Exception:
            if self.mistake != "does not take it back":
                self.populated = before
            if self.mistake != "swallows the refusal":
                raise
        else:
            self.populated = before | pages if populate else before - pages


MISTAKES = [
    ("tells nobody", "a listener holds"),
    ("tells the other", "a listener h|it raised"),
    ("tells of a part", "a listener holds"),
    ("tells of what has not changed", "some of which was"),
    ("does not take it back", "populated is .* expected"),
    ("swallows the refusal", "a listener refused, and the change says nothing of it"),
]


def test_a_source_that_changes_as_it_should() -> None:
    check_source(lambda block: Switch(block, ""), change=Switch.change)


@pytest.mark.parametrize(("mistake", "story"), MISTAKES)
def test_a_source_that_changes_wrongly_is_caught(mistake: str, story: str) -> None:
    with pytest.raises(AssertionError, match=story) as caught:
        check_source(lambda block: Switch(block, mistake), change=Switch.change)
    assert "1. " in str(caught.value)


def test_a_source_that_cannot_come_back_is_caught() -> None:
    class Once(Populated):
        added: Any = 0

        def on_adding(self) -> None:
            self.added += 1
            if self.added > 1:
                raise ValueError("only once")

    with pytest.raises(AssertionError, match="add_source, after remove_source raised ValueError"):
        check_source(lambda _: Once())
