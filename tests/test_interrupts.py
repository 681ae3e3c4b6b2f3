"""
Interrupts wait: a signal that comes during an operation is handled when the operation has ended.

The first half is about `ramblock.interrupts` alone. The second half sends real SIGINTs, several in
a millisecond and from
another process, while the main thread converts; RAMBLOCK_INTERRUPT_SECONDS makes it longer than its
few seconds.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

from ramblock import GuestMemory, PageState, RamBlock, VirtioMem, interrupts
from ramblock.dma import HostRange, SoftIommu
from ramblock.errors import ConversionError
from ramblock.interrupts import hand_over, uninterrupted
from ramblock.testing import FaultyTarget
from ramblock.units import PAGE_SIZE
from vfio_user_server import RemoteIommu

P = PAGE_SIZE
SECONDS = float(os.environ.get("RAMBLOCK_INTERRUPT_SECONDS", "3"))
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


@contextmanager
def handler(number: int, handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def strike(number: int = signal.SIGINT) -> None:
    signal.raise_signal(number)


# -- alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_work(number: int) -> None:
    order: list[str] = []

    def work() -> str:
        order.append("begin")
        strike(number)
        order.append("end")
        return "result"

    with handler(number, lambda *_: order.append("handled")):
        assert uninterrupted(work) == "result"
    assert order == ["begin", "end", "handled"]


def test_an_interrupt_raises_behind_the_work_and_once() -> None:
    done = False

    def work() -> None:
        nonlocal done
        strike()
        done = True

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work)
    assert done
    assert uninterrupted(int) == 0  # nothing is left waiting


def test_the_error_of_the_work_is_the_context_of_an_interrupt() -> None:
    def work() -> None:
        strike()
        raise RuntimeError("its own")

    with pytest.raises(KeyboardInterrupt) as caught:
        uninterrupted(work)
    assert isinstance(caught.value.__context__, RuntimeError)


@pytest.mark.parametrize("fails", [False, True])
def test_no_signal_is_lost_and_none_keeps_another_from_its_handler(fails: bool) -> None:
    handled: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        handled.append(number)
        raise KeyboardInterrupt(len(handled))

    def work() -> None:
        strike()
        strike(signal.SIGTERM)
        strike()
        if fails:
            raise RuntimeError("its own")

    with (
        handler(signal.SIGINT, handle),
        handler(signal.SIGTERM, handle),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        uninterrupted(work)
    assert handled == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    chain: list[object] = []
    error: BaseException | None = caught.value
    while error is not None:
        chain += error.args
        error = error.__context__
    assert chain == [3, 2, 1, *(["its own"] if fails else [])]


def test_signals_are_handled_in_the_order_in_which_they_came() -> None:
    came = [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    handled: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        handled.append(number)

    def work() -> None:
        for number in came:
            strike(number)

    with handler(signal.SIGINT, handle), handler(signal.SIGTERM, handle):
        uninterrupted(work)
    assert handled == came


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(number: int) -> None:
    def mine(*_: object) -> None: ...

    with handler(number, mine):
        uninterrupted(int)
        assert signal.getsignal(number) is mine
        with suppress(RuntimeError):
            uninterrupted(lambda: (_ for _ in ()).throw(RuntimeError))
        assert signal.getsignal(number) is mine


@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_disposition_that_raises_nothing_stays(disposition: signal.Handlers) -> None:
    with handler(signal.SIGINT, disposition):  # type: ignore[arg-type]
        seen = uninterrupted(lambda: signal.getsignal(signal.SIGINT))
        assert seen is disposition


def test_nested_work_hands_over_at_the_outer_end() -> None:
    order: list[str] = []

    def outer() -> None:
        uninterrupted(strike)
        order.append("outer ends")

    with handler(signal.SIGINT, lambda *_: order.append("handled")):
        uninterrupted(outer)
    assert order == ["outer ends", "handled"]


def test_work_inside_other_work_is_not_left_in_the_middle() -> None:
    order: list[str] = []

    def inner() -> None:
        strike()
        hand_over()
        order.append("inner ends")

    def outer() -> None:
        uninterrupted(inner)
        order.append("outer ends")

    with handler(signal.SIGINT, lambda *_: order.append("handled")):
        uninterrupted(outer)
    assert order == ["inner ends", "outer ends", "handled"]


def test_work_that_can_be_left_hands_over_in_the_middle() -> None:
    reached: list[str] = []

    def work() -> None:
        try:
            strike()
            reached.append("before")
            hand_over()
            reached.append("behind")
        finally:
            strike()
            reached.append("undone")  # the undo is not interrupted either

    with pytest.raises(KeyboardInterrupt) as caught:
        uninterrupted(work)
    assert reached == ["before", "undone"]
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    hand_over()  # nothing waits, and nobody holds anything back


def test_other_threads_leave_handlers_alone() -> None:
    seen: list[object] = []
    thread = threading.Thread(
        target=lambda: uninterrupted(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    )
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_handler_that_was_left_in_place_passes_signals_on() -> None:
    """
    Putting handlers back can be struck in between; the one that stays must not swallow anything.
    """
    handled: list[int] = []

    def mine(number: int, _: FrameType | None) -> None:
        handled.append(number)

    with handler(signal.SIGINT, mine):
        uninterrupted(int)
        signal.signal(signal.SIGINT, interrupts._note)
        strike()
        assert handled == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is mine
        signal.signal(signal.SIGINT, interrupts._note)
        uninterrupted(strike)  # an operation copes with it too
        assert handled == [signal.SIGINT] * 2
        assert signal.getsignal(signal.SIGINT) is mine


def test_a_handler_that_sets_another_one_is_obeyed() -> None:
    # The usual idiom: the first Ctrl-C asks to stop, the second one ends the process.
    def another(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)

    with handler(signal.SIGINT, another):
        uninterrupted(strike)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_fork_of_another_thread_during_work_gets_its_signals() -> None:
    told: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            try:
                strike()
                for _ in range(1000):
                    time.sleep(0.001)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(1)
        told.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def work() -> None:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()

    with handler(signal.SIGINT, signal.default_int_handler):
        uninterrupted(work)
    assert told == [7]


HANGS = """
import signal, sys, threading, time
from ramblock import interrupts
interrupts.PATIENCE_SECONDS = 0.3
def hang():
    print("in it", flush=True)
    while True:
        time.sleep(0.05)  # as a target that never answers
interrupts.uninterrupted(hang)
"""


def test_an_operation_that_never_ends_can_be_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in it\n"
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert child.poll() is None  # the first one waits
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
    child.stdout.close()
    assert child.wait() == -signal.SIGINT


# -- operations


class StrikingTarget(FaultyTarget):
    """Ctrl-C comes in the middle of each call of a target, until it is calm."""

    calm = False

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if not self.calm:
            strike()
        super().map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        if not self.calm:
            strike()
        return super().unmap(iova, size)


@pytest.fixture
def guest() -> Iterator[tuple[GuestMemory, RamBlock]]:
    memory = GuestMemory()
    with RamBlock.create("ram", 16 * P, private="stand-in") as block:
        memory.map(block, 0)
        yield memory, block


def test_a_conversion_is_done_when_the_interrupt_comes(
    guest: tuple[GuestMemory, RamBlock],
) -> None:
    memory, _ = guest
    iommu = SoftIommu()
    target = StrikingTarget(iommu)
    memory.attach(target)
    with pytest.raises(KeyboardInterrupt):
        memory.convert(0, 4 * P, SHARED)
    assert list(memory.ranges(SHARED)) == [(0, 4 * P)]
    assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(0, 4 * P)]
    with pytest.raises(KeyboardInterrupt):
        memory.convert(0, P, PRIVATE)
    assert list(memory.ranges(SHARED)) == [(P, 3 * P)]
    assert not memory.poisoned
    target.calm = True


def test_a_conversion_that_fails_is_put_back_before_the_interrupt(
    guest: tuple[GuestMemory, RamBlock],
) -> None:
    memory, _ = guest
    memory.attach(StrikingTarget(SoftIommu(), fail_map=(1,)))
    with pytest.raises(KeyboardInterrupt) as caught:
        memory.convert(0, 4 * P, SHARED)
    assert isinstance(caught.value.__context__, ConversionError)
    assert list(memory.ranges(SHARED)) == []
    assert not memory.poisoned


def test_attaching_is_left_between_batches_and_undone(guest: tuple[GuestMemory, RamBlock]) -> None:
    memory, block = guest
    big = RamBlock.create("big", 4096 * P, private="stand-in")
    with big:
        memory.map(big, 1 << 30)
        memory.convert(1 << 30, 4096 * P, SHARED)
        iommu = SoftIommu(cut=False)
        target = StrikingTarget(iommu)
        with pytest.raises(KeyboardInterrupt):
            memory.attach(target)
        target.calm = True
        assert 0 < target.map_calls < 4096
        assert iommu.mappings() == []
        assert memory.mappers == ()
        assert not memory.poisoned
        assert memory.discards.holds == tuple(
            hold for each in (block, big) for hold in each.discard_manager.holds
        )


# -- a storm of real signals
# ------------------------------------------------------------------------------------------

SENDER = """
import os, sys, time
pid, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
sent = 0
while time.monotonic() < end:
    os.kill(pid, 2)
    sent += 1
    time.sleep(0.0002)
print(sent)
"""


class Storm:
    """Counts every interrupt when its handler is called, and when it is caught."""

    def __init__(self) -> None:
        self.guard: object = None
        self.raised: list[KeyboardInterrupt] = []
        self.caught: set[int] = set()
        self.inside = 0
        self.unraisable: list[Any] = []

    def handle(self, _: int, __: FrameType | None) -> None:
        self.inside += self.guard._owner is not None  # type: ignore[attr-defined]
        error = KeyboardInterrupt()
        self.raised.append(error)
        raise error

    def catch(self, error: BaseException | None) -> None:
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                self.caught.add(id(error))
            error = error.__context__


def _ride_out(storm: Storm, work: Callable[[], object], depth: int = 6) -> None:
    """
    Call *work* again and again until it says that the storm has passed.

    An interrupt strikes in here as well, where a loop jumps back: each level catches those of the
    one inside it.
    """
    while True:
        try:
            if depth:
                _ride_out(storm, work, depth - 1)
                return
            if work():
                return
        except KeyboardInterrupt as error:
            storm.catch(error)


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> Storm:
    storm = Storm()
    # An interrupt in a finalizer, between operations, has nowhere else to go. No Python function:
    # that would be interrupted as well, and what is raised in the hook is gone.
    monkeypatch.setattr(sys, "unraisablehook", storm.unraisable.append)
    return storm


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kind", [SoftIommu, RemoteIommu])
def test_a_storm_of_real_signals(kind: type[SoftIommu | RemoteIommu], storm: Storm) -> None:
    numbers = random.Random(4)
    iommus = (kind(), SoftIommu(exact=True))
    memory = GuestMemory()
    block = RamBlock.create("ram", 64 * P, private="stand-in")
    memory.map(block, 0)
    device = VirtioMem(block, 4 * P)
    device.plug(0, 48 * P)
    for iommu in iommus:
        memory.attach(iommu)
    storm.guard = block.guard
    converted = 0
    end = time.monotonic() + SECONDS + 0.5

    def work() -> bool:
        nonlocal converted
        while time.monotonic() < end:
            gpa, size = numbers.randrange(60) * P, numbers.randrange(1, 5) * P
            memory.convert(gpa, size, numbers.choice((SHARED, PRIVATE)))
            converted += 1
            if converted % 16 == 0:
                there = device.is_populated(44 * P, 4 * P)
                (device.unplug if there else device.plug)(44 * P, 4 * P)
            if converted % 64 == 0:
                mapper = memory.mappers[0]
                memory.detach(mapper)
                memory.attach(mapper.target)
        return True

    def settle() -> bool:
        # An interrupt may have come between two of the operations above.
        if not device.is_populated(44 * P, 4 * P):
            device.plug(44 * P, 4 * P)
        for iommu in iommus:
            if all(mapper.target is not iommu for mapper in memory.mappers):
                memory.attach(iommu)
        return True

    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(os.getpid()), str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sender.stdin is not None
    assert sender.stdout is not None
    assert sender.stdout.readline() == "ready\n"
    begun = sent = 0
    failures: list[Exception] = []

    def everything() -> bool:
        nonlocal begun, sent
        if not begun:
            begun = 1
            os.write(sender.stdin.fileno(), b"go\n")  # type: ignore[union-attr]
        try:
            settle()
            work()
            settle()
            sent = sent or int(os.read(sender.stdout.fileno(), 100))  # type: ignore[union-attr]
        except Exception as error:
            sender.kill()
            failures.append(error)
        return True

    with handler(signal.SIGINT, storm.handle):
        _ride_out(storm, everything)
    sender.stdin.close()
    sender.stdout.close()
    sender.wait()
    sys.stderr.write(
        f"{sent} signals sent, {len(storm.raised)} handled, {converted} conversions without one\n"
    )
    assert failures == []
    assert len(storm.raised) > 50 * SECONDS
    assert converted > 100
    # Each was raised once, outside of every operation, and reached us.
    assert storm.inside == 0
    for told in storm.unraisable:
        storm.catch(told.exc_value)
    assert storm.caught == {id(error) for error in storm.raised}
    assert not memory.poisoned
    shared = {page for gpa, size in memory.ranges(SHARED) for page in range(gpa, gpa + size, P)}
    plugged = {page for gpa, size in device.ranges(0, 64 * P) for page in range(gpa, gpa + size, P)}
    for iommu in iommus:
        mapped = {
            page
            for entry in iommu.mappings()
            for page in range(entry.iova, entry.iova + entry.size, P)
        }
        assert mapped == shared & plugged
    for mapper in memory.mappers:
        assert mapper.mapped_bytes == len(shared & plugged) * P
        target = next(iommu for iommu in iommus if iommu is mapper.target)
        assert mapper.entries == len(target.mappings())
    # The lock is free, for another thread too.
    thread = threading.Thread(target=memory.convert, args=(0, P, PRIVATE), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    block.close()
    for iommu in iommus:
        iommu.close()
