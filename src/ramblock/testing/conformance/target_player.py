# SPDX-License-Identifier: Apache-2.0
"""Plays steps to a target and to its model, and compares through the eyes of a device."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ramblock.dma.target import DmaTarget, HostRange
from ramblock.errors import DmaError, IommuFault, describe_range
from ramblock.guest.block import RamBlock
from ramblock.hostmem.backing import AnonymousBacking
from ramblock.testing.conformance.exploring import Story
from ramblock.testing.conformance.target_model import PAGES, Step, TargetModel

__all__ = ["Device", "TargetPlayer", "View"]

_PATTERN = 8


class Device(Protocol):
    """A device behind a target that reads and writes on command; a ``SoftIommu`` is its own."""

    def read(self, iova: int, size: int) -> bytes:
        """
        Read as the device.

        :raises IommuFault: Not all of it is mapped.
        """

    def write(self, iova: int, data: bytes) -> None:
        """Write as the device; raises as :meth:`read`, also where the mapping is read-only."""


class View:
    """What can be seen of a target from behind it."""

    def __init__(
        self, device: Device | None = None, reaches: Callable[[int], bool] | None = None
    ) -> None:
        self.device = device
        self._reaches = reaches

    @property
    def sees(self) -> bool:
        """Whether anything can be seen."""
        return self.device is not None or self._reaches is not None

    def writes(self, iova: int, data: bytes = b"\xaa" * _PATTERN) -> bool:
        """Whether a device can write at *iova*; where it can, it may do so, and writes *data*."""
        if self._reaches is not None:
            return self._reaches(iova)
        assert self.device is not None
        try:
            self.device.write(iova, data)
        except IommuFault:
            return False
        return True

    def reads(self, iova: int) -> bytes | None:
        """Read a few bytes as the device; None: it faults."""
        assert self.device is not None
        try:
            return self.device.read(iova, _PATTERN)
        except IommuFault:
            return None


class TargetPlayer:
    """
    A target, its model, and memory to map.

    :param base: IOVA of the first of :data:`PAGES` pages.
    :param anonymous: Whether the memory has no descriptor.
    """

    def __init__(
        self, target: DmaTarget, view: View, story: Story, base: int, *, anonymous: bool
    ) -> None:
        self.target = target
        self.story = story
        self.page_size = target.capabilities.page_size
        self.exact = target.capabilities.exact
        self.base = base
        self.model = TargetModel(target.capabilities)
        size = PAGES * self.page_size
        self.block = (
            RamBlock("conformance", AnonymousBacking(size), None, owns_private=False)
            if anonymous
            else RamBlock.create("conformance", size)
        )
        self._view = view
        for page in range(PAGES):
            self.block.write(page * self.page_size, bytes((page + 1,)) * _PATTERN)

    def memory(self, first: int, count: int = 1) -> HostRange:
        """Name some pages of the memory."""
        offset = first * self.page_size
        address = self.block.address + offset
        return HostRange(self.block.fd, offset, address, count * self.page_size)

    def play(self, step: Step) -> None:
        """Make a step, and compare the answer."""
        if not self.model.is_settled(step):
            return
        iova, size = self.base + step.first * self.page_size, step.count * self.page_size
        where = describe_range(iova, size)
        expected = self.model.expect(step)
        if step.map:
            memory = self.memory(step.memory, step.count)
            writable = "" if step.writable else ", read-only"
            self.story.step(f"map {where} to {describe_range(memory.offset, size)}{writable}")
            answer = self.map(iova, memory, writable=step.writable)
        else:
            self.story.step(f"unmap {where}")
            answer = self.unmap(iova, size)
        if isinstance(answer, DmaError):
            if answer.errno not in expected.refusals:
                self.story.fail(f"it refused ({answer!r}), expected {self._words(step)}", answer)
            return
        if expected.removed is None:
            self.story.fail(f"it agreed, expected {self._words(step)}")
        if not step.map:
            removed = expected.removed * self.page_size
            if type(answer) is not int or answer != removed:
                self.story.fail(f"unmap answered {answer!r}, expected {removed:#x} as an int")
        self.model.apply(step)

    def _words(self, step: Step) -> str:
        expected = self.model.expect(step)
        names = sorted(expected.refusals)
        refusal = " or ".join(_errno_name(number) for number in names)
        if expected.removed is None:
            return f"DmaError with {refusal}"
        return "no error" + (f", or {refusal}" if names else "")

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> object:
        """Map; a refusal is returned, once its fields are checked."""
        return self._call(
            lambda: self.target.map(iova, memory, writable=writable), iova, memory.size
        )

    def unmap(self, iova: int, size: int) -> object:
        """Unmap; likewise."""
        return self._call(lambda: self.target.unmap(iova, size), iova, size)

    def _call(self, make: Callable[[], object], iova: int, size: int) -> object:
        try:
            return make()
        except DmaError as error:
            if error.in_doubt and not (self.exact and error.errno == errno.ENOENT):
                # An exact target may not know whether it met one mapping or several.
                self.story.fail(f"a refusal is in doubt: {error!r}", error)
            if (error.iova, error.size) != (iova, size):
                self.story.fail(
                    f"{error!r} has iova={error.iova!r} and size={error.size!r}, expected those of"
                    f" the call, {iova:#x} and {size:#x}",
                    error,
                )
            return error
        except Exception as error:
            self.story.fail(f"it raised {error!r}, which is no DmaError", error)

    def look(self) -> None:
        """Compare all pages with what a device reaches."""
        if not self._view.sees:
            return
        for page in range(PAGES):
            iova = self.base + page * self.page_size
            behind = self.model.memory_of(page)
            if self._view.device is not None:
                self._look_at_bytes(iova, behind)
            if self._view.writes(iova) is not (behind is not None and behind[1]):
                can = "can not" if behind is not None and behind[1] else "can"
                self.story.fail(f"a device {can} write at {iova:#x}, and the model says otherwise")
            if behind is not None and behind[1] and self._view.device is not None:
                self._restore(iova, behind[0])

    def _look_at_bytes(self, iova: int, behind: tuple[int, bool] | None) -> None:
        seen = self._view.reads(iova)
        wanted = None if behind is None else self.block.read(behind[0] * self.page_size, _PATTERN)
        if seen != wanted:
            self.story.fail(f"a device reads {_show(seen)} at {iova:#x}, expected {_show(wanted)}")

    def _restore(self, iova: int, page: int) -> None:
        """Find in the memory what a device has just written, and put the pattern back."""
        if self.block.read(page * self.page_size, 1) != b"\xaa":
            self.story.fail(f"what a device wrote at {iova:#x} is not in the memory mapped there")
        self.block.write(page * self.page_size, bytes((page + 1,)) * _PATTERN)

    def unmap_all(self) -> None:
        """Unmap every mapping by itself."""
        for first, count in self.model.mappings():
            self.play(Step(map=False, first=first, count=count))
        self.look()

    def abandon(self) -> None:
        """Empty the target as far as it can be, after a failure."""
        for first, count in self.model.mappings():
            with suppress(Exception):
                self.target.unmap(self.base + first * self.page_size, count * self.page_size)
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self.block.close()


def _show(data: bytes | None) -> str:
    return "nothing (a fault)" if data is None else data.hex()


def _errno_name(number: int) -> str:
    return errno.errorcode[number]
