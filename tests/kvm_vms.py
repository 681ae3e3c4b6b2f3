"""
VMs around a real one: one that writes down what it is asked, one that does it in the wrong order.
"""

import time
from collections.abc import Callable

from ramblock import RamSection
from ramblock.kvm import KvmVm

__all__ = ["NotedVm", "SlotFirstVm"]


class NotedVm:
    """Notes each call, then makes it."""

    def __init__(self, inner: KvmVm) -> None:
        self.inner = inner
        self.calls: list[tuple[str, int, int]] = []

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        self.calls.append(("private" if private else "shared", gpa, size))
        self.inner.set_memory_attributes(gpa, size, private)

    def add_memory_slot(self, section: RamSection) -> None:
        self.calls.append(("add", section.gpa, section.size))
        self.inner.add_memory_slot(section)

    def remove_memory_slot(self, section: RamSection) -> None:
        self.calls.append(("remove", section.gpa, section.size))
        self.inner.remove_memory_slot(section)

    def take_calls(self) -> list[tuple[str, int, int]]:
        calls, self.calls = self.calls, []
        return calls


class SlotFirstVm:
    """
    What ``GuestMemory.map`` must not do: the slot first, and then the attributes.

    :param between: Called in between, with the guest address of the section.
    """

    def __init__(self, inner: KvmVm, between: Callable[[int], object]) -> None:
        self._inner = inner
        self._between = between
        self._held_back: list[tuple[int, int, bool]] = []

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        self._held_back.append((gpa, size, private))

    def add_memory_slot(self, section: RamSection) -> None:
        self._inner.add_memory_slot(section)
        self._between(section.gpa)
        time.sleep(0.005)  # what two system calls, one after the other, would leave open
        for gpa, size, private in self._held_back:
            self._inner.set_memory_attributes(gpa, size, private)
        self._held_back.clear()

    def remove_memory_slot(self, section: RamSection) -> None:
        self._inner.remove_memory_slot(section)
