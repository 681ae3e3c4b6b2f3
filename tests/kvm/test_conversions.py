"""What a guest is told, and that a refusal changes nothing."""

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE, RecordingVm
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import PoisonedError, UsageError
from ramblock.kvm import (
    GuestConversions,
    HypercallExit,
    HypercallResult,
    MemoryFaultExit,
    StuckGuestError,
    StuckReason,
)
from ramblock.kvm.exits import EHWPOISON
from ramblock.testing import FaultyTarget, SimulatedInPlace

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
DONE, EINVAL, EAGAIN = HypercallResult.DONE, HypercallResult.EINVAL, HypercallResult.EAGAIN

PAGES = 8
FIRST, SECOND = 0x10_0000, 0x10_0000 + PAGES * PAGE  # two confidential blocks, side by side
ROM = 0x20_0000  # ordinary RAM
HOLE = 0x30_0000

words = st.integers(0, (1 << 64) - 1)
# Near what is there, where most of what can go wrong is.
pages_nearby = st.builds(
    lambda start, page: start + page * PAGE,
    st.sampled_from([0, FIRST, SECOND, ROM, HOLE, (1 << 64) - 4 * PAGE]),
    st.integers(-PAGES, 2 * PAGES),
).filter(lambda gpa: 0 <= gpa < 1 << 64)


@dataclass
class Guest:
    memory: GuestMemory
    vm: RecordingVm
    conversions: GuestConversions

    def picture(self) -> object:
        """All that a refusal must leave as it was."""
        ranges = [list(self.memory.ranges(state)) for state in PageState]
        return ranges, set(self.vm.private)

    def ask(self, gpa: int, pages: int, word: int) -> HypercallResult:
        return self.conversions.answer(
            HypercallExit(nr=12, args=(gpa, pages, word, 0, 0, 0), long_mode=True)
        )


def build(resources: ExitStack) -> Guest:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    for name, gpa, private in (
        ("first", FIRST, "stand-in"),
        ("second", SECOND, "stand-in"),
        ("rom", ROM, None),
    ):
        block = resources.enter_context(RamBlock.create(name, PAGES * PAGE, private=private))
        memory.map(block, gpa)
    return Guest(memory, vm, GuestConversions(memory))


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ExitStack() as resources:
        yield build(resources)


@given(
    gpa=words | pages_nearby,
    pages=words | st.integers(0, 3 * PAGES),
    word=words | st.integers(0, 31),
)
def test_any_arguments_get_an_answer_and_a_refusal_changes_nothing(
    gpa: int, pages: int, word: int
) -> None:
    with ExitStack() as resources:
        guest = build(resources)
        guest.memory.convert(FIRST + PAGE, 2 * PAGE, SHARED)
        before = guest.picture()
        guest.vm.take_calls()
        answer = guest.ask(gpa, pages, word)
        assert answer in {DONE, EINVAL, EAGAIN}
        confidential = gpa >= FIRST and gpa + pages * PAGE <= SECOND + PAGES * PAGE
        proper = gpa % PAGE == 0 and pages > 0 and gpa + pages * PAGE <= 1 << 64 and word < 32
        if answer is DONE and confidential:
            assert proper
            to = PRIVATE if word & 16 else SHARED
            assert {guest.memory.state(gpa + page * PAGE) for page in range(pages)} == {to}
        else:
            assert guest.picture() == before
            assert guest.vm.take_calls() == []
            assert not (proper and confidential)


@pytest.mark.parametrize(
    ("gpa", "pages", "word", "expected"),
    [
        pytest.param(FIRST, 1, 0x00, DONE, id="to shared"),
        pytest.param(FIRST, 1, 0x10, DONE, id="private already"),
        pytest.param(FIRST, 2 * PAGES, 0x01, DONE, id="two blocks, and a hint"),
        pytest.param(HOLE, 1, 0x00, DONE, id="hole to shared"),
        pytest.param(0, FIRST // PAGE, 0x00, DONE, id="hole to shared, up to RAM"),
        pytest.param(HOLE, (1 << 52) - HOLE // PAGE, 0x00, DONE, id="hole up to the end"),
        pytest.param(HOLE, 1, 0x10, EINVAL, id="hole to private"),
        pytest.param(SECOND, PAGES + 1, 0x00, EINVAL, id="RAM, then a hole"),
        pytest.param(FIRST - PAGE, 2, 0x00, EINVAL, id="a hole, then RAM"),
        pytest.param(
            FIRST - PAGE, (1 << 52) - FIRST // PAGE + 1, 0x00, EINVAL, id="RAM in the middle"
        ),
        pytest.param(ROM, 1, 0x00, EINVAL, id="ordinary RAM to shared"),
        pytest.param(ROM, 1, 0x10, EINVAL, id="ordinary RAM to private"),
        pytest.param(FIRST + 1, 1, 0x00, EINVAL, id="unaligned"),
        pytest.param(HOLE + 1, 1, 0x00, EINVAL, id="unaligned hole"),
        pytest.param(FIRST, 0, 0x00, EINVAL, id="empty"),
        pytest.param(HOLE, 0, 0x00, EINVAL, id="empty hole"),
        pytest.param(FIRST, (1 << 64) - 1, 0x00, EINVAL, id="overflow"),
        pytest.param(HOLE, 1 << 52, 0x00, EINVAL, id="overflow over a hole"),
        pytest.param(FIRST, 1, 0x20, EINVAL, id="reserved bit"),
        pytest.param(HOLE, 1, 1 << 63, EINVAL, id="reserved bit over a hole"),
    ],
)
def test_answer(guest: Guest, gpa: int, pages: int, word: int, expected: HypercallResult) -> None:
    before = guest.picture()
    assert guest.ask(gpa, pages, word) is expected
    if expected is not DONE or gpa not in (FIRST, SECOND):
        assert guest.picture() == before


def test_work_over_a_hole_does_not_grow_with_it(guest: Guest) -> None:
    guest.vm.take_calls()
    assert guest.ask(1 << 40, (1 << 52) - (1 << 28), 0) is DONE
    assert guest.vm.take_calls() == []


def test_request_by_another_way_gets_the_same_answers(guest: Guest) -> None:
    assert guest.conversions.request(FIRST, PAGE, SHARED) is DONE
    assert guest.memory.state(FIRST) is SHARED
    assert guest.conversions.request(-PAGE, PAGE, SHARED) is EINVAL
    assert guest.conversions.request(FIRST, -PAGE, PRIVATE) is EINVAL
    assert guest.conversions.request(HOLE, PAGE, SHARED) is DONE


def test_unknown_hypercall_is_refused(guest: Guest) -> None:
    call = HypercallExit(nr=13, args=(FIRST, 1, 0, 0, 0, 0), long_mode=True)
    before = guest.picture()
    assert guest.conversions.answer(call) is EINVAL
    assert guest.picture() == before


def test_over_the_budget_is_refused(guest: Guest) -> None:
    guest.memory.attach(SoftIommu(), max_mappings=3)
    before = guest.picture()
    assert guest.ask(FIRST, 1, 0) is DONE  # the ROM is one mapping
    assert guest.ask(FIRST + 2 * PAGE, 1, 0) is DONE
    before = guest.picture()
    assert guest.ask(FIRST + 4 * PAGE, 1, 0) is EINVAL
    assert guest.picture() == before


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EINVAL, errno.EIO])
def test_failed_step_that_was_put_back_is_refused(guest: Guest, error: int) -> None:
    def refuse_once(_: object) -> None:
        guest.vm.then = lambda _: None
        raise OSError(error, "refused")

    before = guest.picture()
    guest.vm.then = refuse_once
    assert guest.ask(FIRST, 1, 0) is EINVAL
    assert guest.picture() == before
    assert guest.ask(FIRST, 1, 0) is DONE


def test_target_that_refuses_is_refused(guest: Guest) -> None:
    guest.memory.attach(FaultyTarget(SoftIommu(), fail_map=[2]))
    before = guest.picture()
    assert guest.ask(FIRST, 1, 0) is EINVAL
    assert guest.picture() == before
    assert guest.ask(FIRST, 1, 0) is DONE


def test_target_out_of_entries_is_not_asked_to_try_again(guest: Guest) -> None:
    # EAGAIN of a target is its own affair; the guest's EAGAIN means pinned pages.
    class Busy(FaultyTarget):
        def unmap(self, iova: int, size: int) -> int:
            self.unmap_calls += 1
            if self.unmap_calls == 1:
                raise OSError(errno.EAGAIN, "busy")
            return self.inner.unmap(iova, size)

    guest.memory.attach(Busy(SoftIommu()))
    assert guest.ask(FIRST, 1, 0) is DONE
    assert guest.ask(FIRST, 1, 0x10) is EINVAL
    assert guest.memory.state(FIRST) is SHARED


def test_pinned_pages_can_be_asked_for_again() -> None:
    memory = GuestMemory()
    ram = SimulatedInPlace("ram", PAGES * PAGE)
    with RamBlock.create("ram", ram.size, private=ram) as block:
        memory.map(block, FIRST)
        conversions = GuestConversions(memory)
        assert conversions.request(FIRST, 4 * PAGE, SHARED) is DONE
        ram.pin(2 * PAGE, PAGE)
        assert conversions.request(FIRST, 4 * PAGE, PRIVATE) is EAGAIN
        assert list(memory.ranges(SHARED)) == [(FIRST, 4 * PAGE)]
        ram.unpin(2 * PAGE, PAGE)
        assert conversions.request(FIRST, 4 * PAGE, PRIVATE) is DONE


def test_poison_stops_the_vcpu(guest: Guest) -> None:
    guest.memory.attach(FaultyTarget(SoftIommu(), short_unmap=[1]))
    assert guest.ask(FIRST, 2, 0) is DONE
    with pytest.raises(PoisonedError):
        guest.ask(FIRST, 2, 0x10)
    with pytest.raises(PoisonedError):
        guest.ask(FIRST, 1, 0x10)
    with pytest.raises(PoisonedError):
        guest.conversions.memory_fault(fault(FIRST))


def test_interrupt_goes_through(guest: Guest) -> None:
    def interrupt(_: object) -> None:
        guest.vm.then = lambda _: None
        raise KeyboardInterrupt

    before = guest.picture()
    guest.vm.then = interrupt
    with pytest.raises(KeyboardInterrupt):
        guest.ask(FIRST, 1, 0)
    assert guest.picture() == before
    assert guest.ask(FIRST, 1, 0) is DONE


def test_guest_cannot_flood_the_log(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="ramblock.kvm"):
        for _ in range(1000):
            guest.ask(FIRST + 1, 1, 0)
    assert len(caplog.records) == 4  # the 1st, 10th, 100th and 1000th
    assert "[0x100001, 0x101001)" in caplog.records[0].message


# -- memory faults ---------------------------------------------------------------------------------


def fault(
    gpa: int, *, private: bool = False, size: int = PAGE, flags: int = 0, error: int = errno.EFAULT
) -> MemoryFaultExit:
    return MemoryFaultExit(gpa=gpa, size=size, flags=flags | private << 3, errno=error)


def test_fault_becomes_a_conversion(guest: Guest) -> None:
    guest.conversions.memory_fault(fault(FIRST + PAGE))
    assert list(guest.memory.ranges(SHARED)) == [(FIRST + PAGE, PAGE), (ROM, PAGES * PAGE)]
    guest.conversions.memory_fault(fault(FIRST + PAGE, private=True))
    assert list(guest.memory.ranges(SHARED)) == [(ROM, PAGES * PAGE)]


@pytest.mark.parametrize(
    ("flags", "error", "reason"),
    [
        (0, EHWPOISON, StuckReason.BROKEN_MEMORY),
        (8, EHWPOISON, StuckReason.BROKEN_MEMORY),
        (0, errno.EINVAL, StuckReason.UNKNOWN_ERRNO),
        (1, errno.EFAULT, StuckReason.UNKNOWN_FLAGS),
        (8 | 1 << 63, errno.EFAULT, StuckReason.UNKNOWN_FLAGS),
    ],
)
def test_fault_that_asks_for_nothing_known_converts_nothing(
    guest: Guest, flags: int, error: int, reason: StuckReason
) -> None:
    guest.memory.convert(FIRST + PAGE, PAGE, SHARED)
    before = guest.picture()
    for gpa in (FIRST, FIRST + PAGE):
        with pytest.raises(StuckGuestError, match=f"{gpa:#x}") as caught:
            guest.conversions.memory_fault(fault(gpa, flags=flags, error=error), vcpu=3)
        stuck = caught.value
        assert (stuck.gpa, stuck.size, stuck.vcpu) == (gpa, PAGE, 3)
        assert (stuck.flags, stuck.errno, stuck.reason) == (flags, error, reason)
    assert guest.picture() == before


def test_same_fault_again_is_no_progress(guest: Guest) -> None:
    guest.conversions.memory_fault(fault(FIRST))
    with pytest.raises(StuckGuestError) as caught:
        guest.conversions.memory_fault(fault(FIRST))
    assert caught.value.reason is StuckReason.NO_PROGRESS
    assert caught.value.__cause__ is None
    # It stays so, until something changes.
    with pytest.raises(StuckGuestError):
        guest.conversions.memory_fault(fault(FIRST))
    guest.conversions.request(FIRST, PAGE, PRIVATE)
    guest.conversions.memory_fault(fault(FIRST))
    assert guest.memory.state(FIRST) is SHARED


def test_other_faults_are_progress(guest: Guest) -> None:
    for _ in range(3):
        for page in range(PAGES):
            guest.conversions.memory_fault(fault(FIRST + page * PAGE))
            guest.conversions.memory_fault(fault(FIRST + page * PAGE, private=True))


def test_two_vcpus_that_touch_one_page_at_once_are_not_stuck(guest: Guest) -> None:
    for state in (False, True, False, True):
        guest.conversions.memory_fault(fault(FIRST, private=state), vcpu=0)
        guest.conversions.memory_fault(fault(FIRST, private=state), vcpu=1)
    with pytest.raises(StuckGuestError) as caught:
        guest.conversions.memory_fault(fault(FIRST, private=True), vcpu=1)
    assert caught.value.vcpu == 1


@pytest.mark.parametrize(
    ("gpa", "private"), [(HOLE, True), (ROM, False), (ROM, True), (FIRST + 1, False)]
)
def test_refused_conversion_is_tried_twice(guest: Guest, gpa: int, *, private: bool) -> None:
    before = guest.picture()
    guest.conversions.memory_fault(fault(gpa, private=private))
    with pytest.raises(StuckGuestError) as caught:
        guest.conversions.memory_fault(fault(gpa, private=private))
    assert isinstance(caught.value.__cause__, UsageError)
    assert guest.picture() == before


def test_refusal_that_does_not_last_is_survived(guest: Guest) -> None:
    guest.memory.attach(FaultyTarget(SoftIommu(), fail_map=[2]))
    guest.conversions.memory_fault(fault(FIRST))
    assert guest.memory.state(FIRST) is PRIVATE
    guest.conversions.memory_fault(fault(FIRST))
    assert guest.memory.state(FIRST) is SHARED


def test_shared_access_to_a_hole_is_answered_once(guest: Guest) -> None:
    # As in QEMU nothing has to be done for it; and if it faults all the same, nothing can be.
    guest.conversions.memory_fault(fault(HOLE))
    with pytest.raises(StuckGuestError):
        guest.conversions.memory_fault(fault(HOLE))


@given(
    gpa=words | pages_nearby,
    size=words | st.sampled_from([PAGE, 2 * PAGE]),
    flags=words | st.sampled_from([0, 8]),
)
def test_any_fault_is_resolved_or_stuck(gpa: int, size: int, flags: int) -> None:
    with ExitStack() as resources:
        guest = build(resources)
        before = guest.picture()
        exit = fault(gpa, size=size, flags=flags)
        if flags in (0, 8):
            guest.conversions.memory_fault(exit)
            before = guest.picture()
        with pytest.raises(StuckGuestError):
            guest.conversions.memory_fault(exit)
        assert guest.picture() == before
