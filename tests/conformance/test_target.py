"""The kit accepts right targets, and tells the story of wrong ones."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ramblock.dma import DmaCapabilities, DmaTarget, HostRange, SoftIommu
from ramblock.errors import DmaError, IommuFault
from ramblock.testing.conformance import check_target
from ramblock.testing.conformance.guest import check_guest
from ramblock.testing.conformance.target_player import View

PAGE = 4096
IOVAS = ((0, 0xFEE0_0000), (0xFEF0_0000, 1 << 48))

RIGHT: list[dict[str, Any]] = [
    {"cut": True},
    {"cut": False},
    {"exact": True},
    {"max_mappings": 3},
    {"max_mappings": 3, "cut": False},
    {"max_mappings": 3, "exact": True},
    {"page_size": 512},
    {"page_size": 65536},
    {"iova_ranges": IOVAS},
    {"iova_ranges": ((0x1_0000, 0x3_0000),), "cut": False},
]


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_every_kind_of_software_iommu(options: dict[str, Any]) -> None:
    check_target(lambda: SoftIommu(**options), device=lambda iommu: iommu, examples=40)


def test_one_target_for_all_examples() -> None:
    iommu = SoftIommu()
    closed: list[bool] = []
    iommu.close = lambda: closed.append(True)  # type: ignore[method-assign]
    check_target(lambda: iommu, device=lambda it: it, reuse=True, examples=20)
    assert iommu.mappings() == []
    assert not closed


def test_the_answers_alone_are_judged_where_nothing_can_be_seen() -> None:
    class Blind(SoftIommu):
        def read(self, iova: int, size: int) -> bytes:
            raise AssertionError("nobody gave the device to the kit")

        write = read  # type: ignore[assignment]

    check_target(Blind, examples=20)


# -- wrong ones -----------------------------------------------------------------------------------


class ForgetsTheAnswer(SoftIommu):
    def unmap(self, iova: int, size: int) -> int:
        super().unmap(iova, size)
        return None  # type: ignore[return-value]


class AnswersPages(SoftIommu):
    def unmap(self, iova: int, size: int) -> int:
        return super().unmap(iova, size) // PAGE


class AnswersTheSizeThatWasAsked(SoftIommu):
    def unmap(self, iova: int, size: int) -> int:
        super().unmap(iova, size)
        return size


class AnswersAFloat(SoftIommu):
    def unmap(self, iova: int, size: int) -> int:
        return float(super().unmap(iova, size))  # type: ignore[return-value]


class MapsOverOthers(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        super().unmap(iova, memory.size)
        super().map(iova, memory, writable=writable)


class UnmapsBeforeItRefuses(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        try:
            super().map(iova, memory, writable=writable)
        except DmaError:
            if not (iova | memory.size) % PAGE and iova + memory.size < 1 << 48:
                super().unmap(iova, PAGE)
            raise


class SaysThatItCuts(SoftIommu):
    """But takes the whole mapping."""

    def unmap(self, iova: int, size: int) -> int:
        for mapping in self.mappings():
            if mapping.iova < iova + size and iova < mapping.end:
                super().unmap(mapping.iova, mapping.size)
        return size


class LeavesTheLastPage(SoftIommu):
    def unmap(self, iova: int, size: int) -> int:
        if size > 2 * PAGE:
            return super().unmap(iova, size - PAGE) + PAGE
        return super().unmap(iova, size)


class IgnoresReadOnly(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        super().map(iova, memory)


class IgnoresTheOffset(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        super().map(iova, memory._replace(offset=0), writable=writable)


class IgnoresTheAddress(SoftIommu):
    """It needs a descriptor, and maps nothing without one."""

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if memory.fd is not None:
            super().map(iova, memory, writable=writable)


class RaisesOsError(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        try:
            super().map(iova, memory, writable=writable)
        except DmaError as error:
            raise OSError(error.errno, "no") from error


class RaisesWithoutFields(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        try:
            super().map(iova, memory, writable=writable)
        except DmaError as error:
            raise DmaError(error.errno, "no") from error


class RaisesAnotherErrno(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        try:
            super().map(iova, memory, writable=writable)
        except DmaError as error:
            raise DmaError(errno.EBUSY, "no", iova=iova, size=memory.size) from error


class DoubtsItsRefusals(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        try:
            super().map(iova, memory, writable=writable)
        except DmaError as error:
            error.in_doubt = True
            raise


class MapsPartsOfPages(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        odd = memory.size % PAGE
        super().map(iova & -PAGE, memory._replace(size=memory.size - odd), writable=writable)


class Pretending:
    """Says other things of itself than the software IOMMU in it does."""

    says = DmaCapabilities()

    def __init__(self, **options: Any) -> None:
        inner = SoftIommu(**options)
        self.map, self.unmap, self.close = inner.map, inner.unmap, inner.close
        self.read, self.write = inner.read, inner.write
        self.capabilities = self.says


class HasNoRoom(Pretending):
    """For as much as it says."""

    says = DmaCapabilities(cut=True, max_mappings=9)

    def __init__(self) -> None:
        super().__init__(max_mappings=8)


class HasNoLimit(Pretending):
    says = DmaCapabilities(cut=True, max_mappings=9)


class DoesNotUnmapOnClose(SoftIommu):
    def close(self) -> None:
        pass


class FailsToClose(SoftIommu):
    def close(self) -> None:
        raise ValueError("not now")


class MapsOutsideOfItsRanges(Pretending):
    says = DmaCapabilities(cut=True, iova_ranges=IOVAS)


class ChangesItsMind(Pretending):
    says = DmaCapabilities(cut=True)

    def __init__(self) -> None:
        super().__init__()
        self.inner_map = self.map
        self.map = self.map_and_change

    def map_and_change(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        self.inner_map(iova, memory, writable=writable)
        self.capabilities = DmaCapabilities(cut=False)


class CannotBeMappedAgain(SoftIommu):
    """Fine by itself for a while; a guest goes on longer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def unmap(self, iova: int, size: int) -> int:
        self.seen.add(iova)
        return super().unmap(iova, size)

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if iova in self.seen and len(self.seen) > 2:
            raise DmaError(errno.EEXIST, "no", iova=iova, size=memory.size)
        super().map(iova, memory, writable=writable)


class MapsNothing(SoftIommu):
    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        pass

    def unmap(self, iova: int, size: int) -> int:
        return size


class WornOut(SoftIommu):
    """After more calls than a sequence of single steps has."""

    maps = 0

    def __init__(self) -> None:
        super().__init__(cut=False)

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if self.maps > 16:
            raise DmaError(errno.ENOMEM, "worn out", iova=iova, size=memory.size)
        super().map(iova, memory, writable=writable)
        self.maps += 1


class DoesNotFlush(SoftIommu):
    """A device goes on where it has been once."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, HostRange] = {}

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        super().map(iova, memory, writable=writable)
        self.cache.setdefault(iova, memory)

    def write(self, iova: int, data: bytes) -> None:
        if iova not in self.cache:
            super().write(iova, data)


WRONG: list[tuple[Callable[[], SoftIommu | Pretending], str]] = [
    (ForgetsTheAnswer, "unmap answered None, expected 0x"),
    (AnswersPages, "unmap answered [1-9], expected 0x.000"),
    (AnswersTheSizeThatWasAsked, "unmap answered 4096, expected 0x0"),
    (AnswersAFloat, "unmap answered [0-9]+\\.0, expected"),
    (MapsOverOthers, "it agreed, expected DmaError with EEXIST"),
    (UnmapsBeforeItRefuses, "expected|reads"),
    (SaysThatItCuts, "unmap answered|reads"),
    (LeavesTheLastPage, "unmap answered|reads [0-9a-f]+ at 0x|it refused"),
    (IgnoresReadOnly, "a device can write at 0x"),
    (IgnoresTheOffset, "reads 01"),
    (IgnoresTheAddress, r"reads nothing \(a fault\) at|unmap answered 0"),
    (RaisesOsError, "it raised OSError.*, which is no DmaError"),
    (RaisesWithoutFields, "has iova=None and size=None, expected those of the call"),
    (RaisesAnotherErrno, "expected DmaError with E"),
    (DoubtsItsRefusals, "a refusal is in doubt"),
    (MapsPartsOfPages, "it answered None, expected DmaError with EINVAL"),
    (HasNoRoom, "map number 9 answered DmaError"),
    (HasNoLimit, "map number 10 answered None, expected DmaError with ENOSPC"),
    (DoesNotUnmapOnClose, "reads 01.* expected nothing"),
    (FailsToClose, "close raised ValueError"),
    (MapsOutsideOfItsRanges, "it answered None, expected DmaError with EINVAL"),
    (ChangesItsMind, "its capabilities changed"),
    (MapsNothing, "it answered None, expected DmaError"),
    (DoesNotFlush, "can write at|is not in the memory"),
    (CannotBeMappedAgain, "it refused|was refused"),
]


@pytest.mark.parametrize(("kind", "story"), WRONG, ids=lambda it: getattr(it, "__name__", ""))
def test_a_wrong_target_is_caught(kind: Callable[[], SoftIommu | Pretending], story: str) -> None:
    with pytest.raises(AssertionError, match=story) as caught:
        check_target(kind, device=lambda iommu: iommu)
    assert kind.__name__ in str(caught.value)
    assert not getattr(caught.value, "__notes__", []), "the story says it all"


@pytest.mark.parametrize(
    ("capabilities", "problem"),
    [
        (DmaCapabilities(page_size=3000), "no power of two"),
        (DmaCapabilities(page_size=0), "no power of two"),
        (DmaCapabilities(max_mappings=0), "neither None nor positive"),
        (DmaCapabilities(cut=True, exact=True), "cannot cut"),
        (DmaCapabilities(iova_ranges=((PAGE, PAGE),)), "iova_ranges|no 16 pages"),
        (DmaCapabilities(iova_ranges=((0, 1 << 40), (0, 1 << 41))), "iova_ranges are not"),
        (DmaCapabilities(iova_ranges=((0, 4 * PAGE),)), "no 16 pages of 0x1000 bytes fit"),
    ],
)
def test_capabilities_that_cannot_be_meant(capabilities: DmaCapabilities, problem: str) -> None:
    class Odd(Pretending):
        says = capabilities

    with pytest.raises(AssertionError, match=problem):
        check_target(Odd, examples=10)


@pytest.mark.parametrize(
    ("kind", "story"),
    [
        (ForgetsTheAnswer, "removed None of 0x1000 bytes|wrong number of bytes"),
        (AnswersPages, "removed 0x1 of 0x1000 bytes|wrong number of bytes"),
        (MapsNothing, "is populated, and a device says otherwise|wrong number"),
        (LeavesTheLastPage, "wrong number of bytes"),
        (IgnoresTheOffset, "is not in the block there|the bytes are not those"),
        (WornOut, "the guest was refused: DmaError.*worn out"),
        (DoesNotFlush, "is not in the block there|says otherwise|bytes are not those"),
    ],
)
def test_a_guest_notices_too(kind: Callable[[], SoftIommu], story: str) -> None:
    @contextmanager
    def opened() -> Iterator[tuple[DmaTarget, View, int]]:
        target = kind()
        yield target, View(target), 1 << 32

    with pytest.raises(AssertionError, match=f"under a guest: .*({story})") as caught:
        check_guest(opened, None)
    assert "attach, policy" in str(caught.value)


def test_a_story_is_short() -> None:
    with pytest.raises(AssertionError) as caught:
        check_target(MapsOverOthers, reaches=_reaches)
    first, *steps = str(caught.value).splitlines()
    assert first.endswith("it agreed, expected DmaError with EEXIST, after")
    assert [step.split(" to ")[0] for step in steps] == [
        "  1. map [0x100000000, 0x100001000)",
        "  2. map [0x100000000, 0x100001000)",
    ]


def _reaches(iommu: SoftIommu, iova: int) -> bool:
    try:
        iommu.write(iova, b"x")
    except IommuFault:
        return False
    return True
