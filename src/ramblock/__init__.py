# SPDX-License-Identifier: Apache-2.0
"""
The memory of confidential VMs: page states, their conversion, and DMA mappings that stay exactly in step.

Start with :class:`RamBlock` and :class:`GuestMemory`; targets are in :mod:`ramblock.dma`, errors in
:mod:`ramblock.errors`, help for testing a VMM in :mod:`ramblock.testing`.
"""

from ramblock.dma.mapper import Mapper
from ramblock.dma.target import MappingPolicy
from ramblock.guest.conversion import ConversionResult
from ramblock.guest.memory import GuestMemory
from ramblock.memory.attributes import PageState, RamBlockAttributes
from ramblock.memory.backend import BackendKind, HostMemoryBackend
from ramblock.memory.block import RamBlock
from ramblock.memory.discard_manager import RamDiscardManager
from ramblock.memory.section import RamSection
from ramblock.memory.virtio_mem import VirtioMem

__all__ = [
    "BackendKind",
    "ConversionResult",
    "GuestMemory",
    "HostMemoryBackend",
    "Mapper",
    "MappingPolicy",
    "PageState",
    "RamBlock",
    "RamBlockAttributes",
    "RamDiscardManager",
    "RamSection",
    "VirtioMem",
]
