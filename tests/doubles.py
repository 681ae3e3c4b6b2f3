"""
Stand-ins for what other people write: listeners, discard sources, a VM, an IOMMU that pauses.

Each keeps its own record of what it was told, so that a test compares two books and not one with
itself.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from ramblock import RamBlock, RamBlockAttributes, RamSection
from ramblock.units import PAGE_SIZE

__all__ = [
    "PAGE",
    "CoarseSource",
    "Heard",
    "PageSource",
    "PageSourceWithRanges",
    "RecordingListener",
    "RecordingVm",
    "RefusalError",
    "RunSource",
    "attributes_of",
    "discard",
    "pages",
    "populate",
    "runs",
    "section",
]

PAGE = PAGE_SIZE


class RefusalError(Exception):
    """What a stand-in raises when it was told to refuse."""


def pages(offset: int, size: int) -> set[int]:
    """Name the pages of a range by number."""
    assert offset % PAGE == 0, hex(offset)
    assert size % PAGE == 0, hex(size)
    return set(range(offset // PAGE, (offset + size) // PAGE))


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Join page numbers into maximal runs, as (offset, size) in bytes, ascending."""
    result: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if result and sum(result[-1]) == number * PAGE:
            result[-1] = result[-1][0], result[-1][1] + PAGE
        else:
            result.append((number * PAGE, PAGE))
    return result


def section(
    block: RamBlock, first: int = 0, count: int | None = None, *, gpa: int = 0
) -> RamSection:
    """Name a part of a block in pages; all of it by default."""
    size = block.size - first * PAGE if count is None else count * PAGE
    return RamSection(block, first * PAGE, size, gpa)


class Heard(NamedTuple):
    """One call to a listener, in pages."""

    verb: Literal["populate", "discard"]
    first: int
    length: int


def populate(first: int, count: int) -> Heard:
    return Heard("populate", first, count)


def discard(first: int, count: int) -> Heard:
    return Heard("discard", first, count)


class RecordingListener:
    """
    Notes what it hears, and what it holds.

    ``refuse`` decides about each call before it counts; ``then`` runs inside each call, after the
    decision. What a listener may rely on is checked: nothing is populated twice, nothing is
    discarded that it does not hold, unless it is sparse.
    """

    def __init__(self, name: str = "listener", *, sparse: bool = False) -> None:
        self.name = name
        self.sparse_discard = sparse
        self.calls: list[Heard] = []
        self.sections: list[RamSection] = []
        self.held: set[int] = set()
        self.wrong: list[str] = []
        self.refuse: Callable[[Heard], bool] = lambda _: False
        self.then: Callable[[Heard], object] = lambda _: None
        self.journal: list[tuple[str, Heard]] | None = None

    def notify_populate(self, section: RamSection) -> None:
        numbers = self._hear("populate", section)
        if numbers & self.held:
            self.wrong.append(f"populate of {section!r}: some of it is held already")
        self.held |= numbers

    def notify_discard(self, section: RamSection) -> None:
        numbers = self._hear("discard", section)
        if not self.sparse_discard and not numbers <= self.held:
            self.wrong.append(f"discard of {section!r}: not all of it is held")
        if not numbers & self.held:
            self.wrong.append(f"discard of {section!r}: none of it is held")
        self.held -= numbers

    def _hear(self, verb: Literal["populate", "discard"], section: RamSection) -> set[int]:
        call = Heard(verb, section.offset // PAGE, section.size // PAGE)
        if self.refuse(call):
            raise RefusalError(f"{self.name} refuses to {verb}")
        self.calls.append(call)
        self.sections.append(section)
        if self.journal is not None:
            self.journal.append((self.name, call))
        self.then(call)
        return pages(section.offset, section.size)

    def take_calls(self) -> list[Heard]:
        """What it heard since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def refuse_all(self, verb: Literal["populate", "discard"]) -> None:
        self.refuse = lambda call: call.verb == verb

    def refuse_nothing(self) -> None:
        self.refuse = lambda _: False

    def __repr__(self) -> str:
        return f"<RecordingListener {self.name!r}>"


class PageSource:
    """
    A discard source that can only be asked page by page: a set of page numbers is what it calls
    populated.
    """

    def __init__(self, populated: Iterable[int] = (), *, granularity: int = PAGE) -> None:
        self.granularity = granularity
        self.populated = set(populated)
        self.asked = 0

    def is_populated(self, offset: int, size: int) -> bool:
        self.asked += 1
        first, last = offset // PAGE, (offset + size - 1) // PAGE
        return all(number in self.populated for number in range(first, last + 1))


class PageSourceWithRanges(PageSource):
    """The same, and it can name its runs."""

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        inside = {number for number in self.populated if offset <= number * PAGE < offset + size}
        yield from runs(inside)


class CoarseSource(PageSource):
    """
    One that thinks in larger granules, and answers in whole ones whatever it is asked for.

    ``populated`` has whole granules of pages.
    """

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for start, length in runs(self.populated):
            if start < offset + size and offset < start + length:
                yield start, length


class RunSource:
    """
    A discard source for blocks too big for a set of pages: a few runs, as (offset, size) in bytes.
    """

    granularity = PAGE

    def __init__(self, populated: list[tuple[int, int]]) -> None:
        self._populated = populated

    def is_populated(self, offset: int, size: int) -> bool:
        return any(
            start <= offset and offset + size <= start + length for start, length in self._populated
        )

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for start, length in self._populated:
            low, high = max(start, offset), min(start + length, offset + size)
            if low < high:
                yield low, high - low


class RecordingVm:
    """
    A VM that notes what it is asked, and which guest pages (by number) are private.

    With memory slots.

    ``refuse`` decides about each call before it counts. The kernel's default is shared.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.private: set[int] = set()
        self.slots: list[RamSection] = []
        self.refuse: Callable[[tuple[str, int, int]], bool] = lambda _: False
        self.then: Callable[[tuple[str, int, int]], object] = lambda _: None

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        self._hear("private" if private else "shared", gpa, size)
        if private:
            self.private |= pages(gpa, size)
        else:
            self.private -= pages(gpa, size)

    def add_memory_slot(self, section: RamSection) -> None:
        self._hear("add", section.gpa, section.size)
        if section not in self.slots:
            self.slots.append(section)

    def remove_memory_slot(self, section: RamSection) -> None:
        if section in self.slots:
            self._hear("remove", section.gpa, section.size)
            self.slots.remove(section)

    def _hear(self, verb: str, gpa: int, size: int) -> None:
        call = verb, gpa // PAGE, size // PAGE
        if self.refuse(call):
            raise OSError(errno.ENOMEM, f"the VM refuses {call}")
        self.calls.append(call)
        self.then(call)

    def take_calls(self) -> list[tuple[str, int, int]]:
        """What it was asked since the last time."""
        calls, self.calls = self.calls, []
        return calls


def attributes_of(block: RamBlock) -> RamBlockAttributes:
    """Give the page attributes of a block that has them."""
    assert block.attributes is not None
    return block.attributes
