# SPDX-License-Identifier: Apache-2.0
"""
A guest of a few hundred bytes, which asks for conversions as a confidential guest would.

``assembler.py`` and ``program.py`` make its code, ``image.py`` the memory around it, ``mailbox.py``
carries its commands, and :class:`GuestProgram` runs it on a :class:`~ramblock.kvm.KvmVm`.
"""

from ramblock.guest_program.guest import GuestEvent, GuestProgram, IdleEvent
from ramblock.guest_program.mailbox import Command, Operation, Result, Status
from ramblock.guest_program.probe import choose_call
from ramblock.guest_program.program import ConversionCall

__all__ = [
    "Command",
    "ConversionCall",
    "GuestEvent",
    "GuestProgram",
    "IdleEvent",
    "Operation",
    "Result",
    "Status",
    "choose_call",
]
