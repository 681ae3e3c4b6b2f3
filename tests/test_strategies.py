from collections.abc import Callable

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from doubles import PAGE
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import IommuFault, UsageError
from ramblock.testing import GuestModel, pages_of
from ramblock.testing.strategies import (
    Operation,
    TargetKind,
    Verb,
    hostile_ranges,
    operations,
    page_ranges,
    page_states,
    target_kinds,
)

SIZE = 16 * PAGE


@given(st.data(), st.sampled_from([1, PAGE, 4 * PAGE]), st.sampled_from([0, SIZE, 1 << 40]))
def test_ranges_are_not_empty_aligned_and_inside(
    data: st.DataObject, granularity: int, start: int
) -> None:
    offset, size = data.draw(page_ranges(SIZE, start=start, granularity=granularity))
    assert start <= offset < offset + size <= start + SIZE
    assert offset % granularity == size % granularity == 0


@pytest.mark.parametrize("where", [(0, PAGE), (15 * PAGE, PAGE), (0, SIZE), (3 * PAGE, 2 * PAGE)])
def test_ranges_of_every_kind_turn_up(where: tuple[int, int]) -> None:
    assert find(page_ranges(SIZE), lambda drawn: drawn == where) == where


@pytest.mark.parametrize(
    ("size", "start", "granularity"),
    [(0, 0, PAGE), (PAGE, 1, PAGE), (PAGE + 1, 0, PAGE), (PAGE, 0, 3)],
)
def test_ranges_of_what_is_no_memory(size: int, start: int, granularity: int) -> None:
    for strategy in (page_ranges, hostile_ranges):
        with pytest.raises(UsageError):
            strategy(size, start=start, granularity=granularity)


def test_the_simplest_ones() -> None:
    assert find(page_ranges(SIZE), lambda _: True) == (0, PAGE)
    assert find(page_states(), lambda _: True) is PageState.PRIVATE
    assert find(target_kinds(), lambda _: True) == TargetKind()


@given(hostile_ranges(SIZE, start=1 << 20))
def test_no_memory_gives_a_hostile_guest_what_it_asks_for(where: tuple[int, int]) -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", SIZE, private="stand-in") as block:
        memory.map(block, 1 << 20)
        with pytest.raises(UsageError):
            memory.convert(*where, PageState.SHARED)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda address, size: size == 0,
        lambda address, size: address % PAGE != 0,
        lambda address, size: size % PAGE != 0,
        lambda address, size: address + size > 1 << 64,
        lambda address, size: address < 1 << 20 < address + size and size % PAGE == 0,
    ],
)
def test_hostile_ranges_of_every_kind_turn_up(wanted: Callable[[int, int], bool]) -> None:
    find(hostile_ranges(SIZE, start=1 << 20), lambda drawn: wanted(*drawn))


@given(target_kinds(max_limit=5))
def test_every_kind_of_target_can_be_attached(kind: TargetKind) -> None:
    iommu = kind.make()
    assert iommu.capabilities.exact is kind.exact
    mapper = GuestMemory().attach(iommu, kind.policy, max_mappings=kind.budget)
    limits = [limit for limit in (kind.target_limit, kind.budget) if limit is not None]
    assert mapper.limit == min(limits, default=None)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda kind: kind.exact,
        lambda kind: not kind.cut and not kind.exact,
        lambda kind: kind.policy is MappingPolicy.PAGE and kind.cut,
        lambda kind: kind.policy is MappingPolicy.RUN,
        lambda kind: kind.budget == 5,
    ],
)
def test_targets_of_every_kind_turn_up(wanted: Callable[[TargetKind], bool]) -> None:
    find(target_kinds(max_limit=5), wanted)


@pytest.mark.parametrize("verb", Verb)
def test_every_verb_turns_up(verb: Verb) -> None:
    find(operations(SIZE, plug=4 * PAGE), lambda operation: operation.verb is verb)


@given(operations(SIZE))
def test_nothing_is_plugged_where_nobody_asked_for_it(operation: Operation) -> None:
    assert operation.verb not in (Verb.PLUG, Verb.UNPLUG)


@given(st.lists(operations(SIZE, plug=4 * PAGE), max_size=20))
def test_how_they_are_meant_to_be_used(sequence: list[Operation]) -> None:
    """A VMM (here: this library) and the model do the same, and agree after each step."""
    memory, iommu, model = GuestMemory(), SoftIommu(), GuestModel()
    with RamBlock.create("ram", SIZE, private="stand-in") as block:
        memory.map(block, 0)
        memory.attach(iommu)
        device = VirtioMem(block, 4 * PAGE)
        model.add_block("ram", SIZE)
        model.add_virtio_mem("ram")
        model.map("ram", 0)
        for operation in sequence:
            where = operation.offset, operation.size
            touched = {
                page // PAGE * PAGE for page in (*range(where[0], sum(where), PAGE), sum(where) - 1)
            }
            if operation.verb in (Verb.SHARE, Verb.MAKE_PRIVATE):
                to = PageState.SHARED if operation.verb is Verb.SHARE else PageState.PRIVATE
                memory.convert(*where, to)
                model.convert(*where, to)
            elif operation.verb in (Verb.PLUG, Verb.UNPLUG):
                verb = operation.verb.value
                try:
                    getattr(device, verb)(*where)
                except UsageError:
                    continue
                getattr(model, verb)("ram", *where)
            elif touched <= model.populated():
                iommu.write(where[0], b"x" * where[1])
                assert iommu.read(*where) == b"x" * where[1]
            else:
                with pytest.raises(IommuFault):
                    iommu.read(*where)
            assert pages_of(iommu.mappings()) == model.populated()
