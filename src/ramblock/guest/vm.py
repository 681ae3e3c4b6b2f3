# SPDX-License-Identifier: Apache-2.0
"""What a guest memory asks of a virtual machine."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ramblock.memory.section import RamSection

__all__ = ["MAKE_PRIVATE", "MAKE_SHARED", "MemorySlots", "NoVm", "Vm"]

#: Values of the last argument of ``set_memory_attributes``.
MAKE_PRIVATE = True
MAKE_SHARED = False


class Vm(Protocol):
    """The page attributes of a VM (KVM_SET_MEMORY_ATTRIBUTES, Documentation/virt/kvm/api.rst, 4.140)."""

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """
        Make ``[gpa, gpa + size)`` private or shared for the guest. Setting what is set already changes nothing.

        :raises OSError: Refused; whoever asked puts back what was, since it cannot know.
        """


@runtime_checkable
class MemorySlots(Protocol):
    """A VM that also has memory slots: what makes a section visible to the guest."""

    def add_memory_slot(self, section: RamSection) -> None:
        """
        Let the guest see *section*.

        :raises OSError: Refused: the guest does not see it.
        """

    def remove_memory_slot(self, section: RamSection) -> None:
        """
        Take *section* away from the guest.

        :raises OSError: Refused: the guest still sees it.
        """


class NoVm:
    """No VM: attributes are tracked by the page states alone."""

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Do nothing."""
