import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import (
    PAGE,
    PageSource,
    RecordingListener,
    RefusalError,
    attributes_of,
    discard,
    populate,
    section,
)
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import BusyError, DmaError, IommuFault, MappingLimitError, UsageError
from ramblock.hostmem import StandInPrivate
from ramblock.testing import FaultyTarget, pages_of

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 16
UNIT = 4 * PAGE


@pytest.fixture(params=[None, "stand-in"], ids=["ordinary", "confidential"])
def block(request: pytest.FixtureRequest) -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE, private=request.param) as block:
        yield block


@pytest.fixture
def ordinary() -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE) as block:
        yield block


@pytest.fixture
def confidential() -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        yield block


def share_all(block: RamBlock) -> None:
    if block.attributes is not None:
        block.attributes.state_change(0, block.size, SHARED)


def allocated(block: RamBlock) -> int:
    assert block.fd is not None
    return os.fstat(block.fd).st_blocks * 512


def listen(block: RamBlock, first: int = 0, count: int = COUNT) -> RecordingListener:
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block, first, count))
    listener.take_calls()
    return listener


# -- coming and going ------------------------------------------------------------------------------


def test_it_adds_itself_unplugged(block: RamBlock) -> None:
    share_all(block)
    listener = listen(block)
    assert listener.held == set(range(COUNT))
    device = VirtioMem(block, UNIT)
    assert listener.take_calls() == [discard(0, COUNT)]
    assert device in block.discard_manager.sources
    assert (device.plugged_size, device.granularity) == (0, UNIT)
    assert list(block.discard_manager.populated(section(block))) == []
    assert repr(device) == "<VirtioMem of 'ram': 0x0 of 0x10000 bytes plugged>"


def test_what_was_there_is_freed(block: RamBlock) -> None:
    block.write(0, b"x" * block.size)
    if isinstance(block.private, StandInPrivate):
        block.private.write(0, b"x" * block.size)
    VirtioMem(block, UNIT)
    assert allocated(block) == 0
    if isinstance(block.private, StandInPrivate):
        assert block.private.allocated_bytes() == 0


@pytest.mark.parametrize(
    "block_size", [0, -PAGE, 1, PAGE // 2, 3 * PAGE, 2 * COUNT * PAGE, None, "4096", True, 4096.0]
)
def test_block_sizes_that_do_not_fit(block: RamBlock, block_size: int) -> None:
    sources = block.discard_manager.sources
    with pytest.raises(UsageError):
        VirtioMem(block, block_size)
    assert block.discard_manager.sources == sources


def test_a_block_size_that_does_not_divide_the_block() -> None:
    with RamBlock.create("odd", 3 * PAGE) as block, pytest.raises(UsageError, match="do not fit"):
        VirtioMem(block, 2 * PAGE)


def test_whoever_refuses_keeps_it_out(block: RamBlock) -> None:
    share_all(block)
    block.write(0, b"x")
    first, second = listen(block), listen(block)
    second.refuse_all("discard")
    sources = block.discard_manager.sources
    with pytest.raises(RefusalError):
        VirtioMem(block, UNIT)
    assert block.discard_manager.sources == sources
    assert first.held == second.held == set(range(COUNT))
    assert block.read(0, 1) == b"x"
    assert not block.guard.poisoned


def test_it_can_be_removed_and_then_does_nothing_more(block: RamBlock) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(0, UNIT)
    listener = listen(block)
    block.discard_manager.remove_source(device)
    assert listener.take_calls() == [populate(4, 12)]
    for verb, arguments in (("plug", (UNIT, UNIT)), ("unplug", (0, UNIT)), ("unplug_all", ())):
        with pytest.raises(UsageError, match="was removed from the sources"):
            getattr(device, verb)(*arguments)
    assert listener.held == set(range(COUNT))


def test_twice_on_one_block(block: RamBlock) -> None:
    share_all(block)
    one, two = VirtioMem(block, UNIT), VirtioMem(block, 2 * UNIT)
    one.plug(0, 2 * UNIT)
    listener = listen(block)
    assert listener.held == set()
    two.plug(0, 4 * UNIT)
    assert listener.take_calls() == [populate(0, 8)]


def test_the_same_twice(block: RamBlock) -> None:
    device = VirtioMem(block, UNIT)
    with pytest.raises(BusyError, match="is a source of block 'ram' already"):
        block.discard_manager.add_source(device)


# -- plugging --------------------------------------------------------------------------------------


def test_plug_and_unplug(block: RamBlock) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    listener = listen(block)
    device.plug(UNIT, 2 * UNIT)
    assert listener.take_calls() == [populate(4, 8)]
    assert device.plugged_size == 2 * UNIT
    device.unplug(2 * UNIT, UNIT)
    assert listener.take_calls() == [discard(8, 4)]
    assert device.plugged_size == UNIT
    assert device.is_populated(UNIT, UNIT)
    assert list(device.ranges(0, block.size)) == [(UNIT, UNIT)]


BAD_RANGES = [
    (0, 0),
    (0, -UNIT),
    (-UNIT, UNIT),
    (0, COUNT * PAGE + UNIT),
    (COUNT * PAGE, UNIT),
    (1 << 64, UNIT),
    (0, 1 << 64),
    (UNIT, (1 << 64) - UNIT),
    (PAGE, UNIT),
    (0, PAGE),
    (None, UNIT),
    (0, None),
    ("0", UNIT),
    (True, UNIT),
    (0, True),
]


@pytest.mark.parametrize(("offset", "size"), BAD_RANGES)
@pytest.mark.parametrize("verb", ["plug", "unplug"])
def test_what_is_no_range_of_device_blocks(
    block: RamBlock, verb: str, offset: int, size: int
) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(0, 2 * UNIT)
    listener = listen(block)
    with pytest.raises(UsageError):
        getattr(device, verb)(offset, size)
    assert device.plugged_size == 2 * UNIT
    assert listener.calls == []


@pytest.mark.parametrize(("offset", "size"), [(UNIT, UNIT), (0, 2 * UNIT), (UNIT, 3 * UNIT)])
def test_plugging_what_is_plugged_at_least_in_part(block: RamBlock, offset: int, size: int) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(UNIT, UNIT)
    listener = listen(block)
    with pytest.raises(UsageError, match="is plugged already, at least in part"):
        device.plug(offset, size)
    assert (device.plugged_size, listener.calls) == (UNIT, [])


@pytest.mark.parametrize(("offset", "size"), [(0, UNIT), (0, 2 * UNIT), (UNIT, 3 * UNIT)])
def test_unplugging_what_is_unplugged_at_least_in_part(
    block: RamBlock, offset: int, size: int
) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(UNIT, UNIT)
    listener = listen(block)
    with pytest.raises(UsageError, match="is unplugged already, at least in part"):
        device.unplug(offset, size)
    assert (device.plugged_size, listener.calls) == (UNIT, [])


def test_unplug_all(block: RamBlock) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    listener = listen(block)
    device.unplug_all()  # nothing plugged is fine
    assert listener.take_calls() == []
    device.plug(0, UNIT)
    device.plug(2 * UNIT, 2 * UNIT)
    block.write(0, b"x" * UNIT)
    listener.take_calls()
    device.unplug_all()
    assert listener.take_calls() == [discard(0, 4), discard(8, 8)]
    assert device.plugged_size == 0
    assert allocated(block) == 0


@pytest.mark.parametrize("verb", ["plug", "unplug", "unplug_all"])
def test_all_or_nothing(block: RamBlock, verb: str) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(0, UNIT)
    block.write(0, b"x")
    listeners = [listen(block), listen(block)]
    listeners[1].refuse_all("populate" if verb == "plug" else "discard")
    arguments = {"plug": (UNIT, UNIT), "unplug": (0, UNIT), "unplug_all": ()}
    with pytest.raises(RefusalError):
        getattr(device, verb)(*arguments[verb])
    assert device.plugged_size == UNIT
    assert list(device.ranges(0, block.size)) == [(0, UNIT)]
    for listener in listeners:
        assert (listener.held, listener.wrong) == (set(range(4)), [])
    assert block.read(0, 1) == b"x"
    assert not block.guard.poisoned


def test_unplugging_goes_listeners_then_state_then_memory(block: RamBlock) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(0, UNIT)
    block.write(0, b"x")
    listener = listen(block)
    seen: list[tuple[int, bytes]] = []
    listener.then = lambda _: seen.append((device.plugged_size, block.read(0, 1)))
    device.unplug(0, UNIT)
    assert seen == [(UNIT, b"x")]
    assert (device.plugged_size, block.read(0, 1)) == (0, b"\0")


def test_unplugging_frees_both_backings_whole_device_blocks_only(confidential: RamBlock) -> None:
    block = confidential
    assert isinstance(block.private, StandInPrivate)
    device = VirtioMem(block, UNIT)
    device.plug(0, block.size)
    attributes_of(block).state_change(0, block.size // 2, SHARED)
    block.write(0, b"s" * block.size)
    block.private.write(0, b"p" * block.size)
    device.unplug(UNIT, 2 * UNIT)
    assert allocated(block) == block.private.allocated_bytes() == block.size - 2 * UNIT
    assert block.read(0, UNIT) == b"s" * UNIT
    assert block.private.read(3 * UNIT, UNIT) == b"p" * UNIT
    assert block.read(UNIT, 2 * UNIT) == block.private.read(UNIT, 2 * UNIT) == bytes(2 * UNIT)


# -- with page attributes --------------------------------------------------------------------------


def test_plug_state_and_page_state_are_independent(confidential: RamBlock) -> None:
    block, memory, iommu = confidential, GuestMemory(), SoftIommu()
    memory.map(block, 0)
    memory.attach(iommu)
    device = VirtioMem(block, UNIT)
    # An unplugged range may be converted,
    result = memory.convert(0, 2 * UNIT, SHARED)
    assert (result.changed_bytes, result.map_calls) == (2 * UNIT, 0)
    assert list(memory.ranges(SHARED)) == [(0, 2 * UNIT)]
    assert iommu.mappings() == []
    # and is mapped when it is plugged.
    device.plug(UNIT, 2 * UNIT)
    assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(UNIT, UNIT)]
    # Unplugging leaves the page state alone.
    device.unplug_all()
    assert iommu.mappings() == []
    assert list(memory.ranges(SHARED)) == [(0, 2 * UNIT)]


def test_listeners_hear_only_where_both_agree(confidential: RamBlock) -> None:
    device = VirtioMem(confidential, UNIT)
    listener = listen(confidential)
    attributes_of(confidential).state_change(2 * PAGE, 4 * PAGE, SHARED)
    assert listener.take_calls() == []
    device.plug(0, 4 * UNIT)
    assert listener.take_calls() == [populate(2, 4)]
    device.unplug(0, UNIT)
    assert listener.take_calls() == [discard(2, 2)]
    attributes_of(confidential).state_change(0, 8 * PAGE, PRIVATE)
    assert listener.take_calls() == [discard(4, 2)]
    device.plug(0, UNIT)
    assert listener.take_calls() == []


def test_a_third_source(confidential: RamBlock) -> None:
    attributes_of(confidential).state_change(0, COUNT * PAGE, SHARED)
    device = VirtioMem(confidential, UNIT)
    third = PageSource(range(0, COUNT, 2))
    confidential.discard_manager.add_source(third)
    listener = listen(confidential)
    device.plug(0, 2 * UNIT)
    assert listener.take_calls() == [populate(number, 1) for number in range(0, 8, 2)]
    confidential.discard_manager.remove_source(third)
    assert listener.take_calls() == [populate(number, 1) for number in range(1, 8, 2)]
    device.unplug_all()
    assert listener.take_calls() == [discard(0, 8)]


# -- with a target ---------------------------------------------------------------------------------


def test_a_budget_is_asked_before_anything_is_plugged(ordinary: RamBlock) -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    memory.map(ordinary, 0)
    device = VirtioMem(ordinary, UNIT)
    memory.attach(iommu, MappingPolicy.PAGE, max_mappings=6)
    device.plug(0, UNIT)
    with pytest.raises(MappingLimitError) as caught:
        device.plug(UNIT, UNIT)
    assert (caught.value.limit, caught.value.needed) == (6, 8)
    assert (device.plugged_size, len(iommu.mappings())) == (UNIT, 4)


def test_a_target_that_refuses(ordinary: RamBlock) -> None:
    memory = GuestMemory()
    memory.map(ordinary, 0)
    device = VirtioMem(ordinary, UNIT)
    iommu = SoftIommu(cut=False)
    target = FaultyTarget(iommu, fail_map={2})
    memory.attach(target, MappingPolicy.PAGE)
    with pytest.raises(DmaError, match="told to fail"):
        device.plug(0, UNIT)
    assert (device.plugged_size, iommu.mappings()) == (0, [])
    device.plug(0, UNIT)
    assert len(iommu.mappings()) == 4
    target.fail_unmap = {target.unmap_calls + 1}
    with pytest.raises(DmaError):
        device.unplug(0, UNIT)
    assert (device.plugged_size, len(iommu.mappings())) == (UNIT, 4)
    assert not memory.poisoned


def test_device_blocks_smaller_than_a_targets_pages(ordinary: RamBlock) -> None:
    memory = GuestMemory()
    memory.map(ordinary, 0)
    memory.attach(SoftIommu(page_size=2 * UNIT))
    with pytest.raises(UsageError, match="less than a page"):
        VirtioMem(ordinary, UNIT)
    assert ordinary.discard_manager.sources == ()
    device = VirtioMem(ordinary, 2 * UNIT)
    device.plug(0, 2 * UNIT)


# -- any sequence ----------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["plug", "unplug", "unplug_all", "share", "make private"]),
        st.integers(0, 3),
        st.integers(1, 4),
    ),
    max_size=20,
)


@given(steps)
def test_any_sequence_against_two_sets(sequence: list[tuple[str, int, int]]) -> None:
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        device, attributes = VirtioMem(block, UNIT), attributes_of(block)
        listener = listen(block)
        plugged: set[int] = set()
        shared: set[int] = set()
        for what, first, length in sequence:
            numbers = set(range(first * 4, min(first + length, 4) * 4))
            where = first * UNIT, len(numbers) * PAGE
            if what == "unplug_all":
                device.unplug_all()
                plugged = set()
            elif what in ("plug", "unplug"):
                possible = not numbers & plugged if what == "plug" else numbers <= plugged
                if possible:
                    getattr(device, what)(*where)
                    plugged ^= numbers
                else:
                    with pytest.raises(UsageError):
                        getattr(device, what)(*where)
            else:
                attributes.state_change(*where, SHARED if what == "share" else PRIVATE)
                shared = shared | numbers if what == "share" else shared - numbers
            assert device.plugged_size == len(plugged) * PAGE
            assert attributes.shared_bytes == len(shared) * PAGE
            assert (listener.held, listener.wrong) == (plugged & shared, [])


# -- where a section cuts a block of the device
# ------------------------------------------------------


@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("verb", ["unplug_all", "unplug", "refused"])
def test_a_section_that_cuts_a_device_block(
    block: RamBlock, first: int, count: int, verb: str
) -> None:
    share_all(block)
    memory = GuestMemory()
    memory.map(block, 0, offset=first * PAGE, size=count * PAGE)
    iommu = SoftIommu()
    memory.attach(iommu)
    device = VirtioMem(block, UNIT)
    listener = listen(block, first, count)
    device.plug(UNIT, 2 * UNIT)  # pages 4 to 11: the device is plugged in part
    inside = {page for page in range(4, 12) if first <= page < first + count}
    held = {page - first for page in inside}
    assert pages_of(iommu.mappings()) == {page * PAGE for page in held}
    assert listener.held == inside
    if verb == "refused":
        last = RecordingListener("refuses")
        block.discard_manager.register_listener(last, section(block))
        last.refuse_all("discard")
        with pytest.raises(RefusalError):
            device.unplug_all()
        last.refuse_nothing()
        assert pages_of(iommu.mappings()) == {page * PAGE for page in held}
        assert listener.held == inside
    elif verb == "unplug":
        device.unplug(UNIT, UNIT)
        device.unplug(2 * UNIT, UNIT)
    else:
        device.unplug_all()
    if verb != "refused":
        assert iommu.mappings() == []
        assert listener.held == set()
        for page in range(count):
            with pytest.raises(IommuFault):
                iommu.write(page * PAGE, b"x")
    for heard in listener.sections:
        assert first * PAGE <= heard.offset < heard.end <= (first + count) * PAGE
    assert listener.wrong == []
    assert not memory.poisoned


def test_one_that_comes_back_frees_and_accounts(block: RamBlock) -> None:
    share_all(block)
    device = VirtioMem(block, UNIT)
    device.plug(0, UNIT)
    block.discard_manager.remove_source(device)
    block.write(0, b"x" * block.size)  # all of it may be used now
    if isinstance(block.private, StandInPrivate):
        block.private.write(0, b"x" * block.size)
    block.discard_manager.add_source(device)
    # Only the plugged part is left, on either side.
    assert allocated(block) == UNIT
    assert block.read(0, block.size) == b"x" * UNIT + bytes(block.size - UNIT)
    if isinstance(block.private, StandInPrivate):
        # Shared and plugged: the private side is not in use, but nothing has freed it there.
        assert block.private.allocated_bytes() == UNIT
    assert block.not_freed_bytes == 0


def test_one_that_comes_back_accounts_for_what_is_not_freed(
    ordinary: RamBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = VirtioMem(ordinary, UNIT)
    device.plug(0, UNIT)
    ordinary.discard_manager.remove_source(device)
    ordinary.write(0, b"x" * ordinary.size)
    reclaimer = ordinary.sides.shared
    with monkeypatch.context() as patch:

        def refuse(offset: int, size: int) -> None:
            raise OSError("not now")

        patch.setattr(reclaimer, "_discard", refuse)
        ordinary.discard_manager.add_source(device)
        assert ordinary.not_freed_bytes == ordinary.size - UNIT
    assert ordinary.free_pending() == 0
    assert allocated(ordinary) == UNIT
