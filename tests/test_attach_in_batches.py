"""Attaching to a big guest: in batches, between which others get the lock; still all or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from doubles import PAGE, RecordingVm
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import (
    ConversionError,
    DmaError,
    MappingLimitError,
    PoisonedError,
    UsageError,
)
from ramblock.guest import devices
from ramblock.guest import memory as module
from ramblock.guest.devices import _BATCH
from ramblock.testing import FaultyTarget, pages_of

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
RUNS = 3 * _BATCH
COUNT = 2 * RUNS
SECOND = 1 << 30


@dataclass
class Guest:
    """Every other page of the first block is shared, and all of the second."""

    memory: GuestMemory
    first: RamBlock
    second: RamBlock
    sections: list[RamSection]
    between: dict[int, Callable[[], object]] = field(default_factory=dict)
    """What to do between batches, by how many there were."""
    gaps: int = 0

    def shared(self) -> set[int]:
        return {
            page
            for gpa, size in self.memory.ranges(SHARED)
            for page in range(gpa, gpa + size, PAGE)
        }


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    memory = GuestMemory(RecordingVm())
    first = RamBlock.create("first", COUNT * PAGE, private="stand-in")
    second = RamBlock.create("second", COUNT * PAGE, private="stand-in")
    sections = [memory.map(first, 0), memory.map(second, SECOND)]
    for page in range(0, COUNT, 2):
        memory.convert(page * PAGE, PAGE, SHARED)
    memory.convert(SECOND, COUNT * PAGE, SHARED)
    guest = Guest(memory, first, second, sections)

    def gap() -> None:
        guest.gaps += 1
        guest.between.pop(guest.gaps, lambda: None)()

    monkeypatch.setattr(module, "hand_over", gap)
    yield guest
    first.close()
    second.close()


POLICIES = [MappingPolicy.RUN, MappingPolicy.PAGE]


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_the_same_as_in_one_go(guest: Guest, policy: MappingPolicy) -> None:
    iommu = SoftIommu()
    mapper = guest.memory.attach(iommu, policy)
    assert guest.gaps >= RUNS // _BATCH - 1
    assert pages_of(iommu.mappings()) == guest.shared()
    # A run is one mapping, whatever the batches are.
    assert mapper.entries == RUNS + (1 if policy is MappingPolicy.RUN else COUNT)
    assert mapper.map_calls == mapper.entries
    guest.memory.detach(mapper)
    assert iommu.mappings() == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_conversions_between_batches(guest: Guest, policy: MappingPolicy, gap: int) -> None:
    """Where it is mapped already, where it is not yet, and over the border of the two."""
    border = gap * _BATCH * 2

    def convert() -> None:
        for page, to in (
            (0, PRIVATE),
            (1, SHARED),
            (border - 3, SHARED),
            (border + 1, SHARED),
            (border + 2, PRIVATE),
            (COUNT - 2, PRIVATE),
            (COUNT - 1, SHARED),
        ):
            if page < COUNT:
                guest.memory.convert(page * PAGE, PAGE, to)
        guest.memory.convert((border - 8) * PAGE, 8 * PAGE, PRIVATE)
        guest.memory.convert(SECOND, PAGE, PRIVATE)

    guest.between[gap] = convert
    iommu = SoftIommu()
    mapper = guest.memory.attach(iommu, policy)
    assert pages_of(iommu.mappings()) == guest.shared()
    assert mapper.entries == len(iommu.mappings())
    guest.memory.convert(0, COUNT * PAGE, SHARED)
    assert pages_of(iommu.mappings()) == guest.shared()


def test_sections_and_sources_come_and_go_between_batches(guest: Guest) -> None:
    memory = guest.memory
    with RamBlock.create("third", 4 * PAGE, private="stand-in") as third:
        third_gpa = 2 * SECOND

        def change() -> None:
            memory.map(third, third_gpa)
            memory.convert(third_gpa, PAGE, SHARED)
            memory.unmap(guest.sections[1])
            device = VirtioMem(guest.first, PAGE)
            device.plug(0, 8 * PAGE)
            assert memory.mappers == ()  # it is not there yet
            with pytest.raises(UsageError, match="attached already"):
                memory.attach(iommu)

        guest.between[1] = change
        iommu = SoftIommu()
        memory.attach(iommu)
        assert pages_of(iommu.mappings()) == {
            0,
            2 * PAGE,
            4 * PAGE,
            6 * PAGE,
            third_gpa,
        }


@pytest.mark.parametrize("number", [1, _BATCH, _BATCH + 1, 2 * _BATCH + 7, RUNS + 1])
def test_a_refusal_undoes_all_batches(guest: Guest, number: int) -> None:
    iommu = SoftIommu()
    target = FaultyTarget(iommu, fail_map=(number,))
    with pytest.raises(DmaError):
        guest.memory.attach(target)
    assert iommu.mappings() == []
    assert guest.memory.mappers == ()
    assert not guest.memory.poisoned
    assert list(guest.first.discard_manager.registry) == []
    target.fail_map = ()
    guest.memory.attach(target)
    assert pages_of(iommu.mappings()) == guest.shared()


def test_an_undo_that_fails_poisons(guest: Guest) -> None:
    iommu = SoftIommu()
    target = FaultyTarget(iommu, fail_map=(2 * _BATCH + 1,), short_unmap=range(1, 1000))
    with pytest.raises(PoisonedError, match="attach"):
        guest.memory.attach(target)
    doubted = {
        page
        for gpa, size, who in guest.memory.in_doubt()
        for page in range(gpa, gpa + size, PAGE)
        if who is target
    }
    assert pages_of(iommu.mappings()) <= doubted
    target.short_unmap = ()
    guest.first.close()
    assert iommu.mappings() == []


def test_a_memory_that_is_poisoned_between_batches(guest: Guest) -> None:
    other = FaultyTarget(SoftIommu())
    guest.memory.attach(other)
    guest.gaps = 0

    def poison() -> None:
        other.short_unmap = {other.unmap_calls + 1}
        with pytest.raises(PoisonedError):
            guest.memory.convert(0, 4 * PAGE, PRIVATE)

    guest.between[2] = poison
    iommu = SoftIommu()
    with pytest.raises(PoisonedError):
        guest.memory.attach(iommu)
    assert iommu.mappings() == []
    assert [mapper.target for mapper in guest.memory.mappers] == [other]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_budget_is_checked_before_anything_is_mapped(
    guest: Guest, policy: MappingPolicy
) -> None:
    needed = RUNS + (1 if policy is MappingPolicy.RUN else COUNT)
    target = FaultyTarget(SoftIommu())
    with pytest.raises(MappingLimitError) as refused:
        guest.memory.attach(target, policy, max_mappings=needed - 1)
    assert (refused.value.needed, refused.value.limit) == (needed, needed - 1)
    assert target.map_calls == 0
    assert guest.memory.attach(target, policy, max_mappings=needed).entries == needed


def test_the_budget_counts_more_runs_than_are_looked_at_in_one_go(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_COUNTED", RUNS // 3 + 1)
    target = FaultyTarget(SoftIommu())
    with pytest.raises(MappingLimitError) as refused:
        guest.memory.attach(target, max_mappings=RUNS)
    assert refused.value.needed == RUNS + 1
    assert target.map_calls == 0


def test_a_budget_that_is_used_up_between_batches(guest: Guest) -> None:
    iommu = SoftIommu()
    # Counted before the first batch; afterwards there is more to map than was counted.
    guest.between[2] = lambda: guest.memory.convert(PAGE, PAGE, SHARED)
    with pytest.raises(MappingLimitError):
        guest.memory.attach(iommu, MappingPolicy.PAGE, max_mappings=RUNS + COUNT)
    assert iommu.mappings() == []
    assert not guest.memory.poisoned


def test_a_conversion_is_refused_for_a_target_that_is_half_attached(guest: Guest) -> None:
    iommu = SoftIommu()
    target = FaultyTarget(iommu)

    def convert() -> None:
        target.fail_unmap = {target.unmap_calls + 1}
        with pytest.raises(ConversionError):
            guest.memory.convert(0, PAGE, PRIVATE)
        guest.memory.convert(2 * PAGE, PAGE, PRIVATE)

    guest.between[1] = convert
    guest.memory.attach(target)
    assert pages_of(iommu.mappings()) == guest.shared()


def test_other_threads_convert_meanwhile(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    during: list[int] = []
    attaching = threading.Event()
    stop = threading.Event()

    def convert() -> None:
        page = 0
        while not stop.is_set():
            page = (page + 37) % COUNT
            guest.memory.convert(page * PAGE, PAGE, SHARED)
            guest.memory.convert(page * PAGE, PAGE, PRIVATE)
            if attaching.is_set():
                during.append(page)

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    iommus = [SoftIommu(), SoftIommu(cut=False), SoftIommu(exact=True)]
    try:
        for _ in range(3):
            for iommu in iommus:
                attaching.set()
                mapper = guest.memory.attach(iommu)
                attaching.clear()
                guest.memory.detach(mapper)
                assert iommu.mappings() == []
            mappers = [guest.memory.attach(iommu) for iommu in iommus]
            for mapper in mappers:
                guest.memory.detach(mapper)
        for iommu in iommus:
            guest.memory.attach(iommu)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert during
    for iommu in iommus:
        assert pages_of(iommu.mappings()) == guest.shared()
