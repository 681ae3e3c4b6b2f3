"""
Ctrl-C at every point where it can strike.

CPython delivers signals at function entry, at backward jumps, and when a function in C has returned
(ceval.c, CHECK_EVAL_BREAKER). The first half of this file raises KeyboardInterrupt at each such
point of our code in turn, by tracing and profiling; the second half uses real signals at random
moments. Whatever is interrupted, nothing may be stale or missing, no lock may stay taken, and the
next call must work; or it is poisoned.
"""

from __future__ import annotations

import dis
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

import ramblock
from ramblock import GuestMemory, PageState, RamBlock, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import PoisonedError
from ramblock.testing import SimulatedInPlace
from ramblock.units import PAGE_SIZE
from vfio_user_server import RemoteIommu

# A generator that is closed early is our code too, and what is raised there goes to nobody.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

P = PAGE_SIZE
_PACKAGE = os.path.dirname(ramblock.__file__)  # noqa: PTH120 - compared with what frames say
# The IOMMU's own atomicity is what the real signals below test; the kit is not ours to interrupt.
_NOT_INTERRUPTED = ("testing", "soft.py", "mapping_table.py")
_BACKWARD = {number for name, number in dis.opmap.items() if "BACKWARD" in name}


class Interrupter:
    """Raises KeyboardInterrupt at the points with the given numbers, counted from 1."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.points = 0

    def _hit(self) -> None:
        self.points += 1
        if self.points in self.numbers:
            raise KeyboardInterrupt

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not self._is_ours(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self._hit()
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] in _BACKWARD:
            self._hit()
        return self._inside

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_return" and self._is_ours(frame):
            self._hit()

    @staticmethod
    def _is_ours(frame: FrameType) -> bool:
        name = frame.f_code.co_filename
        return name.startswith(_PACKAGE) and not any(part in name for part in _NOT_INTERRUPTED)

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()  # that of a measurement of coverage, for instance
        sys.setprofile(self._called)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        sys.setprofile(None)


class Vm:
    """Attributes as a set of private pages."""

    def __init__(self) -> None:
        self.private: set[int] = set()

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        pages = range(gpa, gpa + size, P)
        if private:
            self.private.update(pages)
        else:
            self.private.difference_update(pages)


class World:
    """Two blocks, one with virtio-mem, the other perhaps in place, under IOMMUs."""

    def __init__(self, *iommus: SoftIommu | RemoteIommu, in_place: bool = False) -> None:
        self.vm = Vm()
        self.memory = GuestMemory(self.vm)
        self.one = RamBlock.create("one", 16 * P, private="stand-in")
        self.both: SimulatedInPlace | None = None
        if in_place:
            self.both = SimulatedInPlace("two", 8 * P, pinned_by=iommus)
        self.two = RamBlock.create("two", 8 * P, private=self.both or "stand-in")
        self.memory.map(self.one, 0)
        self.section = self.memory.map(self.two, 16 * P)
        self.virtio_mem = VirtioMem(self.one, 2 * P)
        self.virtio_mem.plug(0, 12 * P)
        self.iommus = iommus
        self.mappers = [self.memory.attach(iommu) for iommu in iommus]
        for page in (0, 2, 5, 14, 17):
            self.memory.convert(page * P, P, PageState.SHARED)

    def close(self) -> None:
        self.one.close()
        self.two.close()
        for iommu in self.iommus:
            iommu.close()

    def problem(self) -> str | None:
        """What is wrong, if anything is; being poisoned is not wrong."""
        for block in (self.one, self.two):
            if not _lock_is_free(block):
                return "the lock is still taken"
        if self.memory.poisoned or self.two.guard.poisoned:
            return None
        populated = set[int]()
        for section in self.memory.sections:
            for run in section.block.discard_manager.populated(section):
                populated.update(range(run.gpa, run.gpa_end, P))
        for mapper in self.memory.mappers:
            iommu = next(iommu for iommu in self.iommus if iommu is mapper.target)
            mapped = {
                page
                for mapping in iommu.mappings()
                for page in range(mapping.iova, mapping.iova + mapping.size, P)
            }
            stale = mapped & (self.vm.private | self._private_in_place())
            if stale:
                return f"stale: {sorted(map(hex, stale))}"
            if mapped != populated:
                return f"mapped {sorted(map(hex, mapped))}, populated {sorted(map(hex, populated))}"
            if mapper.entries != len(iommu.mappings()):
                return f"{mapper.entries} entries counted, {len(iommu.mappings())} are there"
        return None

    def _private_in_place(self) -> set[int]:
        if self.both is None or self.section not in self.memory.sections:
            return set()
        return {
            self.section.gpa + page
            for offset, size in self.both.private_ranges()
            for page in range(offset, offset + size, P)
        }


def _lock_is_free(block: RamBlock) -> bool:
    """Ask on another thread, where a lock that was kept would block."""
    asked = threading.Event()

    def ask() -> None:
        block.guard.run("asking", asked.set, even_poisoned=True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    return asked.is_set()


OPERATIONS: dict[str, Callable[[World], object]] = {
    "to private": lambda world: world.memory.convert(0, 20 * P, PageState.PRIVATE),
    "to shared": lambda world: world.memory.convert(0, 20 * P, PageState.SHARED),
    "plug": lambda world: world.virtio_mem.plug(12 * P, 4 * P),
    "unplug": lambda world: world.virtio_mem.unplug(0, 6 * P),
    "unplug all": lambda world: world.virtio_mem.unplug_all(),
    "attach": lambda world: world.memory.attach(world.iommus[-1]),
    "detach": lambda world: world.memory.detach(world.mappers[0]),
    "unmap": lambda world: world.memory.unmap(world.section),
    "remove source": lambda world: world.one.discard_manager.remove_source(world.virtio_mem),
    "new virtio-mem": lambda world: VirtioMem(world.two, 2 * P),
    "to private, in place": lambda world: world.memory.convert(0, 20 * P, PageState.PRIVATE),
    "to shared, in place": lambda world: world.memory.convert(0, 20 * P, PageState.SHARED),
    "unmap, in place": lambda world: world.memory.unmap(world.section),
    "new virtio-mem, in place": lambda world: VirtioMem(world.two, 2 * P),
    "close": lambda world: world.two.close(),
    "to private, over a socket": lambda world: world.memory.convert(0, 3 * P, PageState.PRIVATE),
    "to shared, over a socket": lambda world: world.memory.convert(0, 3 * P, PageState.SHARED),
}


def _world(operation: str) -> World:
    exact = RemoteIommu() if "socket" in operation else SoftIommu(exact=True)
    world = World(SoftIommu(), exact, in_place="in place" in operation)
    if operation == "attach":
        world.memory.detach(world.mappers.pop())
    return world


def _interrupt(operation: str, *numbers: int) -> tuple[World, int]:
    world = _world(operation)
    with suppress(KeyboardInterrupt, PoisonedError), Interrupter(*numbers) as interrupter:
        OPERATIONS[operation](world)
    return world, interrupter.points


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_interrupt_anywhere(operation: str) -> None:
    points = 0
    poisoned = 0
    while True:
        world, seen = _interrupt(operation, points + 1)
        assert world.problem() is None, f"{operation}, point {points + 1}"
        poisoned += world.memory.poisoned
        if (
            not world.memory.poisoned
            and not world.two.closed
            and world.section in world.memory.sections
        ):
            world.memory.convert(16 * P, 2 * P, PageState.SHARED)
            world.memory.convert(16 * P, 2 * P, PageState.PRIVATE)
            assert world.problem() is None, (
                f"{operation}, point {points + 1}, and then a conversion"
            )
        world.close()
        if seen <= points:
            break
        points += 1
    assert points > 50
    assert poisoned == 0, "a single Ctrl-C can always be put back"


@pytest.mark.parametrize(
    "operation", ["to private", "to shared", "to private, in place", "to shared, in place"]
)
def test_two_interrupts_anywhere(operation: str) -> None:
    """The second one strikes in the undo of the first: it may poison, but nothing is stale."""
    _, points = _interrupt(operation)
    numbers = random.Random(operation)
    for _ in range(500):
        first = numbers.randint(1, points)
        second = first + numbers.randint(1, 60)
        world, _ = _interrupt(operation, first, second)
        assert world.problem() is None, f"{operation}, points {first} and {second}"
        world.close()


@pytest.mark.parametrize("kind", [SoftIommu, RemoteIommu])
def test_real_signals_at_random_moments(kind: type[SoftIommu | RemoteIommu]) -> None:
    """SIGALRM while converting: the IOMMU is interrupted too, in the middle of its own work."""
    numbers = random.Random(4)
    seconds = float(os.environ.get("RAMBLOCK_INTERRUPT_SECONDS", "5"))
    interrupted = 0
    world = World(kind())

    def strike(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(int(seconds * 3000)):
            gpa, size = numbers.randrange(12) * P, numbers.randrange(1, 5) * P
            to = numbers.choice(list(PageState))
            try:
                signal.setitimer(signal.ITIMER_REAL, numbers.uniform(1e-6, 150e-6))
                world.memory.convert(gpa, size, to)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                while True:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        break
                    except KeyboardInterrupt:
                        continue
            assert not world.memory.poisoned
            if interrupted % 50 == 0:
                assert world.problem() is None
        assert world.problem() is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    world.close()
