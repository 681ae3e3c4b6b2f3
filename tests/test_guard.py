import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from doubles import PAGE, PageSource, RecordingListener, RecordingVm, attributes_of, section
from ramblock import GuestMemory, Mapper, PageState, RamBlock, RamSection, VirtioMem
from ramblock.discard.guard import Guard
from ramblock.dma import DmaCapabilities, HostRange, SoftIommu
from ramblock.errors import BusyError, ConversionError, PoisonedError, UsageError
from ramblock.events import StateChanged
from ramblock.testing import FaultyTarget

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


def _nothing(*_: object) -> None: ...


class CallingTarget(FaultyTarget):
    """A target that runs something inside each of its calls."""

    then: Callable[[], object] = staticmethod(_nothing)

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        self.then()
        super().map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        self.then()
        return super().unmap(iova, size)


class CallingSource(PageSource):
    """A source that runs something when it is asked."""

    then: Callable[[], object] = staticmethod(_nothing)

    def is_populated(self, offset: int, size: int) -> bool:
        self.then()
        return super().is_populated(offset, size)


@dataclass
class Guest:
    """A guest with one of everything, and a block that is not placed in it."""

    memory: GuestMemory
    vm: RecordingVm
    block: RamBlock
    placed: RamSection
    device: VirtioMem
    source: CallingSource
    listener: RecordingListener
    target: CallingTarget
    iommu: SoftIommu
    mapper: Mapper
    spare: RamBlock

    def poison(self) -> None:
        """Have an unmap remove one page too few."""
        self.target.short_unmap = {self.target.unmap_calls + 1}
        with pytest.raises(PoisonedError):
            self.memory.convert(0, 2 * PAGE, PRIVATE)


@pytest.fixture
def guest() -> Iterator[Guest]:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    block = RamBlock.create("ram", 8 * PAGE, private="stand-in")
    placed = memory.map(block, 0)
    device = VirtioMem(block, PAGE)
    device.plug(0, 4 * PAGE)
    source = CallingSource(range(8))
    block.discard_manager.add_source(source)
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block))
    iommu = SoftIommu()
    target = CallingTarget(iommu)
    mapper = memory.attach(target)
    memory.convert(0, 2 * PAGE, SHARED)
    spare = RamBlock.create("spare", PAGE)
    yield Guest(memory, vm, block, placed, device, source, listener, target, iommu, mapper, spare)
    block.close()
    spare.close()


def change_state(guest: Guest, page: int) -> None:
    guest.block.guard.has_vm = False  # nothing here minds that its attribute stays behind
    attributes_of(guest.block).state_change(page * PAGE, PAGE, SHARED)


# Every call that changes something, in a form that would otherwise succeed.
CHANGES: dict[str, Callable[[Guest], object]] = {
    "convert": lambda guest: guest.memory.convert(3 * PAGE, PAGE, SHARED),
    "map": lambda guest: guest.memory.map(guest.spare, 1 << 20),
    "unmap": lambda guest: guest.memory.unmap(guest.placed),
    "attach": lambda guest: guest.memory.attach(SoftIommu()),
    "detach": lambda guest: guest.memory.detach(guest.mapper),
    "state_change": lambda guest: change_state(guest, 3),
    "add_source": lambda guest: guest.block.discard_manager.add_source(PageSource(range(8))),
    "remove_source": lambda guest: guest.block.discard_manager.remove_source(guest.source),
    "notify_populate": lambda guest: guest.block.discard_manager.notify_populate(
        guest.source, 7 * PAGE, PAGE
    ),
    "notify_discard": lambda guest: guest.block.discard_manager.notify_discard(
        guest.source, 7 * PAGE, PAGE
    ),
    "register_listener": lambda guest: guest.block.discard_manager.register_listener(
        RecordingListener(), section(guest.block)
    ),
    "unregister_listener": lambda guest: guest.block.discard_manager.unregister_listener(
        guest.listener
    ),
    "virtio-mem": lambda guest: VirtioMem(guest.block, PAGE),
    "plug": lambda guest: guest.device.plug(4 * PAGE, PAGE),
    "unplug": lambda guest: guest.device.unplug(3 * PAGE, PAGE),
    "unplug_all": lambda guest: guest.device.unplug_all(),
    "free_pending": lambda guest: guest.block.free_pending(),
    "close": lambda guest: guest.block.close(),
}

# What goes on a poisoned memory: it only takes away.
TAKES_AWAY = {"unmap", "detach", "unregister_listener", "close"}


@pytest.mark.parametrize("name", CHANGES)
def test_each_of_these_calls_would_succeed(guest: Guest, name: str) -> None:
    # Otherwise the tests below would see failures that have nothing to do with what they are about.
    CHANGES[name](guest)
    assert not guest.memory.poisoned
    assert guest.listener.wrong == []


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("caller", ["listener", "source", "target", "vm", "observer"])
def test_calling_back_in_is_busy_and_not_a_deadlock(guest: Guest, caller: str, name: str) -> None:
    caught: list[BusyError] = []

    def call_back(*_: object) -> None:
        with pytest.raises(BusyError, match="was called from inside convert") as busy:
            CHANGES[name](guest)
        caught.append(busy.value)

    if caller == "observer":
        guest.memory.observer = call_back
    else:
        getattr(guest, caller).then = call_back
    result = guest.memory.convert(2 * PAGE, PAGE, SHARED)
    assert caught
    # The call that was refused has changed nothing, and the one around it has done its work.
    assert result.changed_bytes == PAGE
    assert list(guest.memory.ranges(SHARED)) == [(0, 3 * PAGE)]
    assert guest.listener.held == {0, 1, 2}
    assert guest.mapper.mapped_bytes == 3 * PAGE
    assert guest.memory.sections == (guest.placed,)
    assert guest.block.discard_manager.sources == (
        attributes_of(guest.block),
        guest.device,
        guest.source,
    )
    assert guest.device.plugged_size == 4 * PAGE
    assert not guest.memory.poisoned
    # And the lock is free again.
    getattr(guest, caller, guest.listener).then = _nothing
    guest.memory.observer = None
    CHANGES[name](guest)


@pytest.mark.parametrize(
    "outer", ["plug", "unplug", "state_change", "add_source", "attach", "unmap"]
)
def test_every_operation_keeps_a_listener_out(guest: Guest, outer: str) -> None:
    caught: list[BusyError] = []

    def call_back(_: object) -> None:
        with pytest.raises(BusyError) as busy:
            guest.memory.convert(0, PAGE, PRIVATE)
        caught.append(busy.value)

    change_state(guest, 4)  # for plug to populate
    change_state(guest, 3)  # for unplug to discard
    guest.listener.then = call_back
    guest.target.then = lambda: call_back(None)
    guest.source.populated.discard(7)
    if outer == "state_change":
        change_state(guest, 2)
    elif outer == "add_source":
        guest.block.discard_manager.add_source(PageSource())
    elif outer == "attach":
        other = CallingTarget(SoftIommu())
        other.then = lambda: call_back(None)
        guest.memory.attach(other)
    else:
        CHANGES[outer](guest)
    assert caught


def test_a_listener_that_does_not_catch_it_has_refused(guest: Guest) -> None:
    guest.listener.then = lambda _: guest.memory.convert(0, PAGE, PRIVATE)
    with pytest.raises(ConversionError) as caught:
        guest.memory.convert(2 * PAGE, PAGE, SHARED)
    assert isinstance(caught.value.__cause__, BusyError)
    assert caught.value.rolled_back
    assert list(guest.memory.ranges(SHARED)) == [(0, 2 * PAGE)]


def test_reading_from_inside_is_fine(guest: Guest) -> None:
    seen: list[object] = []

    def look(_: object) -> None:
        manager = guest.block.discard_manager
        seen.append(guest.memory.state(0))
        seen.append(list(guest.memory.ranges(SHARED)))
        seen.append(manager.is_populated(section(guest.block, 0, 2)))
        seen.append([part.size for part in manager.populated(section(guest.block))])
        seen.append(guest.memory.poisoned)
        seen.append(guest.block.read(0, 1))

    guest.listener.then = look
    guest.memory.convert(2 * PAGE, PAGE, SHARED)
    # The state flips after the listeners have agreed.
    assert seen == [SHARED, [(0, 2 * PAGE)], True, [2 * PAGE], False, b"\0"]


def test_an_unplaced_block_has_a_lock_of_its_own() -> None:
    with RamBlock.create("ram", 2 * PAGE, private="stand-in") as block:
        listener = RecordingListener()
        block.discard_manager.register_listener(listener, section(block))
        memory = GuestMemory()
        caught: list[BusyError] = []

        def call_back(_: object) -> None:
            with pytest.raises(BusyError, match="from inside state_change") as busy:
                memory.map(block, 0)
            caught.append(busy.value)

        listener.then = call_back
        attributes_of(block).state_change(0, PAGE, SHARED)
        assert caught
        assert memory.sections == ()


def test_other_threads_wait_for_the_lock(guest: Guest) -> None:
    inside, go_on = threading.Event(), threading.Event()
    second_done = threading.Event()
    order: list[str] = []

    def first(_: object) -> None:
        guest.listener.then = _nothing
        inside.set()
        assert go_on.wait(60)
        order.append("first")

    def second() -> None:
        guest.memory.convert(3 * PAGE, PAGE, SHARED)
        order.append("second")
        second_done.set()

    guest.listener.then = first
    one = threading.Thread(target=guest.memory.convert, args=(2 * PAGE, PAGE, SHARED))
    one.start()
    assert inside.wait(60)
    two = threading.Thread(target=second)
    two.start()
    assert not second_done.is_set()
    go_on.set()
    one.join(60)
    two.join(60)
    assert order == ["first", "second"]
    assert list(guest.memory.ranges(SHARED)) == [(0, 4 * PAGE)]


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_whoever_waits_has_the_lock_in_turn_and_before_whoever_comes_later() -> None:
    guard = Guard()
    order: list[str] = []
    threads = [
        threading.Thread(target=guard.run, args=(name, order.append, name), daemon=True)
        for name in ("first", "second", "third")
    ]

    def hold() -> None:
        for number, thread in enumerate(threads, 1):
            thread.start()
            _wait_until(lambda number=number: len(guard._gates) == number)  # type: ignore[misc]

    guard.run("hold", hold)
    guard.run("later", order.append, "later")
    for thread in threads:
        thread.join(60)
    assert order == ["first", "second", "third", "later"]
    assert guard.run("last", lambda: "is free") == "is free"


class JustGivenBack:
    """A lock that is given back between a look at it and what follows from that look."""

    def __init__(self) -> None:
        self.looks = 0
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:
        self.looks += 1
        return self.looks > 1 and self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()


def test_nobody_waits_for_an_owner_who_has_just_left() -> None:
    guard = Guard()
    guard._lock = JustGivenBack()  # type: ignore[assignment]
    done: list[str] = []
    thread = threading.Thread(target=guard.run, args=("wait", done.append, "done"), daemon=True)
    thread.start()
    thread.join(20)
    assert done == ["done"]


class StaleGates(deque[Any]):
    """Says that nobody waits, and then somebody does."""

    then: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        answer = len(self) > 0
        then, self.then = self.then, None
        if then is not None:
            then()
        return answer


def test_nobody_who_comes_while_the_lock_is_given_back_waits_forever() -> None:
    guard = Guard()
    guard._gates = gates = StaleGates()
    done: list[str] = []
    thread = threading.Thread(target=guard.run, args=("late", done.append, "done"), daemon=True)

    def come() -> None:
        thread.start()
        _wait_until(lambda: len(gates) == 1)

    guard.run("hold", lambda: setattr(gates, "then", come))
    thread.join(20)
    assert done == ["done"]
    assert guard.run("last", lambda: "is free") == "is free"


def test_whoever_waits_follows_a_block_to_its_new_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 2 * PAGE, private="stand-in") as block:
        before = block.guard
        run = before.run

        def placed_meanwhile(*args: Any, **kwargs: Any) -> object:
            # Between looking up the lock and getting it, the block is placed by somebody else.
            monkeypatch.undo()
            memory.map(block, 0)
            return run(*args, **kwargs)

        monkeypatch.setattr(before, "run", placed_meanwhile)
        listener = RecordingListener()
        block.discard_manager.register_listener(listener, section(block))
        assert block.guard is not before
        inside: list[str] = []

        def look(_: object) -> None:
            with pytest.raises(BusyError) as caught:
                memory.convert(0, PAGE, SHARED)
            inside.append(str(caught.value))

        listener.then = look
        attributes_of(block).state_change(0, PAGE, SHARED)
        assert inside
        assert before.run("something", lambda: "is free") == "is free"


def test_nothing_is_done_under_a_lock_that_the_block_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 2 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(0, PAGE, SHARED)
        run = block.guard.run

        def placed_meanwhile(*args: Any, **kwargs: Any) -> object:
            monkeypatch.undo()
            memory.map(block, 0)
            return run(*args, **kwargs)

        refused: list[BusyError] = []

        def look(_: object) -> None:
            with pytest.raises(BusyError) as caught:
                memory.convert(PAGE, PAGE, SHARED)
            refused.append(caught.value)

        monkeypatch.setattr(block.guard, "run", placed_meanwhile)
        listener = RecordingListener()
        listener.then = look
        block.discard_manager.register_listener(listener, section(block))
        assert len(refused) == 1
        listener.then = _nothing


# -- poison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_poison_is_for_everything_that_changes_but_what_only_takes_away(
    guest: Guest, name: str
) -> None:
    guest.poison()
    assert guest.memory.poisoned
    assert [(gpa, size) for gpa, size, _ in guest.memory.in_doubt()] == [(0, 2 * PAGE)]
    assert guest.memory.in_doubt()[0].target is guest.target
    if name in TAKES_AWAY:
        CHANGES[name](guest)
    else:
        with pytest.raises(PoisonedError, match="poisoned") as caught:
            CHANGES[name](guest)
        assert caught.value.rolled_back is False
    # Permanent, and the truth about what may be reached stays.
    assert guest.memory.poisoned
    assert guest.memory.in_doubt()


def test_reading_a_poisoned_memory_works(guest: Guest) -> None:
    guest.block.write(0, b"still here")
    guest.poison()
    assert guest.memory.state(0) is SHARED
    assert list(guest.memory.ranges(SHARED)) == [(0, 2 * PAGE)]
    assert guest.block.read(0, 10) == b"still here"
    assert guest.block.discard_manager.is_populated(section(guest.block, 0, 2))


def test_a_poisoned_memory_does_not_take_a_block_and_a_poisoned_block_no_memory(
    guest: Guest,
) -> None:
    guest.poison()
    with pytest.raises(PoisonedError):
        guest.memory.map(guest.spare, 1 << 20)
    assert guest.spare.placement is None
    guest.memory.unmap(guest.placed)
    with pytest.raises(PoisonedError):
        GuestMemory().map(guest.block, 0)


def test_a_block_that_leaves_a_poisoned_memory_stays_poisoned(guest: Guest) -> None:
    guest.poison()
    guest.memory.unmap(guest.placed)
    with pytest.raises(PoisonedError):
        attributes_of(guest.block).state_change(0, PAGE, SHARED)
    assert guest.memory.poisoned


def test_unmap_on_a_poisoned_memory_takes_everything_from_the_devices(guest: Guest) -> None:
    guest.poison()
    assert guest.iommu.mappings()
    assert guest.mapper.entries
    guest.memory.unmap(guest.placed)
    assert guest.iommu.mappings() == []
    assert (guest.mapper.entries, guest.mapper.mapped_bytes) == (0, 0)
    assert guest.memory.in_doubt()  # it cannot be known


def test_a_listener_leaves_a_poisoned_block_whatever_it_says(guest: Guest) -> None:
    guest.poison()
    guest.listener.refuse_all("discard")
    manager = guest.block.discard_manager
    manager.unregister_listener(guest.listener)
    assert guest.listener not in [entry.listener for entry in manager.registry]
    doubted = [doubt for doubt in guest.memory.in_doubt() if doubt.target is guest.listener]
    assert [(doubt.gpa, doubt.size) for doubt in doubted] == [(0, 2 * PAGE)]


def test_a_transaction_under_way_is_no_poison(guest: Guest) -> None:
    seen: list[bool] = []
    guest.listener.then = lambda _: seen.append(guest.memory.poisoned)
    guest.memory.convert(2 * PAGE, PAGE, SHARED)
    assert seen == [False]


def test_the_lock_is_free_after_every_refusal() -> None:
    guard = Guard()
    assert guard.run("adding", int.__add__, 1, 2) == 3
    guard.poison("because")

    def again() -> None:
        with pytest.raises(BusyError, match="again was called from inside closing"):
            guard.run("again", lambda: None, even_poisoned=True)

    def fail() -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(PoisonedError, match="because"):
            guard.run("something", lambda: pytest.fail("was called"))
        guard.run("closing", again, even_poisoned=True)
        with pytest.raises(KeyboardInterrupt):
            guard.run("failing", fail, even_poisoned=True)


def test_the_first_reason_is_kept() -> None:
    guard = Guard()
    guard.poison("first")
    guard.poison("second")
    assert "first" in str(guard.poisoned_error("x"))


def test_doubts_are_joined_by_target() -> None:
    guard = Guard()
    with RamBlock.create("ram", 16 * PAGE) as block:
        one, two = RecordingListener("one"), RecordingListener("two")
        for first, count, listener in (
            (4, 2, one),
            (0, 1, one),
            (1, 1, one),
            (5, 3, one),
            (4, 1, two),
        ):
            guard.doubt(section(block, first, count, gpa=(first + 100) * PAGE), listener, "why")
        assert guard.in_doubt() == [
            (100 * PAGE, 2 * PAGE, one),
            (104 * PAGE, 4 * PAGE, one),
            (104 * PAGE, PAGE, two),
        ]
        assert guard.poisoned
        assert set(map(id, guard.doubts_of(block))) == {id(one), id(two)}
        with RamBlock.create("other", PAGE) as other:
            assert guard.doubts_of(other) == []


def test_an_observer_that_fails_changes_nothing(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: StateChanged) -> None:
        raise ValueError(event)

    guest.memory.observer = fail
    result = guest.memory.convert(2 * PAGE, PAGE, SHARED)
    assert result.changed_bytes == PAGE
    assert "the observer failed" in caplog.text


def test_a_closed_block_takes_no_change(guest: Guest) -> None:
    guest.block.close()
    on_the_block = set(CHANGES) - {"convert", "map", "unmap", "attach", "detach", "close"}
    for name in sorted(on_the_block):
        with pytest.raises(UsageError, match="closed"):
            CHANGES[name](guest)
    with pytest.raises(UsageError, match="closed"):
        guest.memory.map(guest.block, 0)
    guest.block.close()
