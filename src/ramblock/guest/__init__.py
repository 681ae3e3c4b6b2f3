# SPDX-License-Identifier: Apache-2.0
"""A guest: where its blocks are, which devices see them, and the conversion of its pages."""

from ramblock.guest.block import RamBlock
from ramblock.guest.conversion import ConversionResult
from ramblock.guest.memory import GuestMemory
from ramblock.guest.vm import MemorySlots, Vm

__all__ = ["ConversionResult", "GuestMemory", "MemorySlots", "RamBlock", "Vm"]
