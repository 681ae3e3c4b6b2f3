from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import (
    PAGE,
    Heard,
    RecordingListener,
    RecordingVm,
    RefusalError,
    attributes_of,
    discard,
    populate,
    runs,
    section,
)
from ramblock import GuestMemory, PageState, RamBlock, RamBlockAttributes
from ramblock.dma import SoftIommu
from ramblock.errors import MappingLimitError, UsageError
from ramblock.events import StateChanged
from ramblock.testing import SimulatedInPlace

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 12


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        yield block


@pytest.fixture
def attributes(block: RamBlock) -> RamBlockAttributes:
    return attributes_of(block)


@pytest.fixture
def listener(block: RamBlock) -> RecordingListener:
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block))
    return listener


def shared(attributes: RamBlockAttributes) -> list[tuple[int, int]]:
    return list(attributes.ranges(SHARED))


# -- what it says ----------------------------------------------------------------------------------


def test_two_states() -> None:
    assert {state.name for state in PageState} == {"PRIVATE", "SHARED"}


def test_everything_starts_private(attributes: RamBlockAttributes) -> None:
    assert attributes.granularity == PAGE
    assert attributes.shared_bytes == 0
    assert shared(attributes) == []
    assert list(attributes.ranges(PRIVATE)) == [(0, COUNT * PAGE)]
    assert repr(attributes) == "<RamBlockAttributes of 'ram': 0x0 of 0xc000 bytes shared>"


def test_ranges_are_maximal_and_ascending(attributes: RamBlockAttributes) -> None:
    for first, count in ((6, 2), (1, 1), (8, 1), (2, 2)):
        attributes.state_change(first * PAGE, count * PAGE, SHARED)
    assert shared(attributes) == [(PAGE, 3 * PAGE), (6 * PAGE, 3 * PAGE)]
    assert list(attributes.ranges(PRIVATE)) == [
        (0, PAGE),
        (4 * PAGE, 2 * PAGE),
        (9 * PAGE, 3 * PAGE),
    ]
    assert attributes.shared_bytes == 6 * PAGE


def test_ranges_as_a_discard_source_are_clipped(attributes: RamBlockAttributes) -> None:
    attributes.state_change(PAGE, 3 * PAGE, SHARED)
    assert list(attributes.ranges(0, COUNT * PAGE)) == [(PAGE, 3 * PAGE)]
    assert list(attributes.ranges(2 * PAGE + 5, PAGE)) == [(2 * PAGE + 5, PAGE)]
    assert list(attributes.ranges(0, PAGE + 1)) == [(PAGE, 1)]
    assert list(attributes.ranges(4 * PAGE, PAGE)) == []


@pytest.mark.parametrize("wrong", ["shared", None, 1.0, object()])
def test_ranges_of_what_is_no_state(attributes: RamBlockAttributes, wrong: PageState) -> None:
    with pytest.raises(UsageError, match="is not a page state"):
        attributes.ranges(wrong)


def test_is_shared_means_all_of_it(attributes: RamBlockAttributes) -> None:
    attributes.state_change(PAGE, 2 * PAGE, SHARED)
    assert attributes.is_shared(PAGE, 2 * PAGE)
    assert attributes.is_shared(2 * PAGE, 1)
    assert attributes.is_shared(PAGE + 1, PAGE)
    assert not attributes.is_shared(PAGE, 2 * PAGE + 1)
    assert not attributes.is_shared(PAGE - 1, 2)
    assert not attributes.is_shared(0, COUNT * PAGE)


BAD_RANGES = [
    (0, 0),
    (0, -PAGE),
    (-PAGE, PAGE),
    (0, (COUNT + 1) * PAGE),
    (COUNT * PAGE, PAGE),
    (1 << 64, PAGE),
    (PAGE, (1 << 64) - PAGE),
    (0, 1 << 64),
    (None, PAGE),
    (0, None),
    ("0", PAGE),
    (True, PAGE),
    (0.0, PAGE),
]


@pytest.mark.parametrize(("offset", "size"), BAD_RANGES)
def test_is_shared_of_what_is_no_range(
    attributes: RamBlockAttributes, offset: int, size: int
) -> None:
    with pytest.raises(UsageError):
        attributes.is_shared(offset, size)


# -- changing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "size"), [*BAD_RANGES, (1, PAGE), (0, PAGE + 1), (PAGE, 1)])
@pytest.mark.parametrize("to", list(PageState))
def test_a_change_of_what_is_no_range_of_pages(
    attributes: RamBlockAttributes,
    listener: RecordingListener,
    offset: int,
    size: int,
    to: PageState,
) -> None:
    attributes.state_change(PAGE, PAGE, SHARED)
    listener.take_calls()
    with pytest.raises(UsageError):
        attributes.state_change(offset, size, to)
    assert shared(attributes) == [(PAGE, PAGE)]
    assert listener.calls == []


@pytest.mark.parametrize("to", [None, True, False, 0, "shared", "SHARED", object()])
def test_a_change_to_what_is_no_state(
    attributes: RamBlockAttributes, listener: RecordingListener, to: PageState
) -> None:
    with pytest.raises(UsageError, match="is not a page state"):
        attributes.state_change(0, PAGE, to)
    assert attributes.shared_bytes == 0
    assert listener.calls == []


def test_listeners_hear_what_really_changes(
    attributes: RamBlockAttributes, listener: RecordingListener
) -> None:
    attributes.state_change(2 * PAGE, 2 * PAGE, SHARED)
    attributes.state_change(6 * PAGE, PAGE, SHARED)
    listener.take_calls()
    attributes.state_change(0, COUNT * PAGE, SHARED)
    assert listener.take_calls() == [populate(0, 2), populate(4, 2), populate(7, 5)]
    attributes.state_change(3 * PAGE, PAGE, PRIVATE)
    assert listener.take_calls() == [discard(3, 1)]
    attributes.state_change(2 * PAGE, 4 * PAGE, PRIVATE)
    assert listener.take_calls() == [discard(2, 1), discard(4, 2)]
    assert listener.wrong == []


@pytest.mark.parametrize("to", list(PageState))
def test_what_is_already_so_tells_nobody(
    attributes: RamBlockAttributes, listener: RecordingListener, to: PageState
) -> None:
    attributes.state_change(0, 4 * PAGE, to)
    listener.take_calls()
    attributes.state_change(PAGE, 2 * PAGE, to)
    assert listener.calls == []
    assert attributes.shared_bytes == (4 * PAGE if to is SHARED else 0)


def test_the_state_flips_after_all_listeners_have_agreed(
    block: RamBlock, attributes: RamBlockAttributes
) -> None:
    seen: list[tuple[str, bool]] = []
    for name in ("one", "two"):
        listener = RecordingListener(name)
        block.discard_manager.register_listener(listener, section(block))
        listener.then = lambda call: seen.append((call.verb, attributes.is_shared(0, PAGE)))
    attributes.state_change(0, PAGE, SHARED)
    attributes.state_change(0, PAGE, PRIVATE)
    assert seen == [("populate", False)] * 2 + [("discard", True)] * 2


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("to", list(PageState))
def test_all_or_nothing(
    block: RamBlock, attributes: RamBlockAttributes, at: int, to: PageState
) -> None:
    # Two listeners, two runs each; one of the four calls is refused.
    before = SHARED if to is PRIVATE else PRIVATE
    attributes.state_change(0, COUNT * PAGE, before)
    attributes.state_change(3 * PAGE, PAGE, to)
    listeners = [RecordingListener("one"), RecordingListener("two")]
    for listener in listeners:
        block.discard_manager.register_listener(listener, section(block))
    held = listeners[0].held.copy()
    calls = 0

    def refuse(call: Heard) -> bool:
        nonlocal calls
        calls += 1
        return calls == at + 1

    for listener in listeners:
        listener.refuse = refuse
    ranges = shared(attributes)
    with pytest.raises(RefusalError):
        attributes.state_change(2 * PAGE, 3 * PAGE, to)
    assert shared(attributes) == ranges
    assert attributes.shared_bytes == sum(size for _, size in ranges)
    for listener in listeners:
        assert listener.held == held
        assert listener.wrong == []
    assert not block.guard.poisoned
    # And then it can be done.
    attributes.state_change(2 * PAGE, 3 * PAGE, to)
    assert attributes.is_shared(2 * PAGE, 3 * PAGE) is (to is SHARED)


def test_a_budget_is_asked_before_anybody_is_told(
    block: RamBlock, attributes: RamBlockAttributes
) -> None:
    memory = GuestMemory()
    memory.map(block, 0)
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block))
    mapper = memory.attach(SoftIommu(), max_mappings=2)
    for first in (0, 2):
        attributes.state_change(first * PAGE, PAGE, SHARED)
    listener.take_calls()
    with pytest.raises(MappingLimitError) as caught:
        attributes.state_change(4 * PAGE, PAGE, SHARED)
    assert (caught.value.limit, caught.value.needed) == (2, 3)
    assert listener.calls == []
    assert attributes.shared_bytes == 2 * PAGE
    assert mapper.entries == 2


# -- events ----------------------------------------------------------------------------------------


def test_events(block: RamBlock, attributes: RamBlockAttributes) -> None:
    memory = GuestMemory()
    memory.map(block, 0x10_0000)
    events: list[StateChanged] = []
    memory.observer = events.append
    attributes.state_change(PAGE, PAGE, SHARED)
    memory.convert(0x10_0000, 2 * PAGE, SHARED)
    attributes.state_change(0, 2 * PAGE, PRIVATE)
    assert events == [
        StateChanged("ram", PAGE, PAGE, "private", "shared"),
        StateChanged("ram", 0, 2 * PAGE, "mixture", "shared"),
        StateChanged("ram", 0, 2 * PAGE, "shared", "private"),
    ]


def test_no_event_where_nothing_happened(block: RamBlock, attributes: RamBlockAttributes) -> None:
    memory = GuestMemory()
    memory.map(block, 0)
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block))
    listener.refuse_all("populate")
    events: list[StateChanged] = []
    memory.observer = events.append
    attributes.state_change(0, PAGE, PRIVATE)
    memory.convert(0, PAGE, PRIVATE)
    with pytest.raises(RefusalError):
        attributes.state_change(0, PAGE, SHARED)
    with pytest.raises(UsageError):
        attributes.state_change(0, 1, SHARED)
    assert events == []


# -- any sequence ----------------------------------------------------------------------------------

changes = st.lists(
    st.tuples(
        st.integers(0, COUNT - 1), st.integers(1, COUNT), st.sampled_from(PageState), st.booleans()
    ),
    max_size=20,
)


@given(changes)
def test_any_sequence_against_a_set(sequence: list[tuple[int, int, PageState, bool]]) -> None:
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        attributes = attributes_of(block)
        whole, part = RecordingListener("whole"), RecordingListener("part", sparse=True)
        block.discard_manager.register_listener(whole, section(block))
        block.discard_manager.register_listener(part, section(block, 3, 5))
        expected: set[int] = set()
        for first, length, to, refuse in sequence:
            numbers = set(range(first, min(first + length, COUNT)))
            changing = numbers - expected if to is SHARED else numbers & expected
            part.refuse = lambda _, refuse=refuse: refuse  # type: ignore[misc]  # a lambda's default
            refused = refuse and bool(changing & set(range(3, 8)))
            args = first * PAGE, len(numbers) * PAGE, to
            if refused:
                with pytest.raises(RefusalError):
                    attributes.state_change(*args)
            else:
                attributes.state_change(*args)
                expected = expected | numbers if to is SHARED else expected - numbers
            assert shared(attributes) == runs(expected)
            assert list(attributes.ranges(PRIVATE)) == runs(set(range(COUNT)) - expected)
            assert attributes.shared_bytes == len(expected) * PAGE
            assert whole.held == expected
            assert part.held == expected & set(range(3, 8))
            assert whole.wrong == part.wrong == []
        assert not block.guard.poisoned
        part.refuse_nothing()


@pytest.mark.parametrize("in_place", [False, True])
def test_states_of_a_guest_with_a_vm_change_with_the_vms_attributes_only(in_place: bool) -> None:
    private = SimulatedInPlace("ram", PAGE) if in_place else "stand-in"
    with RamBlock.create("ram", PAGE, private=private) as block:
        attributes = attributes_of(block)
        memory = GuestMemory(RecordingVm())
        section = memory.map(block, 0)
        with pytest.raises(UsageError, match="is in a guest with a VM") as caught:
            attributes.state_change(0, PAGE, SHARED)
        assert caught.value.expected == "GuestMemory.convert"
        assert attributes.shared_bytes == 0
        memory.unmap(section)
        attributes.state_change(0, PAGE, SHARED)
        memory = GuestMemory()
        memory.map(block, 0)
        attributes.state_change(0, PAGE, PRIVATE)
        memory.reset(RecordingVm())
        with pytest.raises(UsageError, match="is in a guest with a VM"):
            attributes.state_change(0, PAGE, SHARED)
