# SPDX-License-Identifier: Apache-2.0
"""A whole guest on a target: conversions, virtio-mem, failing calls, beside the naive model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import NamedTuple

from hypothesis import strategies as st

from ramblock.discard.attributes import PageState
from ramblock.discard.virtio_mem import VirtioMem
from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, MappingPolicy
from ramblock.errors import (
    ConversionError,
    DmaError,
    IommuFault,
    MappingLimitError,
    UsageError,
    describe_range,
)
from ramblock.guest.block import RamBlock
from ramblock.guest.memory import GuestMemory
from ramblock.hostmem.backing import MemfdBacking, StandInPrivate
from ramblock.testing.checker import GuestChecker
from ramblock.testing.conformance.exploring import Story, explore, sequences
from ramblock.testing.conformance.target_model import PAGES
from ramblock.testing.conformance.target_player import View
from ramblock.testing.model import GuestModel
from ramblock.testing.strategies import Operation, Verb, operations, page_ranges
from ramblock.testing.targets import FaultyTarget
from ramblock.units import PAGE_SIZE

__all__ = ["Opened", "check_guest"]

#: Gives a new target, what can be seen of it, and where a guest can be.
Opened = Callable[[], AbstractContextManager[tuple[DmaTarget, View, int]]]

_SIZE = PAGES * PAGE_SIZE
_PLUG = 4 * PAGE_SIZE


class _Step(NamedTuple):
    operation: Operation
    fail_at: int | None
    """Which of the calls that carry it out fails; what was done before is taken back then."""


class _Plan(NamedTuple):
    todo: list[_Step]
    plugs: bool
    policy: MappingPolicy


def _plans() -> st.SearchStrategy[_Plan]:
    # Conversions above all; the rest is there to be in their way.
    conversions = st.builds(
        lambda verb, where: Operation(verb, *where),
        st.sampled_from([Verb.SHARE, Verb.MAKE_PRIVATE]),
        page_ranges(_SIZE),
    )
    steps = st.builds(
        _Step,
        conversions | conversions | operations(_SIZE, plug=_PLUG),
        st.sampled_from([None, None, None, None, 1, 2, 3]),
    )
    policies = st.sampled_from([MappingPolicy.AUTO, MappingPolicy.PAGE])
    return st.builds(_Plan, sequences(steps, 24), st.booleans(), policies)


def check_guest(opened: Opened, examples: int | None) -> None:
    """
    Run random guests on new targets.

    A target whose pages are larger than the guest's cannot be attached to one; that is all there is
    to check of it then.

    :raises AssertionError: A device reaches what it must not, or not what it ought to; or a
        conversion fails with nobody to blame but the target.
    """

    def check(plan: _Plan) -> None:
        with opened() as (target, view, base):
            guest = _Guest(target, view, base, plan)
            try:
                guest.run()
            finally:
                guest.close()

    explore(_plans(), check, examples)


class _Guest:
    """A guest of one block, watched, modelled, and with a target that can be told to fail."""

    def __init__(self, target: DmaTarget, view: View, base: int, plan: _Plan) -> None:
        self.story = Story(f"{type(target).__name__} under a guest")
        self._view = view
        self._base = base
        self._plan = plan
        self._written = 0
        self._checker = GuestChecker()
        self._faulty = FaultyTarget(self._checker.target(target))
        shared = self._checker.shared(MemfdBacking("conformance", _SIZE))
        self._private = StandInPrivate("conformance", _SIZE)
        private = self._checker.private(self._private)
        self._block = RamBlock("conformance", shared, private, owns_private=False)
        shared.block = private.block = self._block
        self._memory = GuestMemory(self._checker.vm())
        self._memory.map(self._block, base)
        self._model = GuestModel()
        self._model.add_block("ram", _SIZE)
        self._model.map("ram", base)
        self._device = VirtioMem(self._block, _PLUG) if plan.plugs else None
        if self._device is not None:
            self._device.plug(0, _SIZE)
            self._model.add_virtio_mem("ram")
            self._model.plug("ram", 0, _SIZE)

    def run(self) -> None:
        """Do everything that the plan says, and look after each step."""
        mapper = self._attach()
        if mapper is None:
            return
        for step in self._plan.todo:
            self._do(step)
            self._look(self._model.populated())
        self.story.step("detach")
        with self.story.no_error("detach"):
            self._memory.detach(mapper)
        self._look(set())

    def _attach(self) -> Mapper | None:
        self.story.step(f"attach, policy {self._plan.policy.name}")
        try:
            return self._memory.attach(self._faulty, self._plan.policy)
        except UsageError:
            if self._faulty.capabilities.page_size > PAGE_SIZE:
                return None
            raise

    # -- one step ---------------------------------------------------------------------------------

    def _do(self, step: _Step) -> None:
        verb, offset, size = step.operation.verb, step.operation.offset, step.operation.size
        model, gpa, fail_at = self._model, self._base + offset, step.fail_at
        fails = "" if fail_at is None else f", and call {fail_at} fails"
        if verb in (Verb.SHARE, Verb.MAKE_PRIVATE):
            to = PageState.SHARED if verb is Verb.SHARE else PageState.PRIVATE
            self.story.step(f"convert {describe_range(gpa, size)} to {to.name}{fails}")
            convert = partial(self._memory.convert, gpa, size, to)
            if self._attempt(convert, fail_at, maps=verb is Verb.SHARE):
                model.convert(gpa, size, to)
        elif verb in (Verb.READ, Verb.WRITE):
            if self._view.device is not None:
                self._access(verb, gpa, size)
        elif self._device is not None:
            plug = verb is Verb.PLUG
            change = self._device.plug if plug else self._device.unplug
            self.story.step(f"{verb.value} {describe_range(gpa, size)}{fails}")
            if self._attempt(partial(change, offset, size), fail_at, maps=plug):
                (model.plug if plug else model.unplug)("ram", offset, size)

    def _attempt(self, call: Callable[[], object], fail_at: int | None, *, maps: bool) -> bool:
        """Make a call that may fail where a failure was planned, or a budget is too small."""
        faulty = self._faulty
        # An operation makes one kind of call, and its undo the other. A call of the undo must not
        # fail: that would poison the guest, and say nothing of the target.
        if fail_at is not None and maps:
            faulty.fail_map = {faulty.map_calls + fail_at}
        elif fail_at is not None:
            faulty.fail_unmap = {faulty.unmap_calls + fail_at}
        try:
            call()
        except (MappingLimitError, UsageError):
            return False  # too small a budget, or a part is plugged already
        except (ConversionError, DmaError) as error:
            cause = error.__cause__ if isinstance(error, ConversionError) else error
            if self._memory.poisoned or not self._has_failed_as_planned():
                self.story.fail(f"the guest was refused: {cause!r}", cause)
            return False
        finally:
            faulty.fail_map = faulty.fail_unmap = ()
        return True

    def _has_failed_as_planned(self) -> bool:
        faulty = self._faulty
        return any(number <= faulty.map_calls for number in faulty.fail_map) or any(
            number <= faulty.unmap_calls for number in faulty.fail_unmap
        )

    def _access(self, verb: Verb, gpa: int, size: int) -> None:
        device = self._view.device
        assert device is not None
        reachable = set(range(gpa // PAGE_SIZE * PAGE_SIZE, gpa + size, PAGE_SIZE))
        allowed = reachable <= self._model.populated()
        offset = gpa - self._base
        self.story.step(f"the device does a {verb.value} of {describe_range(gpa, size)}")
        try:
            if verb is Verb.READ:
                same = device.read(gpa, size) == self._block.read(offset, size)
            else:
                data = bytes((gpa + number) % 251 for number in range(size))
                device.write(gpa, data)
                same = self._block.read(offset, size) == data
        except IommuFault as fault:
            if allowed:
                self.story.fail(f"it faulted: {fault}", fault)
            return
        if not allowed:
            self.story.fail("it went through, and not all of it is populated")
        if not same:
            self.story.fail("the bytes are not those of the block")

    # -- judging ----------------------------------------------------------------------------------

    def _judge(self) -> None:
        if self._checker.violations:
            self.story.fail(self._checker.violations[0])

    def _look(self, wanted: set[int]) -> None:
        self._judge()
        if not self._view.sees:
            return
        for page in range(self._base, self._base + _SIZE, PAGE_SIZE):
            self._written += 1
            data = self._written.to_bytes(8, "little")
            if self._view.writes(page, data) is not (page in wanted):
                state = "is populated" if page in wanted else "is not populated"
                self.story.fail(f"page {page:#x} {state}, and a device says otherwise")
            seen = self._block.read(page - self._base, len(data))
            if self._view.device is not None and page in wanted and seen != data:
                self.story.fail(f"what a device wrote at {page:#x} is not in the block there")

    def close(self) -> None:
        """Let go of everything, also after a failure."""
        with suppress(Exception):
            self._block.close()
        self._private.close()
