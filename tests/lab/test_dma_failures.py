"""
What fails in a real kernel while a guest converts: each time the memory is put back or poisoned,
and never is a device left with a page that is private.

The device itself says what it reaches. The rule, whatever happened: a page that it reaches is
shared, or is named in doubt.
"""

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab_devices import BASE, Rig, Way, open_rig
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import DmaCapabilities, DmaTarget, HostRange, Type1Container
from ramblock.errors import ConversionError, DmaError, PoisonedError
from ramblock.hostmem.backing import AnonymousBacking
from ramblock.units import MIB, PAGE_SIZE

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
PAGES = 16
MEMLOCK_LIMIT = MIB
# include/uapi/linux/prctl.h, capability.h
_PR_CAPBSET_DROP = 24
_CAP_IPC_LOCK = 14


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", PAGES * PAGE_SIZE, private="stand-in") as block:
        yield block


@pytest.fixture
def memory(block: RamBlock) -> GuestMemory:
    memory = GuestMemory()
    memory.map(block, BASE)
    return memory


@pytest.fixture
def foreign() -> Iterator[AnonymousBacking]:
    """Memory that is somebody else's."""
    backing = AnonymousBacking(PAGES * PAGE_SIZE)
    yield backing
    backing.close()


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


def shared_pages(memory: GuestMemory) -> set[int]:
    return {page for page in range(PAGES) if memory.state(at(page)) is SHARED}


def doubtful_pages(memory: GuestMemory) -> set[int]:
    return {
        page
        for page in range(PAGES)
        if any(gpa <= at(page) < gpa + size for gpa, size, _ in memory.in_doubt())
    }


def check_nothing_is_stale(
    rig: Rig, memory: GuestMemory, *, foreign: frozenset[int] = frozenset()
) -> set[int]:
    reached = rig.reached(PAGES)
    assert reached - foreign <= shared_pages(memory) | doubtful_pages(memory)
    return reached


class Meddling:
    """A target that does something else before a chosen call."""

    def __init__(
        self, inner: DmaTarget, verb: str, number: int, then: Callable[[], object]
    ) -> None:
        self.inner = inner
        self.verb, self.left, self.then = verb, number, then

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.inner.capabilities

    def _meddle(self, verb: str) -> None:
        if verb == self.verb:
            self.left -= 1
            if self.left == 0:
                self.then()

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        self._meddle("map")
        self.inner.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        self._meddle("unmap")
        return self.inner.unmap(iova, size)

    def close(self) -> None:
        self.inner.close()


# -- somebody else's mapping in the way ------------------------------------------------------------


def test_a_mapping_in_the_way_puts_the_conversion_back(
    rig: Rig, memory: GuestMemory, foreign: AnonymousBacking
) -> None:
    memory.attach(rig.target)
    rig.target.map(at(5), HostRange(None, 0, foreign.address, PAGE_SIZE))
    with pytest.raises(ConversionError) as caught:
        memory.convert(at(2), 6 * PAGE_SIZE, SHARED)
    assert caught.value.rolled_back
    assert caught.value.step == "map"
    cause = caught.value.__cause__
    assert isinstance(cause, DmaError)
    assert cause.errno == errno.EEXIST
    assert (memory.poisoned, shared_pages(memory)) == (False, set())
    # Only what somebody else has mapped, to memory that is somebody else's.
    assert rig.reached(PAGES) == {5}
    assert foreign.read(0, 4) == rig.testdev.pattern(4)
    rig.target.unmap(at(5), PAGE_SIZE)
    memory.convert(at(2), 6 * PAGE_SIZE, SHARED)
    assert rig.reached(PAGES) == {2, 3, 4, 5, 6, 7}


def test_a_mapping_that_somebody_removed(rig: Rig, memory: GuestMemory, block: RamBlock) -> None:
    """
    To private, one page fewer is removed than the books say: what that means is not known, so
    nothing is freed.
    """
    memory.attach(rig.target)
    memory.convert(BASE, 8 * PAGE_SIZE, SHARED)
    block.write(0, bytes([7]) * 8 * PAGE_SIZE)
    rig.target.unmap(at(3), PAGE_SIZE)
    with pytest.raises(ConversionError) as caught:
        memory.convert(BASE, 8 * PAGE_SIZE, PRIVATE)
    if rig.way is Way.NATIVE:
        # ENOENT for that one page, which is a refusal: the others are mapped again.
        assert caught.value.rolled_back
        assert rig.reached(PAGES) == {0, 1, 2, 4, 5, 6, 7}
    else:
        assert isinstance(caught.value, PoisonedError)
        assert doubtful_pages(memory) == set(range(8))
    assert shared_pages(memory) == set(range(8))
    check_nothing_is_stale(rig, memory)
    assert block.read(7 * PAGE_SIZE + 100, 1) == b"\7"


class AsIfInexact(Meddling):
    """A native address space that is asked to unmap several mappings in one call."""

    def __init__(self, inner: DmaTarget) -> None:
        super().__init__(inner, "never", 0, lambda: None)

    @property
    def capabilities(self) -> DmaCapabilities:
        return DmaCapabilities(iova_ranges=self.inner.capabilities.iova_ranges)


def test_half_an_unmap_is_poison(
    memory: GuestMemory, block: RamBlock, foreign: AnonymousBacking
) -> None:
    """
    IOMMU_IOAS_UNMAP removes three areas, then meets one that sticks out: ENOENT, and no word of the
    three.
    """
    with open_rig(Way.NATIVE) as rig:
        memory.attach(AsIfInexact(rig.target))
        memory.convert(BASE, 4 * PAGE_SIZE, SHARED)
        block.write(3 * PAGE_SIZE, b"kept")
        rig.target.unmap(at(3), PAGE_SIZE)
        rig.target.map(at(3), HostRange(None, 0, foreign.address, 2 * PAGE_SIZE))
        with pytest.raises(PoisonedError):
            memory.convert(BASE, 4 * PAGE_SIZE, PRIVATE)
        assert memory.poisoned
        assert 3 in doubtful_pages(memory)
        assert block.read(3 * PAGE_SIZE, 4) == b"kept"
        check_nothing_is_stale(rig, memory, foreign=frozenset({3, 4}))
        with pytest.raises(PoisonedError):
            memory.convert(BASE, PAGE_SIZE, PRIVATE)


def test_the_same_is_put_back_when_mappings_are_named_one_by_one(
    memory: GuestMemory, foreign: AnonymousBacking
) -> None:
    with open_rig(Way.NATIVE) as rig:
        memory.attach(rig.target)
        memory.convert(BASE, 4 * PAGE_SIZE, SHARED)
        rig.target.unmap(at(3), PAGE_SIZE)
        rig.target.map(at(3), HostRange(None, 0, foreign.address, 2 * PAGE_SIZE))
        with pytest.raises(ConversionError):
            memory.convert(BASE, 4 * PAGE_SIZE, PRIVATE)
        assert not memory.poisoned
        assert check_nothing_is_stale(rig, memory, foreign=frozenset({3, 4})) == {0, 1, 2, 3, 4}
        rig.target.unmap(at(3), 2 * PAGE_SIZE)


# -- Ctrl-C ----------------------------------------------------------------------------------------


class Interrupted:
    """A target in one of whose calls Ctrl-C comes, before or after the kernel has done it."""

    def __init__(self, inner: DmaTarget, verb: str, number: int, *, done: bool) -> None:
        self.inner = inner
        self.verb, self.left, self.done = verb, number, done

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.inner.capabilities

    def _is_now(self, verb: str) -> bool:
        self.left -= verb == self.verb
        return verb == self.verb and self.left == 0

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        now = self._is_now("map")
        if not now or self.done:
            self.inner.map(iova, memory, writable=writable)
        if now:
            raise KeyboardInterrupt

    def unmap(self, iova: int, size: int) -> int:
        now = self._is_now("unmap")
        removed = self.inner.unmap(iova, size) if not now or self.done else 0
        if now:
            raise KeyboardInterrupt
        return removed

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("to", [SHARED, PRIVATE])
def test_ctrl_c_in_a_call_is_put_back(
    rig: Rig, memory: GuestMemory, to: PageState, *, done: bool
) -> None:
    """
    The mapper finds out what happened by asking the kernel: what it answers to that is what is
    tested.
    """
    several = (rig.way is Way.NATIVE) if to is PRIVATE else rig.way is not Way.CUTTING
    for number in (1, 2) if several else (1,):
        memory.convert(BASE, 4 * PAGE_SIZE, PRIVATE if to is SHARED else SHARED)
        before = shared_pages(memory)
        target = Interrupted(rig.target, "never", 0, done=done)
        mapper = memory.attach(target)
        target.verb, target.left = ("map" if to is SHARED else "unmap"), number
        with pytest.raises(KeyboardInterrupt):
            memory.convert(BASE, 4 * PAGE_SIZE, to)
        assert not memory.poisoned
        assert rig.reached(PAGES) == shared_pages(memory) == before
        memory.convert(BASE, 4 * PAGE_SIZE, to)
        assert rig.reached(PAGES) == shared_pages(memory) == set(range(4) if to is SHARED else ())
        memory.detach(mapper)


# -- RLIMIT_MEMLOCK --------------------------------------------------------------------------------


def _without_ipc_lock() -> None:
    if ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_IPC_LOCK, 0, 0, 0):
        os._exit(99)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_LIMIT, MEMLOCK_LIMIT))


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
def test_too_little_may_be_locked(way: Way) -> None:
    tests = Path(__file__).parents[1]
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memlock_child.py")), way.value],
        env={**os.environ, "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"},
        preexec_fn=_without_ipc_lock,  # no other thread runs here
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr


# -- a device that goes ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["map", "unmap"])
def test_a_device_that_is_detached_in_the_middle(rig: Rig, memory: GuestMemory, verb: str) -> None:
    device = rig.testdev.device

    def go() -> None:
        if rig.way is Way.TYPE1:
            device.close()
        else:
            device.detach()

    number = 1 if rig.way is Way.CUTTING or verb == "unmap" else 3
    memory.attach(Meddling(rig.target, verb, number, go))
    memory.convert(BASE, 8 * PAGE_SIZE, SHARED)
    memory.convert(BASE, 4 * PAGE_SIZE, PRIVATE)
    # What is mapped is a matter between us and the address space; the device finds it when it comes
    # back.
    assert (memory.poisoned, shared_pages(memory)) == (False, {4, 5, 6, 7})
    if rig.way is Way.TYPE1:
        rig.reopen_testdev()
    else:
        device.attach()
    assert rig.reached(PAGES) == {4, 5, 6, 7}
    memory.convert(BASE + 4 * PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE)
    assert rig.reached(PAGES) == {6, 7}


@pytest.mark.parametrize("to", [SHARED, PRIVATE])
def test_a_group_that_leaves_its_container_in_the_middle(
    memory: GuestMemory, to: PageState
) -> None:
    """The container has no IOMMU then, and the kernel drops all of its mappings."""
    with open_rig(Way.TYPE1) as rig:
        target = rig.target
        assert isinstance(target, Type1Container)
        [group] = target.groups

        def go() -> None:
            rig.testdev.device.close()
            group.unset_container()

        memory.attach(
            Meddling(target, "map" if to is SHARED else "unmap", 13 if to is SHARED else 1, go)
        )
        memory.convert(BASE, 10 * PAGE_SIZE, SHARED)
        first = 10 if to is SHARED else 0
        with pytest.raises(ConversionError) as caught:
            memory.convert(at(first), 4 * PAGE_SIZE, to)
        # To private, EINVAL has removed nothing. To shared, what was mapped cannot be unmapped for
        # certain any more.
        assert isinstance(caught.value, PoisonedError) == (to is SHARED)
        assert shared_pages(memory) - doubtful_pages(memory) == set(range(10))
        # Nor does the kernel say that all is gone.
        with pytest.raises(DmaError):
            target.close()
    with open_rig(Way.TYPE1) as rig:
        assert rig.reached(PAGES) == set()


# -- a descriptor that goes ------------------------------------------------------------------------


@pytest.mark.parametrize("to", [SHARED, PRIVATE])
def test_a_target_that_is_closed_in_the_middle(
    rig: Rig, memory: GuestMemory, to: PageState
) -> None:
    number = 2 if to is SHARED and rig.way is not Way.CUTTING else 1
    memory.convert(BASE, 8 * PAGE_SIZE, PRIVATE if to is SHARED else SHARED)
    memory.attach(
        Meddling(rig.target, "map" if to is SHARED else "unmap", number, rig.target.close)
    )
    before = shared_pages(memory)
    with pytest.raises(ConversionError) as caught:
        memory.convert(BASE, 8 * PAGE_SIZE, to)
    cause = caught.value.__cause__
    assert cause is not None
    if caught.value.rolled_back:
        assert not memory.poisoned
        assert shared_pages(memory) == before
    else:
        # One page was mapped, and whether it still is cannot be asked any more.
        assert to is SHARED
        assert rig.way is not Way.CUTTING
        assert memory.poisoned
    # Closing has unmapped everything.
    assert check_nothing_is_stale(rig, memory) == set()


@pytest.mark.parametrize("to", [SHARED, PRIVATE])
def test_a_descriptor_that_somebody_closed(
    rig: Rig, memory: GuestMemory, block: RamBlock, to: PageState
) -> None:
    """
    What was mapped stays so in the kernel: the device's own descriptor keeps its address space.
    """
    target = rig.target
    fd = target.fileno()
    kept, null = os.dup(fd), os.open(os.devnull, os.O_RDWR)
    if to is PRIVATE:
        memory.convert(BASE, 8 * PAGE_SIZE, SHARED)
    number = 3 if to is SHARED and rig.way is not Way.CUTTING else 1
    mapper = memory.attach(
        Meddling(
            target,
            "map" if to is SHARED else "unmap",
            number,
            lambda: os.dup2(null, fd, inheritable=False),
        )
    )
    try:
        with pytest.raises(ConversionError) as caught:
            memory.convert(BASE, 8 * PAGE_SIZE, to)
        reached = check_nothing_is_stale(rig, memory)
        if to is PRIVATE:
            assert caught.value.rolled_back
            assert reached == shared_pages(memory) == set(range(8))
            assert block.read(0, 4) == rig.testdev.pattern(4)
        elif rig.way is Way.CUTTING:
            assert caught.value.rolled_back
            assert reached == set()
        else:
            # Two pages were mapped and could not be unmapped, so that all of the range has to stay
            # shared.
            assert isinstance(caught.value, PoisonedError)
            assert reached == {0, 1}
            assert shared_pages(memory) == doubtful_pages(memory) == set(range(8))
    finally:
        os.dup2(kept, fd, inheritable=False)
        os.close(kept)
        os.close(null)
    # What only takes away still works.
    memory.detach(mapper)
    assert rig.reached(PAGES) == set()


def test_what_is_in_doubt_is_taken_away_in_the_end(rig: Rig, memory: GuestMemory) -> None:
    mapper = memory.attach(rig.target)
    memory.convert(BASE, 4 * PAGE_SIZE, SHARED)
    rig.target.unmap(at(1), PAGE_SIZE)
    with pytest.raises(ConversionError):
        memory.convert(BASE, 4 * PAGE_SIZE, PRIVATE)
    if memory.poisoned:
        memory.detach(mapper)
    else:
        # A target that wants each mapping named says that this one is not there, and the mapper
        # cannot let go of it.
        assert rig.way is Way.NATIVE
        with pytest.raises(DmaError, match="nothing is mapped there"):
            memory.detach(mapper)
        rig.target.close()
    assert rig.reached(PAGES) == set()
