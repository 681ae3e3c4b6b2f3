"""The kit accepts right listeners, and tells the story of wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from doubles import RecordingListener
from ramblock import RamSection
from ramblock.testing.conformance import check_listener

PAGE = 4096


class Holding:
    """A listener that does it right."""

    def __init__(self) -> None:
        self.pages: set[int] = set()

    def pages_of(self, section: RamSection) -> set[int]:
        return set(range(section.offset, section.end, PAGE))

    def notify_populate(self, section: RamSection) -> None:
        self.pages |= self.pages_of(section)

    def notify_discard(self, section: RamSection) -> None:
        self.pages -= self.pages_of(section)

    def held(self) -> list[tuple[int, int]]:
        return [(page, PAGE) for page in self.pages]


def test_a_listener_that_holds_what_it_hears() -> None:
    check_listener(Holding, Holding.held)


def test_the_stand_in() -> None:
    def held(listener: RecordingListener) -> list[tuple[int, int]]:
        assert listener.wrong == []
        return [(page * PAGE, PAGE) for page in listener.held]

    check_listener(RecordingListener, held, examples=30)
    check_listener(lambda: RecordingListener(sparse=True), held, examples=30)


class Limited(Holding):
    """Refuses when it is full, which a listener may."""

    def notify_populate(self, section: RamSection) -> None:
        if len(self.pages | self.pages_of(section)) > 4:
            raise MemoryError("full")
        super().notify_populate(section)


def test_a_listener_that_refuses() -> None:
    check_listener(Limited, Limited.held)


# -- wrong ones -----------------------------------------------------------------------------------


class TakesBeforeItRefuses(Holding):
    def notify_populate(self, section: RamSection) -> None:
        super().notify_populate(section)
        if len(self.pages) > 4:
            raise MemoryError("full")


class ForgetsEverything(Holding):
    def notify_discard(self, section: RamSection) -> None:
        self.pages.clear()


class KeepsEverything(Holding):
    def notify_discard(self, section: RamSection) -> None:
        pass


class OnlyFirstPages(Holding):
    def pages_of(self, section: RamSection) -> set[int]:
        return {section.offset}


class GuestAddresses(Holding):
    """Takes the guest address for the offset in the block."""

    def pages_of(self, section: RamSection) -> set[int]:
        return set(range(section.gpa, section.gpa_end, PAGE))


class IncludesTheEnd(Holding):
    def pages_of(self, section: RamSection) -> set[int]:
        return set(range(section.offset, section.end + PAGE, PAGE))


class WholeRunsOnly(Holding):
    """Lets go of a run only as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[tuple[int, int]] = set()

    def notify_populate(self, section: RamSection) -> None:
        self.runs.add((section.offset, section.size))

    def notify_discard(self, section: RamSection) -> None:
        self.runs.discard((section.offset, section.size))

    def held(self) -> list[tuple[int, int]]:
        return list(self.runs)


class LetsGoBeforeItRefuses(Holding):
    """Refuses a discard, and has let go of pages that were not asked for."""

    def notify_discard(self, section: RamSection) -> None:
        if len(self.pages) > 2:
            self.pages.clear()
            raise RuntimeError("in use")
        super().notify_discard(section)


class Unaligned(Holding):
    def held(self) -> list[tuple[int, int]]:
        return [(page + 1, PAGE) for page in self.pages]


WRONG: list[tuple[type[Holding], str]] = [
    (TakesBeforeItRefuses, "it refused a populate .* and holds"),
    (ForgetsEverything, "it holds {}, expected {0x"),
    (KeepsEverything, "it holds {0x.*, expected"),
    (OnlyFirstPages, "it holds {0x"),
    (GuestAddresses, "it holds {0x1000"),
    (IncludesTheEnd, "it holds {0x"),
    (WholeRunsOnly, "it holds {0x"),
    (LetsGoBeforeItRefuses, "it refused a discard .* and holds {}"),
    (Unaligned, "not whole pages"),
]


@pytest.mark.parametrize(("kind", "story"), WRONG, ids=lambda it: getattr(it, "__name__", ""))
def test_a_wrong_listener_is_caught(kind: Callable[[], Holding], story: str) -> None:
    with pytest.raises(AssertionError, match=story) as caught:
        check_listener(kind, lambda listener: listener.held())
    assert "it hears: " in str(caught.value)
