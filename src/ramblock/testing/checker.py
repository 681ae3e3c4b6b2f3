# SPDX-License-Identifier: Apache-2.0
"""
The verifier in a test of somebody's VMM: wraps the parts of a guest, and raises what it saw.

::

    checker = GuestChecker()
    iommu = SoftIommu()
    memory = GuestMemory(checker.vm())
    memory.attach(checker.target(iommu))
    ...
    checker.verify()

A violation is noted rather than raised, because whoever makes the call would take an exception for
a failure of the call and put something back; :meth:`GuestChecker.verify` raises. A target that can
list its mappings is walked through after each of its calls: for tests, not for use.
"""

from __future__ import annotations

from collections.abc import MutableSet, Sequence
from typing import Protocol

from ramblock.dma.soft import Mapping
from ramblock.dma.target import DmaTarget
from ramblock.guest.vm import Vm
from ramblock.hostmem.backing import PrivateBacking, SharedBacking
from ramblock.hostmem.in_place import InPlaceBacking
from ramblock.testing.edges import (
    CheckedInPlace,
    CheckedPrivate,
    CheckedShared,
    CheckedTarget,
    CheckedVm,
)
from ramblock.testing.marks import MarkedPages
from ramblock.testing.verifier import Verifier

__all__ = ["GuestChecker", "ListedTarget"]


class ListedTarget(DmaTarget, Protocol):
    """A target that can tell what it maps; :class:`~ramblock.dma.SoftIommu` is one."""

    def mappings(self) -> Sequence[Mapping]:
        """List what is mapped at this moment."""


class GuestChecker:
    """A verifier of one guest, and the wrappers that show it the guest's parts."""

    def __init__(self) -> None:
        #: What was seen.
        self.verifier = Verifier()
        self._targets = 0

    # -- wrapping ---------------------------------------------------------------------------------

    def target(self, inner: DmaTarget) -> CheckedTarget:
        """Watch a target. One that has ``mappings()`` is asked for them after each call."""
        self._targets += 1
        name = f"{type(inner).__name__} {self._targets}"
        # The verifier refers to the target itself and not to the wrapper: a block refers to the
        # verifier, and must not keep alive what maps it.
        self.verifier.watch(name, getattr(inner, "mappings", None))
        return CheckedTarget(self.verifier, name, inner)

    def vm(self, inner: Vm | None = None) -> CheckedVm:
        """Watch a VM, or stand in for one that always agrees."""
        return CheckedVm(self.verifier, inner)

    def shared(self, inner: SharedBacking) -> CheckedShared:
        """Watch the shared side of a block; once its ``block`` is set, frees of used pages too."""
        return CheckedShared(self.verifier, inner)

    def private(self, inner: PrivateBacking) -> CheckedPrivate:
        """Watch the private side of a block; likewise."""
        return CheckedPrivate(self.verifier, inner)

    def in_place(self, inner: InPlaceBacking) -> CheckedInPlace:
        """Watch a memory for both states; likewise."""
        return CheckedInPlace(self.verifier, inner)

    # -- judging ----------------------------------------------------------------------------------

    @property
    def violations(self) -> list[str]:
        """What was wrong, oldest first, in words."""
        return self.verifier.story

    @property
    def calls(self) -> int:
        """How many calls were looked at."""
        return self.verifier.checks

    @property
    def resetting(self) -> bool:
        """Whether the guest is being reset: private memory that it used may be freed then."""
        return self.verifier.resetting

    @resetting.setter
    def resetting(self, resetting: bool) -> None:
        self.verifier.resetting = resetting

    @property
    def private_pages(self) -> MutableSet[int]:
        """Guest pages whose attribute is private, by guest address."""
        return self.verifier.private_pages

    @property
    def private_memory(self) -> MarkedPages:
        """Pages of memory in place whose attribute is private, by host address."""
        return self.verifier.private_memory

    @property
    def freed_pages(self) -> MarkedPages:
        """Pages of shared backings that are freed and were not mapped since, by host address."""
        return self.verifier.freed_pages

    def complain(self, text: str) -> None:
        """Note a violation that the test itself saw."""
        self.violations.append(text)

    def verify(self) -> None:
        """
        Raise if anything was ever wrong.

        :raises AssertionError: With all violations.
        """
        if self.violations:
            raise AssertionError("\n".join(self.violations))

    def __repr__(self) -> str:
        return f"<GuestChecker: {self.calls} calls, {len(self.violations)} violations>"
