from collections.abc import Callable, Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import (
    PAGE,
    Heard,
    PageSource,
    PageSourceWithRanges,
    RecordingListener,
    RefusalError,
    RunSource,
    attributes_of,
    discard,
    pages,
    populate,
    runs,
    section,
)
from ramblock import (
    GuestMemory,
    MappingPolicy,
    PageState,
    RamBlock,
    RamDiscardManager,
    RamSection,
    VirtioMem,
)
from ramblock.dma import SoftIommu
from ramblock.errors import BusyError, MappingLimitError, PoisonedError, UsageError
from ramblock.units import GIB, TIB

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 16

SourceMaker = Callable[..., PageSource]
both_sources = pytest.mark.parametrize("make", [PageSource, PageSourceWithRanges])


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE) as block:
        yield block


@pytest.fixture
def manager(block: RamBlock) -> RamDiscardManager:
    return block.discard_manager


def listen(
    block: RamBlock,
    first: int = 0,
    count: int = COUNT,
    *,
    name: str = "listener",
    sparse: bool = False,
) -> RecordingListener:
    listener = RecordingListener(name, sparse=sparse)
    block.discard_manager.register_listener(listener, section(block, first, count))
    listener.take_calls()
    return listener


def offsets(parts: Iterator[RamSection]) -> list[tuple[int, int]]:
    return [(part.offset // PAGE, part.size // PAGE) for part in parts]


# -- without sources -------------------------------------------------------------------------------


def test_without_sources_everything_is_populated(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    assert manager.sources == ()
    assert manager.min_granularity == PAGE
    assert manager.is_populated(section(block))
    assert offsets(manager.populated(section(block, 3, 5))) == [(3, 5)]
    assert offsets(manager.discarded(section(block, 3, 5))) == []
    listener = RecordingListener()
    manager.register_listener(listener, section(block))
    assert listener.calls == [populate(0, COUNT)]


# -- asking ----------------------------------------------------------------------------------------


@both_sources
def test_populated_and_discarded_are_maximal_ascending_and_clipped(
    block: RamBlock, manager: RamDiscardManager, make: SourceMaker
) -> None:
    manager.add_source(make({1, 2, 3, 6, 9, 10}))
    assert offsets(manager.populated(section(block))) == [(1, 3), (6, 1), (9, 2)]
    assert offsets(manager.discarded(section(block))) == [(0, 1), (4, 2), (7, 2), (11, 5)]
    assert offsets(manager.populated(section(block, 2, 5))) == [(2, 2), (6, 1)]
    assert offsets(manager.discarded(section(block, 2, 5))) == [(4, 2)]
    assert manager.is_populated(section(block, 1, 3))
    assert not manager.is_populated(section(block, 1, 4))


def test_what_is_found_has_its_guest_address(block: RamBlock, manager: RamDiscardManager) -> None:
    manager.add_source(PageSource({5}))
    asked = RamSection(block, 4 * PAGE, 4 * PAGE, 0x10_0000, readonly=True)
    found = [RamSection(block, 5 * PAGE, PAGE, 0x10_1000, readonly=True)]
    assert list(manager.populated(asked)) == found
    assert [part.gpa for part in manager.discarded(asked)] == [0x10_0000, 0x10_2000]


@pytest.mark.parametrize("makers", list(product([PageSource, PageSourceWithRanges], repeat=3)))
def test_populated_means_in_all_sources(
    block: RamBlock, manager: RamDiscardManager, makers: tuple[SourceMaker, ...]
) -> None:
    sets = [{1, 2, 3, 4, 8, 9}, {2, 3, 4, 5, 9}, {0, 1, 2, 4, 9, 15}]
    for make, numbers in zip(makers, sets, strict=True):
        manager.add_source(make(numbers))
    assert offsets(manager.populated(section(block))) == [(2, 1), (4, 1), (9, 1)]
    assert not manager.is_populated(section(block, 3, 1))
    assert manager.is_populated(section(block, 4, 1))


def test_runs_of_different_sources_are_joined(block: RamBlock, manager: RamDiscardManager) -> None:
    class InPieces(PageSource):
        def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
            for number in sorted(self.populated & pages(offset, size)):
                yield number * PAGE, PAGE  # touching, not joined

    manager.add_source(InPieces({2, 3, 4}))
    assert offsets(manager.populated(section(block))) == [(2, 3)]
    listener = RecordingListener()
    manager.register_listener(listener, section(block))
    assert listener.calls == [populate(2, 3)]


def test_the_state_is_asked_live(block: RamBlock, manager: RamDiscardManager) -> None:
    source = PageSource()
    manager.add_source(source)
    assert not manager.is_populated(section(block, 3, 1))
    source.populated.add(3)  # no notify: nobody was told, but whoever asks sees it
    assert manager.is_populated(section(block, 3, 1))
    assert offsets(manager.populated(section(block))) == [(3, 1)]


def test_min_granularity_is_the_smallest_of_the_sources(manager: RamDiscardManager) -> None:
    big, small = PageSource(granularity=8 * PAGE), PageSource(granularity=2 * PAGE)
    manager.add_source(big)
    assert manager.min_granularity == 8 * PAGE
    manager.add_source(small)
    assert manager.min_granularity == 2 * PAGE
    manager.remove_source(small)
    assert manager.min_granularity == 8 * PAGE


@pytest.mark.parametrize("question", ["is_populated", "populated", "discarded"])
def test_a_section_of_another_block(
    block: RamBlock, manager: RamDiscardManager, question: str
) -> None:
    with (
        RamBlock.create("ram", COUNT * PAGE) as other,
        pytest.raises(UsageError, match="does not belong to block 'ram'"),
    ):
        getattr(manager, question)(section(other))


# -- sources that come and go ----------------------------------------------------------------------


@both_sources
def test_a_source_that_comes_discards_what_it_does_not_hold(
    block: RamBlock, manager: RamDiscardManager, make: SourceMaker
) -> None:
    listener = listen(block)
    source = make({0, 1, 5})
    manager.add_source(source)
    assert list(manager.sources) == [source]
    assert listener.take_calls() == [discard(2, 3), discard(6, 10)]
    other = make({0, 2, 5})
    manager.add_source(other)
    assert list(manager.sources) == [source, other]
    assert listener.take_calls() == [discard(1, 1)]
    assert (listener.held, listener.wrong) == ({0, 5}, [])


@both_sources
def test_a_source_that_goes_populates_what_only_it_held_back(
    block: RamBlock, manager: RamDiscardManager, make: SourceMaker
) -> None:
    one, two = make({0, 1, 5}), make({0, 2, 5})
    manager.add_source(one)
    manager.add_source(two)
    listener = listen(block)
    manager.remove_source(one)
    assert manager.sources == (two,)
    assert listener.take_calls() == [populate(2, 1)]
    manager.remove_source(two)
    assert listener.take_calls() == [populate(1, 1), populate(3, 2), populate(6, 10)]
    assert (listener.held, listener.wrong) == (set(range(COUNT)), [])


def test_a_source_that_is_there_already(manager: RamDiscardManager) -> None:
    source = PageSource()
    manager.add_source(source)
    with pytest.raises(BusyError, match="already"):
        manager.add_source(source)
    assert manager.sources == (source,)


def test_the_same_source_means_the_same_object(manager: RamDiscardManager) -> None:
    class Equal(PageSource):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    one, two = Equal(), Equal()
    manager.add_source(one)
    manager.add_source(two)
    manager.remove_source(one)
    assert len(manager.sources) == 1
    assert manager.sources[0] is two


def test_a_source_that_is_not_there(manager: RamDiscardManager) -> None:
    manager.add_source(PageSource())
    stranger = PageSource()
    for verb, where in (
        ("remove_source", ()),
        ("notify_populate", (0, PAGE)),
        ("notify_discard", (0, PAGE)),
    ):
        with pytest.raises(UsageError, match="is not a source of block 'ram'"):
            getattr(manager, verb)(stranger, *where)


@pytest.mark.parametrize("granularity", [0, -1, 3, 4095, None, True, 4096.0])
def test_a_granularity_that_is_no_power_of_two(
    manager: RamDiscardManager, granularity: int
) -> None:
    with pytest.raises(UsageError, match="is not a power of two"):
        manager.add_source(PageSource(granularity=granularity))
    assert manager.sources == ()


def test_a_source_of_another_block(block: RamBlock, manager: RamDiscardManager) -> None:
    with RamBlock.create("other", 4 * PAGE, private="stand-in") as other:
        plugged = VirtioMem(other, PAGE)
        for source in (plugged, attributes_of(other)):
            with pytest.raises(UsageError, match="belongs to another block than block 'ram'"):
                manager.add_source(source)
    assert manager.sources == ()


@pytest.mark.parametrize("answer", [(0, PAGE), (2 * PAGE, PAGE), (PAGE, 4 * PAGE)])
def test_a_source_that_cuts_its_granules(
    block: RamBlock,
    manager: RamDiscardManager,
    answer: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A target whose pages are as large would map all of a granule.
    whole = RamSection(block, 0, block.size, 0)
    source = PageSourceWithRanges(granularity=4 * PAGE)
    manager.add_source(source)
    monkeypatch.setattr(source, "ranges", lambda _, __: iter([answer]))
    with pytest.raises(UsageError, match="cuts a granule of 0x4000 bytes"):
        list(manager.populated(whole))


def test_page_attributes_cannot_be_removed() -> None:
    with RamBlock.create("ram", PAGE, private="stand-in") as block:
        attributes = attributes_of(block)
        with pytest.raises(UsageError, match="page attributes of block 'ram' cannot be removed"):
            block.discard_manager.remove_source(attributes)
        assert block.discard_manager.sources == (attributes,)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("verb", ["add", "remove"])
def test_a_source_comes_or_goes_all_or_nothing(
    block: RamBlock, manager: RamDiscardManager, verb: str, at: int
) -> None:
    source = PageSource({0, 1, 5})
    before: tuple[PageSource, ...] = ()
    if verb == "remove":
        manager.add_source(source)
        before = (source,)
    listeners = [listen(block, name=name) for name in ("one", "two")]
    held = listeners[0].held.copy()
    calls = 0

    def refuse(_: Heard) -> bool:
        nonlocal calls
        calls += 1
        return calls == at + 1

    for listener in listeners:
        listener.refuse = refuse
    with pytest.raises(RefusalError):
        manager.add_source(source) if verb == "add" else manager.remove_source(source)
    assert calls > at + 1 or at == 0  # what was told before is taken back
    assert manager.sources == before
    for listener in listeners:
        assert (listener.held, listener.wrong) == (held, [])
    assert not block.guard.poisoned


def test_a_source_that_hears_of_coming_and_going(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    heard: list[str] = []

    class Hearing(PageSource):
        def on_adding(self) -> None:
            heard.append("adding")

        def on_removed(self) -> None:
            heard.append("removed")

    source = Hearing()
    manager.add_source(source)
    assert heard == ["adding"]
    manager.remove_source(source)
    assert heard == ["adding", "removed"]
    listen(block).refuse_all("discard")
    with pytest.raises(RefusalError):
        manager.add_source(source)
    assert heard == ["adding", "removed"] * 2


def test_a_source_that_cannot_answer_is_not_added(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    class Broken(PageSource):
        def is_populated(self, offset: int, size: int) -> bool:
            if offset >= 4 * PAGE:
                raise ZeroDivisionError
            return False

    listener = listen(block)
    with pytest.raises(ZeroDivisionError):
        manager.add_source(Broken())
    assert manager.sources == ()
    assert listener.held == set(range(COUNT))


# -- sources that change ---------------------------------------------------------------------------


@both_sources
def test_a_change_is_told_where_the_others_agree(
    block: RamBlock, manager: RamDiscardManager, make: SourceMaker
) -> None:
    source, other = make(), make({1, 2, 5, 6, 7})
    manager.add_source(source)
    manager.add_source(other)
    listener = listen(block)
    source.populated = set(range(2, 8))
    manager.notify_populate(source, 2 * PAGE, 6 * PAGE)
    assert listener.take_calls() == [populate(2, 1), populate(5, 3)]
    source.populated = {2, 7}
    manager.notify_discard(source, 3 * PAGE, 4 * PAGE)
    assert listener.take_calls() == [discard(5, 2)]
    assert (listener.held, listener.wrong) == ({2, 7}, [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_calling_source_is_taken_at_its_word(
    block: RamBlock, manager: RamDiscardManager, when: str
) -> None:
    # Whether its own answer has changed already or will only then makes no difference.
    source = PageSource()
    manager.add_source(source)
    listener = listen(block)
    if when == "before":
        source.populated = {3}
    manager.notify_populate(source, 3 * PAGE, PAGE)
    source.populated = {3}
    assert listener.take_calls() == [populate(3, 1)]
    if when == "before":
        source.populated = set()
    manager.notify_discard(source, 3 * PAGE, PAGE)
    assert listener.take_calls() == [discard(3, 1)]


def test_what_the_others_withhold_is_told_to_nobody(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(), PageSource()
    manager.add_source(source)
    manager.add_source(other)
    listener = listen(block)
    manager.notify_populate(source, 0, block.size)
    manager.notify_discard(source, 0, block.size)
    assert listener.calls == []


def test_a_listener_hears_only_of_its_own_section(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source = PageSource()
    manager.add_source(source)
    left, right, whole = listen(block, 0, 8), listen(block, 8, 8), listen(block)
    source.populated = set(range(6, 10))
    manager.notify_populate(source, 6 * PAGE, 4 * PAGE)
    assert left.take_calls() == [populate(6, 2)]
    assert right.take_calls() == [populate(8, 2)]
    assert whole.take_calls() == [populate(6, 4)]
    source.populated = {6, 7, 8}
    manager.notify_discard(source, 9 * PAGE, PAGE)
    assert left.take_calls() == []
    assert right.take_calls() == [discard(9, 1)]
    assert whole.take_calls() == [discard(9, 1)]


def test_listeners_are_told_guest_addresses(block: RamBlock, manager: RamDiscardManager) -> None:
    source = PageSource()
    manager.add_source(source)
    listener = RecordingListener()
    where = RamSection(block, 4 * PAGE, 8 * PAGE, 0x10_0000, readonly=True)
    manager.register_listener(listener, where)
    manager.notify_populate(source, 6 * PAGE, PAGE)
    assert listener.sections == [RamSection(block, 6 * PAGE, PAGE, 0x10_2000, readonly=True)]


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 0),
        (0, -2 * PAGE),
        (-2 * PAGE, 2 * PAGE),
        (0, (COUNT + 2) * PAGE),
        (COUNT * PAGE, 2 * PAGE),
        (PAGE, 2 * PAGE),
        (0, PAGE),
        (0, 1 << 64),
        (1 << 64, 2 * PAGE),
        (None, 2 * PAGE),
        (0, True),
    ],
)
@pytest.mark.parametrize("verb", ["notify_populate", "notify_discard"])
def test_a_change_of_what_is_no_range_of_granules(
    block: RamBlock, manager: RamDiscardManager, verb: str, offset: int, size: int
) -> None:
    source = PageSource(range(COUNT), granularity=2 * PAGE)
    manager.add_source(source)
    listener = listen(block)
    with pytest.raises(UsageError):
        getattr(manager, verb)(source, offset, size)
    assert listener.calls == []


def three_listeners(block: RamBlock) -> tuple[list[RecordingListener], list[tuple[str, Heard]]]:
    listeners = [listen(block, name=name) for name in ("one", "two", "three")]
    journal: list[tuple[str, Heard]] = []
    for listener in listeners:
        listener.journal = journal
    return listeners, journal


def test_if_one_refuses_a_populate_those_told_before_hear_the_discard(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(), PageSource({1, 2, 5, 9})
    manager.add_source(source)
    manager.add_source(other)
    listeners, journal = three_listeners(block)
    listeners[1].refuse = lambda call: call == populate(5, 1)
    source.populated = set(range(COUNT))
    with pytest.raises(RefusalError, match="two refuses to populate"):
        manager.notify_populate(source, 0, block.size)
    told = [populate(1, 2), populate(5, 1), populate(9, 1)]
    assert journal[:4] == [*(("one", call) for call in told), ("two", told[0])]
    taken_back = journal[4:]
    assert set(taken_back) == {
        ("two", discard(1, 2)),
        ("one", discard(1, 2)),
        ("one", discard(5, 1)),
        ("one", discard(9, 1)),
    }
    assert len(taken_back) == 4
    for listener in listeners:
        assert (listener.held, listener.wrong) == (set(), [])
    assert listeners[2].calls == []
    assert not block.guard.poisoned


def test_if_one_refuses_a_discard_those_told_before_are_populated_again(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(range(COUNT)), PageSource({1, 2, 5, 9})
    manager.add_source(source)
    manager.add_source(other)
    listeners, journal = three_listeners(block)
    listeners[1].refuse = lambda call: call == discard(5, 1)
    source.populated = set()
    with pytest.raises(RefusalError, match="two refuses to discard"):
        manager.notify_discard(source, 0, block.size)
    assert len(journal) == 8
    for listener in listeners:
        assert (listener.held, listener.wrong) == ({1, 2, 5, 9}, [])
    assert listeners[2].calls == []
    assert not block.guard.poisoned


@pytest.mark.parametrize("verb", ["populate", "discard"])
def test_if_putting_back_fails_the_block_is_poisoned(
    block: RamBlock, manager: RamDiscardManager, verb: str
) -> None:
    source = PageSource(range(COUNT) if verb == "discard" else ())
    manager.add_source(source)
    listeners, _ = three_listeners(block)
    listeners[2].refuse = lambda _: True
    listeners[1].refuse = lambda call: call.verb != verb  # does as told, but not back
    with pytest.raises(PoisonedError) as caught:
        getattr(manager, f"notify_{verb}")(source, 2 * PAGE, 3 * PAGE)
    assert caught.value.rolled_back is False
    assert block.guard.poisoned
    # The listener between is the one that is in doubt; the first was put back all the same.
    assert [(doubt.gpa, doubt.size, doubt.target) for doubt in block.guard.in_doubt()] == [
        (2 * PAGE, 3 * PAGE, listeners[1])
    ]
    assert listeners[0].held == (set(range(COUNT)) if verb == "discard" else set())
    with pytest.raises(PoisonedError):
        manager.notify_populate(source, 0, PAGE)
    for listener in listeners:
        listener.refuse_nothing()


def test_the_latest_that_was_told_is_the_first_to_be_put_back(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source = PageSource()
    manager.add_source(source)
    listeners, journal = three_listeners(block)
    listeners[2].refuse = lambda _: True
    source.populated = set(range(COUNT))
    with pytest.raises(RefusalError):
        manager.notify_populate(source, 0, block.size)
    told = populate(0, COUNT)
    back = discard(0, COUNT)
    assert journal == [("one", told), ("two", told), ("two", back), ("one", back)]


def test_all_of_a_listener_is_put_back_whatever_it_raises(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(), PageSource({1, 2, 5, 9})
    manager.add_source(source)
    manager.add_source(other)
    listeners, journal = three_listeners(block)

    def interrupt(call: Heard) -> None:
        if call == discard(1, 2):
            raise KeyboardInterrupt

    listeners[0].then = interrupt
    listeners[1].refuse_all("populate")
    source.populated = set(range(COUNT))
    with pytest.raises(PoisonedError):
        manager.notify_populate(source, 0, block.size)
    assert journal[3:] == [("one", call) for call in (discard(1, 2), discard(5, 1), discard(9, 1))]
    # Only where it raised it is not known what it holds.
    assert [tuple(doubt) for doubt in block.guard.in_doubt()] == [(PAGE, 2 * PAGE, listeners[0])]


# -- listeners that come and go --------------------------------------------------------------------


def test_a_new_listener_hears_what_is_populated(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    manager.add_source(PageSourceWithRanges({0, 1, 2, 6, 7, 12}))
    listener = RecordingListener()
    manager.register_listener(listener, section(block, 1, 6))
    assert listener.calls == [populate(1, 2), populate(6, 1)]


@pytest.mark.parametrize("at", range(3))
def test_a_replay_that_is_refused_is_undone(
    block: RamBlock, manager: RamDiscardManager, at: int
) -> None:
    runs = [populate(0, 1), populate(2, 1), populate(4, 1)]
    source = PageSource({0, 2, 4})
    manager.add_source(source)
    bystander = listen(block)
    listener = RecordingListener()
    listener.refuse = lambda call: call == runs[at]
    with pytest.raises(RefusalError):
        manager.register_listener(listener, section(block))
    assert listener.calls[:at] == runs[:at]
    assert len(listener.calls) == 2 * at
    assert (listener.held, listener.wrong) == (set(), [])
    # It is not registered.
    with pytest.raises(UsageError, match="is not registered"):
        manager.unregister_listener(listener)
    source.populated.add(9)
    manager.notify_populate(source, 9 * PAGE, PAGE)
    assert listener.held == set()
    assert bystander.held == {0, 2, 4, 9}
    listener.refuse_nothing()
    manager.register_listener(listener, section(block))
    assert listener.held == {0, 2, 4, 9}


def test_one_registration_per_listener(block: RamBlock, manager: RamDiscardManager) -> None:
    listener = listen(block, 0, 4)
    with pytest.raises(UsageError, match="one registration per listener"):
        manager.register_listener(listener, section(block, 8, 4))
    assert listener.calls == []
    manager.unregister_listener(listener)
    manager.register_listener(listener, section(block, 8, 4))
    assert listener.held == {8, 9, 10, 11}


def test_an_unregistered_listener_hears_a_discard_of_what_it_holds(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    manager.add_source(PageSource({0, 1, 5}))
    listener = listen(block, 1, 8)
    manager.unregister_listener(listener)
    assert listener.take_calls() == [discard(1, 1), discard(5, 1)]
    assert listener.wrong == []
    with pytest.raises(UsageError, match="is not registered with block 'ram'"):
        manager.unregister_listener(listener)


def test_a_listener_that_holds_nothing_leaves_quietly(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    manager.add_source(PageSource())
    listener = listen(block)
    manager.unregister_listener(listener)
    assert listener.calls == []


@pytest.mark.parametrize("at", range(3))
def test_a_listener_that_cannot_let_go_stays_and_holds_what_it_held(
    block: RamBlock, manager: RamDiscardManager, at: int
) -> None:
    runs = [discard(0, 1), discard(2, 1), discard(4, 1)]
    source = PageSource({0, 2, 4})
    manager.add_source(source)
    listener = listen(block)
    listener.refuse = lambda call: call == runs[at]
    with pytest.raises(RefusalError):
        manager.unregister_listener(listener)
    assert (listener.held, listener.wrong) == ({0, 2, 4}, [])
    listener.refuse_nothing()
    source.populated.add(6)
    manager.notify_populate(source, 6 * PAGE, PAGE)
    assert listener.held == {0, 2, 4, 6}


@pytest.mark.parametrize(
    ("offset", "size"), [(1, PAGE), (0, PAGE + 1), (0, 1), (PAGE // 2, PAGE // 2)]
)
def test_a_listener_registers_for_whole_pages(
    block: RamBlock, manager: RamDiscardManager, offset: int, size: int
) -> None:
    listener = RecordingListener()
    with pytest.raises(UsageError, match="not aligned"):
        manager.register_listener(listener, RamSection(block, offset, size))
    assert listener.calls == []


def test_a_listener_for_another_blocks_section(manager: RamDiscardManager) -> None:
    with (
        RamBlock.create("other", PAGE) as other,
        pytest.raises(UsageError, match="does not belong"),
    ):
        manager.register_listener(RecordingListener(), section(other))


def test_ten_runs_in_a_terabyte_are_ten_calls() -> None:
    with RamBlock.create("huge", TIB) as block:
        populated = [(number * 100 * GIB + 3 * PAGE, 5 * PAGE) for number in range(10)]
        block.discard_manager.add_source(RunSource(populated))
        listener = RecordingListener()
        block.discard_manager.register_listener(listener, section(block))
        told = [(part.offset, part.size) for part in listener.sections]
        assert told == populated
        block.discard_manager.unregister_listener(listener)
        assert len(listener.calls) == 20


def test_and_so_are_ten_runs_of_page_attributes() -> None:
    with RamBlock.create("huge", TIB, private="stand-in") as block:
        populated = [(number * 100 * GIB + 3 * PAGE, 5 * PAGE) for number in range(10)]
        for offset, size in populated:
            attributes_of(block).state_change(offset, size, SHARED)
        listener = RecordingListener()
        block.discard_manager.register_listener(listener, section(block))
        assert [(part.offset, part.size) for part in listener.sections] == populated


# -- sparse listeners ------------------------------------------------------------------------------


def test_one_sparse_discard_may_cover_what_the_listener_does_not_hold(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(range(COUNT)), PageSource(range(0, COUNT, 2))
    manager.add_source(source)
    manager.add_source(other)
    exact, sparse = listen(block, name="exact"), listen(block, name="sparse", sparse=True)
    # Populating is always exact.
    assert sparse.held == set(range(0, COUNT, 2))
    source.populated = set(range(8, COUNT))
    manager.notify_discard(source, 0, 8 * PAGE)
    assert exact.take_calls() == [discard(number, 1) for number in range(0, 8, 2)]
    (call,) = sparse.take_calls()
    assert call.verb == "discard"
    assert call.first == 0
    assert 7 <= call.length <= 8  # from what it holds first, at most to the end of the change
    assert sparse.held == exact.held == set(range(8, COUNT, 2))
    manager.unregister_listener(sparse)
    assert len(sparse.take_calls()) == 1
    assert (sparse.held, sparse.wrong) == (set(), [])


def test_a_sparse_discard_covers_nothing_that_stays_populated(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    # What a new source discards lies between what it leaves alone: there is no one range for it.
    sparse = listen(block, sparse=True)
    manager.add_source(PageSource({2, 5}))
    assert sparse.held == {2, 5}
    assert sparse.take_calls() == [discard(0, 2), discard(3, 2), discard(6, 10)]


def test_a_sparse_listener_that_holds_nothing_there_hears_nothing(
    block: RamBlock, manager: RamDiscardManager
) -> None:
    source, other = PageSource(range(COUNT)), PageSource({12})
    manager.add_source(source)
    manager.add_source(other)
    sparse = listen(block, sparse=True)
    manager.notify_discard(source, 0, 8 * PAGE)
    assert sparse.calls == []


# -- budgets ---------------------------------------------------------------------------------------


def test_a_new_source_that_would_cut_too_often_is_refused(block: RamBlock) -> None:
    memory = GuestMemory()
    memory.map(block, 0)
    iommu = SoftIommu()
    mapper = memory.attach(iommu, max_mappings=8)
    assert mapper.entries == 1
    with pytest.raises(MappingLimitError):
        block.discard_manager.add_source(PageSource(range(0, COUNT, 2)))
    assert block.discard_manager.sources == ()
    assert len(iommu.mappings()) == 1
    block.discard_manager.add_source(PageSource({0, 1, 8, 9}))
    assert [(entry.iova, entry.size) for entry in iommu.mappings()] == runs({0, 1, 8, 9})


def test_a_source_finer_than_a_targets_pages_is_refused(block: RamBlock) -> None:
    memory = GuestMemory()
    memory.map(block, 0)
    memory.attach(SoftIommu(page_size=4 * PAGE), MappingPolicy.RUN)
    with pytest.raises(UsageError, match="less than a page"):
        block.discard_manager.add_source(PageSource(range(COUNT), granularity=2 * PAGE))
    assert block.discard_manager.sources == ()
    block.discard_manager.add_source(PageSource(range(COUNT), granularity=4 * PAGE))


# -- any sequence ----------------------------------------------------------------------------------

numbers = st.integers(0, COUNT - 1)
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "populate", "discard", "listen", "leave"]),
        st.integers(0, 2),
        numbers,
        st.integers(1, COUNT),
        st.booleans(),
    ),
    max_size=30,
)


@given(steps)
def test_any_sequence_against_sets(sequence: list[tuple[str, int, int, int, bool]]) -> None:
    """
    Three sources and three listeners.

    What each listener holds is what all sources that are there call populated.
    """
    with RamBlock.create("ram", COUNT * PAGE) as block:
        manager = block.discard_manager
        sources: list[PageSource] = [
            PageSource(range(4, 12)),
            PageSourceWithRanges(range(COUNT)),
            PageSource(range(8), granularity=2 * PAGE),
        ]
        sections = [section(block), section(block, 3, 6), section(block, 8, 8)]
        listeners = [RecordingListener(str(at), sparse=at == 1) for at in range(3)]
        there: list[PageSource] = []
        listening: list[int] = []
        for what, which, first, length, refuse in sequence:
            source, listener = sources[which], listeners[which]
            unit = source.granularity // PAGE
            low = first // unit * unit
            high = min(-(-(first + length) // unit) * unit, COUNT)
            changed = set(range(low, high))
            where = low * PAGE, (high - low) * PAGE
            listener.refuse = lambda _, refuse=refuse: refuse  # type: ignore[misc]  # a lambda's default
            try:
                if what == "add":
                    manager.add_source(source)
                    there.append(source)
                elif what == "remove":
                    manager.remove_source(source)
                    there.remove(source)
                elif what == "listen":
                    manager.register_listener(listener, sections[which])
                    listening.append(which)
                elif what == "leave":
                    manager.unregister_listener(listener)
                    listening.remove(which)
                elif source in there:
                    # A source says what it changed, and only that.
                    changed = (
                        changed - source.populated
                        if what == "populate"
                        else changed & source.populated
                    )
                    if runs(changed) != [where]:
                        continue
                    before = source.populated.copy()
                    source.populated ^= changed
                    try:
                        if what == "populate":
                            manager.notify_populate(source, *where)
                        else:
                            manager.notify_discard(source, *where)
                    except RefusalError:
                        source.populated = before
                        raise
            except (RefusalError, UsageError, BusyError):
                pass
            finally:
                listener.refuse_nothing()
            joint = set(range(COUNT)).intersection(*(source.populated for source in there))
            assert list(manager.sources) == there
            assert offsets(manager.populated(sections[0])) == [
                (offset // PAGE, size // PAGE) for offset, size in runs(joint)
            ]
            for at, other in enumerate(listeners):
                inside = pages(sections[at].offset, sections[at].size)
                assert other.held == (joint & inside if at in listening else set())
                assert other.wrong == []
        assert not block.guard.poisoned
