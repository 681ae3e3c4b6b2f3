"""
Every call at an edge of a small guest fails once, in every way, and then a second one while the
first is put right.

What has to hold is in injection.py. Here are the operations and the guests they are done to.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import pytest

from injection import (
    BASE,
    BLOCKS,
    CUT,
    CUT_PAGE,
    EXACT,
    FREES,
    NO_CUT,
    PAGE,
    PRIVATE,
    SHARED,
    Expected,
    FakeShared,
    Guest,
    Kind,
    Layout,
    Scenario,
    Setup,
    TargetKind,
    Way,
    assert_like,
    counts,
    explore,
    model_of,
    place_in_model,
    refusal_for_lack_of_room,
    run_case,
)
from ramblock import ConversionResult, PageState, RamBlock, RamSection, VirtioMem
from ramblock.errors import MappingLimitError
from ramblock.testing import pages_of


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """
    Each poisoning is logged as critical, and thousands of small guests keep the garbage collector
    busy.
    """
    logging.disable()
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(10_000, 5, 5)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def number_of_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    counts.clear()
    yield
    told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"failure injection: {counts.total()} cases ({told})")


# -- conversions -----------------------------------------------------------------------------------

ALL_SHARED = ((0, 8, SHARED),)

CONVERSIONS: dict[str, tuple[Layout, int, int, PageState]] = {
    "share one page": ((), 2, 3, SHARED),
    "share across blocks": ((), 3, 5, SHARED),
    "share everything": ((), 0, 8, SHARED),
    "share a mixture": (((1, 2, SHARED), (4, 6, SHARED)), 0, 8, SHARED),
    "share what is partly shared": (((0, 2, SHARED), (6, 8, SHARED)), 1, 7, SHARED),
    "share what is shared in one block": (((4, 8, SHARED),), 2, 6, SHARED),
    "make one page private": (ALL_SHARED, 2, 3, PRIVATE),
    "make private across blocks": (ALL_SHARED, 3, 5, PRIVATE),
    "make everything private": (ALL_SHARED, 0, 8, PRIVATE),
    "make a mixture private": (
        ((1, 2, SHARED), (2, 4, SHARED), (5, 7, SHARED)),
        0,
        8,
        PRIVATE,
    ),
    "make private across mappings": (((0, 2, SHARED), (2, 4, SHARED)), 1, 3, PRIVATE),
    "make private what is private in one block": (((0, 4, SHARED),), 2, 6, PRIVATE),
}

PAIRS_OF_TARGETS = {
    "cut": (CUT, CUT),
    "no-cut": (NO_CUT, NO_CUT),
    "exact": (EXACT, EXACT),
    "cut, exact": (CUT, EXACT),
    "cut by page, no-cut": (CUT_PAGE, NO_CUT),
}


BY_PAGE = {name: PAIRS_OF_TARGETS[name] for name in ("no-cut", "exact")}


def conversion(
    layout: Layout,
    first: int,
    last: int,
    to: PageState,
    *,
    setup: Setup | None = None,
    targets: Sequence[TargetKind] = (CUT, CUT),
    depth: int = 2,
    few: bool = False,
) -> Scenario:
    gpa, size = BASE + first * PAGE, (last - first) * PAGE
    return Scenario(
        setup=Setup(targets=targets, layout=layout) if setup is None else setup,
        act=lambda guest: guest.memory.convert(gpa, size, to),
        change=lambda expected: expected.model.convert(gpa, size, to),
        conversion=(gpa, size, to),
        depth=depth,
        few=few,
    )


@pytest.mark.parametrize("targets", PAIRS_OF_TARGETS.values(), ids=PAIRS_OF_TARGETS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_with_one_failure(name: str, targets: Sequence[TargetKind]) -> None:
    explore(conversion(*CONVERSIONS[name], targets=targets, depth=1))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_with_two_failures(name: str) -> None:
    # Where there are many calls, only one way of each sort for the second.
    _, first, last, _ = CONVERSIONS[name]
    explore(conversion(*CONVERSIONS[name], few=last - first > 2))


@pytest.mark.parametrize("targets", BY_PAGE.values(), ids=BY_PAGE)
@pytest.mark.parametrize(
    "name",
    [
        "share one page",
        "share across blocks",
        "make one page private",
        "make private across blocks",
        "make private across mappings",
    ],
)
def test_conversion_by_page_with_two_failures(name: str, targets: Sequence[TargetKind]) -> None:
    explore(conversion(*CONVERSIONS[name], targets=targets, few=True))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_with_a_listener_of_somebody_elses(name: str) -> None:
    layout, first, last, _ = CONVERSIONS[name]
    setup = Setup(targets=(CUT,), layout=layout, listener=True)
    explore(conversion(*CONVERSIONS[name], setup=setup, few=True, depth=1 + (last - first < 8)))


@pytest.mark.parametrize("source", [None, {PAGE, 2 * PAGE, 3 * PAGE}])
@pytest.mark.parametrize("name", ["share one page", "make one page private"])
def test_conversion_with_three_failures(name: str, source: set[int] | None) -> None:
    setup = Setup(targets=(CUT,), layout=CONVERSIONS[name][0], source=source, listener=True)
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=3, few=True))


PAGES = [page * PAGE for page in range(5)]


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_with_a_source_of_somebody_elses(name: str, has_ranges: bool) -> None:
    setup = Setup(
        targets=(CUT, EXACT),
        layout=CONVERSIONS[name][0],
        source={PAGES[1], PAGES[2], PAGES[4]},
        source_has_ranges=has_ranges,
    )
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=1))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_with_virtio_mem(name: str) -> None:
    setup = Setup(
        targets=(CUT, EXACT),
        layout=CONVERSIONS[name][0],
        virtio_mem={PAGES[1], PAGES[2], PAGES[4]},
    )
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=1))


# -- in place --------------------------------------------------------------------------------------

IN_PLACE = {"one in place, one split": ("a",), "both in place": ("a", "b")}
each_in_place = pytest.mark.parametrize("in_place", IN_PLACE.values(), ids=IN_PLACE)


@each_in_place
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_in_place_with_one_failure(name: str, in_place: Sequence[str]) -> None:
    setup = Setup(targets=(CUT, EXACT), layout=CONVERSIONS[name][0], in_place=in_place)
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=1))


@each_in_place
@pytest.mark.parametrize(
    "name",
    [
        "share one page",
        "share across blocks",
        "share what is partly shared",
        "make one page private",
        "make private across blocks",
        "make a mixture private",
    ],
)
def test_conversion_in_place_with_two_failures(name: str, in_place: Sequence[str]) -> None:
    setup = Setup(targets=(CUT,), layout=CONVERSIONS[name][0], in_place=in_place)
    explore(conversion(*CONVERSIONS[name], setup=setup))


@pytest.mark.parametrize("name", ["share one page", "make one page private"])
def test_conversion_in_place_with_four_failures(name: str) -> None:
    # Enough for every try to meet another failure.
    setup = Setup(targets=(CUT,), layout=CONVERSIONS[name][0], in_place=("a",))
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=4, few=True))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_in_place_with_virtio_mem(name: str) -> None:
    setup = Setup(
        targets=(CUT,),
        layout=CONVERSIONS[name][0],
        virtio_mem={PAGES[1], PAGES[2], PAGES[4]},
        in_place=("a",),
    )
    explore(conversion(*CONVERSIONS[name], setup=setup, depth=1))


# -- the other operations --------------------------------------------------------------------------


def explore_on(
    act: Callable[[Guest], object],
    change: Callable[[Expected], None],
    setup: Setup,
    *,
    depth: int = 2,
    frees: bool = True,
) -> None:
    explore(Scenario(setup=setup, act=act, change=change, depth=depth, few=True, frees=frees))


GUESTS: dict[str, tuple[Sequence[TargetKind], Layout]] = {
    "all shared, cut": ((CUT, CUT), ALL_SHARED),
    "mixture, cut": ((CUT, CUT), ((0, 2, SHARED), (2, 3, SHARED), (5, 8, SHARED))),
    "mixture, exact": ((EXACT, CUT), ((0, 1, SHARED), (2, 4, SHARED))),
}
each_guest = pytest.mark.parametrize(("targets", "layout"), GUESTS.values(), ids=GUESTS)

HALF = {PAGES[1], PAGES[3]}


@each_guest
@pytest.mark.parametrize("has_ranges", [True, False])
def test_add_source(targets: Sequence[TargetKind], layout: Layout, has_ranges: bool) -> None:
    def change(expected: Expected) -> None:
        expected.model.blocks["a"].sources["other"] = set(HALF)

    explore_on(
        lambda guest: guest.blocks["a"].discard_manager.add_source(guest.source),
        change,
        Setup(
            targets=targets,
            layout=layout,
            new_source=HALF,
            source_has_ranges=has_ranges,
            listener=True,
        ),
        depth=1,
        frees=False,
    )


@each_guest
def test_add_source_with_two_failures(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        expected.model.blocks["a"].sources["other"] = set(HALF)

    explore_on(
        lambda guest: guest.blocks["a"].discard_manager.add_source(guest.source),
        change,
        Setup(targets=targets[:1], layout=layout, new_source=HALF),
        frees=False,
    )


@each_guest
def test_remove_source(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        del expected.model.blocks["a"].sources["other"]

    explore_on(
        lambda guest: guest.blocks["a"].discard_manager.remove_source(guest.source),
        change,
        Setup(targets=targets[:1], layout=layout, source=HALF, listener=True),
        frees=False,
    )


@each_guest
@pytest.mark.parametrize("populate", [True, False])
def test_a_source_that_changes(
    targets: Sequence[TargetKind], layout: Layout, populate: bool
) -> None:
    def act(guest: Guest) -> None:
        manager = guest.blocks["a"].discard_manager
        before = set(guest.source.populated)
        notify = manager.notify_populate if populate else manager.notify_discard
        if populate:
            guest.source.populated |= set(PAGES[1:4])
        else:
            guest.source.populated -= set(PAGES[1:4])
        try:
            notify(guest.source, PAGE, 3 * PAGE)
        except BaseException:
            guest.source.populated = before
            raise

    def change(expected: Expected) -> None:
        pages = expected.model.blocks["a"].sources["other"]
        if populate:
            pages |= set(PAGES[1:4])
        else:
            pages -= set(PAGES[1:4])

    explore_on(
        act,
        change,
        Setup(
            targets=targets[:1],
            layout=layout,
            source=set() if populate else set(PAGES),
            listener=True,
        ),
        frees=False,
    )


@each_guest
def test_virtio_mem_comes(targets: Sequence[TargetKind], layout: Layout) -> None:
    explore_on(
        lambda guest: VirtioMem(guest.blocks["a"], PAGE),
        lambda expected: expected.model.add_virtio_mem("a"),
        Setup(targets=targets, layout=layout),
    )


def virtio_mem_of(guest: Guest) -> VirtioMem:
    assert guest.virtio_mem is not None
    return guest.virtio_mem


@each_guest
def test_plug(targets: Sequence[TargetKind], layout: Layout) -> None:
    explore_on(
        lambda guest: virtio_mem_of(guest).plug(PAGE, 3 * PAGE),
        lambda expected: expected.model.plug("a", PAGE, 3 * PAGE),
        Setup(targets=targets, layout=layout, virtio_mem={PAGES[4]}),
    )


@each_guest
def test_plug_with_a_source_of_somebody_elses(
    targets: Sequence[TargetKind], layout: Layout
) -> None:
    explore_on(
        lambda guest: virtio_mem_of(guest).plug(PAGE, 3 * PAGE),
        lambda expected: expected.model.plug("a", PAGE, 3 * PAGE),
        Setup(targets=targets, layout=layout, virtio_mem={PAGES[4]}, source=HALF, listener=True),
    )


@each_guest
def test_unplug(targets: Sequence[TargetKind], layout: Layout) -> None:
    explore_on(
        lambda guest: virtio_mem_of(guest).unplug(2 * PAGE, 2 * PAGE),
        lambda expected: expected.model.unplug("a", 2 * PAGE, 2 * PAGE),
        Setup(targets=targets, layout=layout, virtio_mem=set(PAGES)),
    )


@each_guest
def test_unplug_all(targets: Sequence[TargetKind], layout: Layout) -> None:
    explore_on(
        lambda guest: virtio_mem_of(guest).unplug_all(),
        lambda expected: expected.model.unplug("a", 0, 5 * PAGE),
        Setup(targets=targets, layout=layout, virtio_mem={PAGES[1], PAGES[2], PAGES[4]}),
    )


@each_guest
def test_attach(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        expected.attached[1] = True

    explore_on(
        lambda guest: guest.attach(1),
        change,
        Setup(targets=(targets[1], targets[0]), attached=1, layout=layout),
    )


@each_guest
def test_detach(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        expected.attached[0] = False

    explore_on(
        lambda guest: guest.memory.detach(guest.memory.mappers[0]),
        change,
        Setup(targets=targets, layout=layout),
    )


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("targets", [(CUT, CUT), (EXACT, NO_CUT)], ids=["cut", "exact, no-cut"])
def test_map(targets: Sequence[TargetKind], ordinary: bool) -> None:
    setup = (
        Setup(targets=targets, place=("a",), ordinary=("b",))
        if ordinary
        else Setup(targets=targets, place=("a",), states={"b": {0, 2 * PAGE, 3 * PAGE}})
    )
    explore_on(
        lambda guest: guest.place("b"),
        lambda expected: place_in_model(expected.model, "b"),
        setup,
    )


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("targets", [(CUT, CUT), (EXACT, NO_CUT)], ids=["cut", "exact, no-cut"])
def test_unmap(targets: Sequence[TargetKind], ordinary: bool) -> None:
    setup = (
        Setup(targets=targets, ordinary=("b",))
        if ordinary
        else Setup(targets=targets, layout=((4, 5, SHARED), (6, 8, SHARED)))
    )
    explore_on(
        lambda guest: guest.memory.unmap(guest.sections["b"]),
        lambda expected: expected.model.unmap(BASE + 4 * PAGE),
        setup,
    )


@each_guest
def test_register_listener(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        expected.listening = True

    explore_on(
        lambda guest: guest.blocks["a"].discard_manager.register_listener(
            guest.listener, guest.section("a")
        ),
        change,
        Setup(targets=targets[:1], layout=layout),
    )


@each_guest
def test_unregister_listener(targets: Sequence[TargetKind], layout: Layout) -> None:
    def change(expected: Expected) -> None:
        expected.listening = False

    explore_on(
        lambda guest: guest.blocks["a"].discard_manager.unregister_listener(guest.listener),
        change,
        Setup(targets=targets[:1], layout=layout, listener=True),
    )


@pytest.mark.parametrize("to", PageState)
def test_state_change_of_a_block_in_no_guest(to: PageState) -> None:
    def act(guest: Guest) -> None:
        attributes = guest.blocks["a"].attributes
        assert attributes is not None
        attributes.state_change(PAGE, 3 * PAGE, to)

    explore_on(
        act,
        lambda expected: expected.model.state_change("a", PAGE, 3 * PAGE, to),
        Setup(place=(), states={"a": {PAGES[1], PAGES[3], PAGES[4]}}, listener=True),
        frees=False,
    )


def reset(guest: Guest) -> None:
    guest.checker.resetting = True
    guest.memory.reset()


def is_reset(expected: Expected) -> None:
    for block in expected.model.blocks.values():
        if block.confidential:
            block.shared.clear()
        if block.plugged is not None:
            block.plugged.clear()


RESETS = {
    "alone": Setup(targets=(CUT, EXACT), layout=((0, 2, SHARED), (5, 8, SHARED))),
    "with others": Setup(
        targets=(CUT_PAGE,),
        layout=((1, 3, SHARED),),
        listener=True,
        source=HALF | {PAGES[2]},
    ),
    "virtio-mem": Setup(
        targets=(CUT,), layout=ALL_SHARED, virtio_mem={PAGES[1], PAGES[2], PAGES[4]}
    ),
    "ordinary": Setup(targets=(CUT, NO_CUT), layout=((0, 2, SHARED),), ordinary=("b",)),
    "in place": Setup(targets=(CUT,), layout=((0, 3, SHARED), (4, 5, SHARED)), in_place=("a",)),
}


@pytest.mark.parametrize("setup", RESETS.values(), ids=RESETS)
def test_reset(setup: Setup) -> None:
    explore(Scenario(setup=setup, act=reset, change=is_reset, few=True, resets=True))


def renewing(what: str) -> Callable[[Guest], object]:
    def act(guest: Guest) -> object:
        guest.checker.resetting = True
        vm = guest.renew_vm() if "vm" in what else None
        return guest.memory.reset(vm, guest.renew_private() if "private" in what else None)

    return act


@pytest.mark.parametrize("renews", ["vm", "private", "vm and private"])
@pytest.mark.parametrize("setup", [RESETS["alone"], RESETS["virtio-mem"]], ids=["alone", "plug"])
def test_reset_with_a_new_vm_or_new_private_sides(setup: Setup, renews: str) -> None:
    act = renewing(renews)
    explore(Scenario(setup=setup, act=act, change=is_reset, few=True, resets=True, renews=renews))


# -- the same, in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("plugged", [None, set(PAGES)])
def test_virtio_mem_in_place(plugged: set[int] | None) -> None:
    # What is unplugged is freed once, in whatever state it is.
    explore_on(
        (lambda guest: VirtioMem(guest.blocks["a"], PAGE))
        if plugged is None
        else (lambda guest: virtio_mem_of(guest).unplug(2 * PAGE, 2 * PAGE)),
        (lambda expected: expected.model.add_virtio_mem("a"))
        if plugged is None
        else (lambda expected: expected.model.unplug("a", 2 * PAGE, 2 * PAGE)),
        Setup(targets=(CUT,), layout=((1, 2, SHARED),), virtio_mem=plugged, in_place=("a",)),
    )


@pytest.mark.parametrize("targets", [(CUT, CUT), (EXACT, NO_CUT)], ids=["cut", "exact, no-cut"])
def test_map_in_place(targets: Sequence[TargetKind]) -> None:
    explore_on(
        lambda guest: guest.place("b"),
        lambda expected: place_in_model(expected.model, "b"),
        Setup(
            targets=targets,
            place=("a",),
            states={"b": {0, 2 * PAGE, 3 * PAGE}},
            in_place=("a", "b"),
        ),
    )


@pytest.mark.parametrize("targets", [(CUT, CUT), (EXACT, NO_CUT)], ids=["cut", "exact, no-cut"])
def test_unmap_in_place(targets: Sequence[TargetKind]) -> None:
    explore_on(
        lambda guest: guest.memory.unmap(guest.sections["b"]),
        lambda expected: expected.model.unmap(BASE + 4 * PAGE),
        Setup(targets=targets, layout=((4, 5, SHARED), (6, 8, SHARED)), in_place=("b",)),
    )


# -- what is left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", PageState)
def test_what_was_not_freed_is_freed_by_the_next_conversion(to: PageState) -> None:
    layout = ALL_SHARED if to is PRIVATE else ()
    guest = Guest(Setup(layout=layout))
    last = conversion(layout, 0, 1, to)
    calls = run_case(last, ())
    assert calls[-1].kind in FREES
    guest.injector.arm(((len(calls), Way.REFUSE),))
    result = last.act(guest)
    guest.injector.disarm()
    assert isinstance(result, ConversionResult)
    assert result.not_freed_bytes == guest.blocks["a"].not_freed_bytes == PAGE
    resident = (guest.shared if to is PRIVATE else guest.private)["a"].resident
    assert PAGES[1] in resident
    assert guest.memory.convert(BASE + 2 * PAGE, PAGE, to).not_freed_bytes == 0
    assert resident == set(PAGES) - {PAGES[1], PAGES[3]}
    assert guest.blocks["a"].not_freed_bytes == 0
    guest.checker.verify()


def test_what_waits_to_be_freed_is_kept_when_it_is_used_again() -> None:
    guest = Guest(Setup(layout=ALL_SHARED))
    scenario = conversion(ALL_SHARED, 0, 1, PRIVATE)
    guest.injector.arm(((len(run_case(scenario, ())), Way.REFUSE),))
    scenario.act(guest)
    guest.injector.disarm()
    guest.memory.convert(BASE, PAGE, SHARED)
    guest.memory.convert(BASE + PAGE, PAGE, PRIVATE)
    assert guest.blocks["a"].free_pending() == 0
    assert PAGES[1] in guest.shared["a"].resident
    guest.checker.verify()  # which looks at each free whether the page is in use or mapped


def test_attributes_that_could_not_be_reset_are_set_for_ordinary_memory() -> None:
    # No memory slot, and then no way back: the attributes stay private where nothing is.
    guest = Guest(Setup(place=("a",)))
    guest.injector.arm(((2, Way.REFUSE), (3, Way.REFUSE)))
    with pytest.raises(OSError, match="add slot"):
        guest.place("b")
    guest.injector.disarm()
    assert BLOCKS["b"].gpa in guest.checker.private_pages
    assert not guest.memory.poisoned
    ordinary = RamBlock("c", FakeShared(0x7C00_0000_0000, 4 * PAGE), None, owns_private=False)
    guest.memory.map(ordinary, BLOCKS["b"].gpa)
    assert BLOCKS["b"].gpa in pages_of(guest.iommus[0].mappings())
    assert BLOCKS["b"].gpa not in guest.checker.private_pages
    guest.checker.verify()


@pytest.mark.parametrize("by", ["ordinary", "confidential", "part", "new vm"])
def test_attributes_that_were_set_meanwhile_are_not_set_again(by: str) -> None:
    guest = Guest(Setup(place=("a",)))
    guest.injector.arm(((2, Way.REFUSE), (3, Way.REFUSE)))
    with pytest.raises(OSError, match="add slot"):
        guest.place("b")
    guest.injector.disarm()
    gpa, memory = BLOCKS["b"].gpa, guest.memory
    ordinary = RamBlock("c", FakeShared(0x7C00_0000_0000, 4 * PAGE), None, owns_private=False)
    if by == "confidential":
        memory.unmap(guest.place("b"))
    elif by == "new vm":
        guest.checker.resetting = True
        memory.reset(guest.renew_vm())
    else:
        memory.unmap(memory.map(ordinary, gpa + PAGE * (by == "part"), size=3 * PAGE))
        if by == "ordinary":
            memory.unmap(memory.map(ordinary, gpa + 3 * PAGE, size=PAGE))
    guest.injector.arm(())
    memory.map(ordinary, gpa)
    # Of a part, the first page was left as it was.
    assert guest.injector.counted(Kind.ATTRIBUTE) == (by == "part")
    guest.injector.disarm()


def test_leaving_by_something_that_is_neither_error_nor_interrupt_puts_everything_back() -> None:
    scenario = conversion((), 2, 3, SHARED, setup=Setup(listener=True))
    guest = scenario.build()

    class Leaving:
        def notify_populate(self, section: RamSection) -> None:
            raise SystemExit(3)

        def notify_discard(self, section: RamSection) -> None:
            pass

    leaving = Leaving()
    manager = guest.blocks["a"].discard_manager
    manager.register_listener(leaving, guest.section("a"))
    with pytest.raises(SystemExit) as caught:
        scenario.act(guest)
    assert caught.value.code == 3
    assert "nothing has changed" in caught.value.__notes__[0]
    manager.unregister_listener(leaving)
    assert_like(guest, scenario.before)
    guest.checker.verify()


# -- budgets ---------------------------------------------------------------------------------------


def layouts(first: int, last: int) -> Iterator[Layout]:
    """
    Every way to have pages [first, last) mapped: which, and which of them with the page before in
    one mapping.
    """
    if first == last:
        yield ()
        return
    for rest in layouts(first + 1, last):
        yield rest
        yield ((first, first + 1, SHARED), *rest)
        if rest and rest[0][0] == first + 1:
            yield ((first, *rest[0][1:]), *rest[1:])


#: One failure of each sort that has the most to put back, or looks with a map of its own whether
#: something is mapped.
STRAINS = {
    Kind.MAP: Way.INTERRUPT_BEFORE,
    Kind.UNMAP: Way.INTERRUPT_AFTER,
    Kind.FLIP: Way.INTERRUPT_AFTER,
    Kind.ATTRIBUTE: Way.REFUSE,
}


def try_every_limit(make: Callable[[int], Scenario], entries: int) -> None:
    """
    From what is mapped already upwards: refused with nothing done, until the first limit that
    holds.

    There it has to succeed, and to be put back after each failure that strains the budget most. The
    target counts too, so a budget that was too small for an undo would poison.
    """
    limit = max(entries, 1)
    while (needed := refusal_for_lack_of_room(make(limit))) is not None:
        counts["refused"] += 1
        assert needed > limit
        if needed > limit + 1:
            # It knew better than to ask for one more.
            assert refusal_for_lack_of_room(make(needed - 1)) == needed
        limit = needed
    scenario = make(limit)
    calls = run_case(scenario, ())
    for number, call in enumerate(calls, 1):
        if call.kind in STRAINS:
            run_case(scenario, ((number, STRAINS[call.kind]),))


def limited(kind: TargetKind, limit: int) -> TargetKind:
    return kind._replace(max_mappings=limit)


RANGES = [(first, last) for first in range(4) for last in range(first + 1, 5)]


@pytest.mark.parametrize("to", PageState)
def test_budget_of_a_conversion(to: PageState) -> None:
    for layout in layouts(0, 4):
        for first, last in RANGES:
            try_every_limit(
                lambda limit, layout=layout, first=first, last=last: conversion(  # type: ignore[misc]
                    layout, first, last, to, targets=(limited(CUT, limit),)
                ),
                len(layout),
            )


@pytest.mark.parametrize("to", PageState)
def test_budget_of_a_conversion_across_blocks(to: PageState) -> None:
    for left in layouts(2, 4):
        for right in layouts(4, 6):
            layout = (*left, *right)
            for first, last in ((2, 6), (3, 5), (3, 6)):
                try_every_limit(
                    lambda limit, layout=layout, first=first, last=last: conversion(  # type: ignore[misc]
                        layout, first, last, to, targets=(limited(CUT, limit), EXACT)
                    ),
                    len(layout),
                )


@pytest.mark.parametrize("kind", [CUT_PAGE, NO_CUT, EXACT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("to", PageState)
def test_budget_of_a_conversion_by_page(kind: TargetKind, to: PageState) -> None:
    for layout in layouts(2, 5):
        pages = sum(last - first for first, last, _ in layout)
        try_every_limit(
            lambda limit, layout=layout: conversion(  # type: ignore[misc]
                layout, 2, 5, to, targets=(limited(kind, limit),)
            ),
            pages,
        )


SOURCES = [
    {page for bit, page in enumerate(PAGES[1:4]) if number >> bit & 1} for number in range(8)
]


def test_budget_of_adding_a_source() -> None:
    for layout in layouts(0, 3):
        for populated in SOURCES:

            def change(expected: Expected, populated: set[int] = populated) -> None:
                expected.model.blocks["a"].sources["other"] = populated

            try_every_limit(
                lambda limit, layout=layout, populated=populated, change=change: Scenario(  # type: ignore[misc]
                    setup=Setup(
                        targets=(limited(CUT, limit),), layout=layout, new_source=populated
                    ),
                    act=lambda guest: guest.blocks["a"].discard_manager.add_source(guest.source),
                    change=change,
                    frees=False,
                ),
                len(layout),
            )


def test_budget_of_removing_a_source() -> None:
    def change(expected: Expected) -> None:
        del expected.model.blocks["a"].sources["other"]

    for layout in layouts(0, 3):
        for populated in SOURCES:
            setup = Setup(targets=(), layout=layout, source=populated)
            mapped = sorted(model_of(setup).populated())
            entries = sum(page - PAGE not in mapped for page in mapped)
            try_every_limit(
                lambda limit, layout=layout, populated=populated: Scenario(  # type: ignore[misc]
                    setup=Setup(targets=(limited(CUT, limit),), layout=layout, source=populated),
                    act=lambda guest: guest.blocks["a"].discard_manager.remove_source(guest.source),
                    change=change,
                    frees=False,
                ),
                max(entries, len(layout)),
            )


def test_budget_of_attaching_and_of_placing() -> None:
    def attached(expected: Expected) -> None:
        expected.attached[0] = True

    for layout in layouts(0, 4):
        shared = {PAGES[1 + page] for first, last, _ in layout for page in range(first, last)}
        try_every_limit(
            lambda limit, shared=shared: Scenario(  # type: ignore[misc]
                setup=Setup(targets=(limited(CUT, limit),), attached=0, states={"a": shared}),
                act=lambda guest: guest.attach(0),
                change=attached,
            ),
            0,
        )
        try_every_limit(
            lambda limit, shared=shared: Scenario(  # type: ignore[misc]
                setup=Setup(targets=(limited(CUT, limit),), place=("b",), states={"a": shared}),
                act=lambda guest: guest.place("a"),
                change=lambda expected: place_in_model(expected.model, "a"),
            ),
            0,
        )


def test_the_operators_budget_counts_like_the_targets() -> None:
    scenario = conversion(
        (), 1, 3, SHARED, setup=Setup(targets=(NO_CUT, limited(EXACT, 5)), max_mappings=1)
    )
    guest = scenario.build()
    with pytest.raises(MappingLimitError) as caught:
        scenario.act(guest)
    assert (caught.value.limit, caught.value.needed) == (1, 2)
    assert [mapper.limit for mapper in guest.memory.mappers] == [1, 1]
