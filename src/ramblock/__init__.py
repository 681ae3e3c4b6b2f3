# SPDX-License-Identifier: Apache-2.0
"""
The memory of confidential VMs: page states, their conversion, and DMA mappings that stay exactly in step.

Start with :class:`RamBlock` and :class:`GuestMemory`; targets are in :mod:`ramblock.dma`, errors in
:mod:`ramblock.errors`, help for testing a VMM in :mod:`ramblock.testing`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ramblock.dma.mapper import Mapper
    from ramblock.dma.target import MappingPolicy
    from ramblock.guest.conversion import ConversionResult
    from ramblock.guest.memory import GuestMemory
    from ramblock.memory.attributes import PageState, RamBlockAttributes
    from ramblock.memory.backend import BackendKind, HostMemoryBackend
    from ramblock.memory.block import RamBlock
    from ramblock.memory.discard_manager import RamDiscardManager
    from ramblock.memory.numa import NumaBinding, NumaPolicy
    from ramblock.memory.section import RamSection
    from ramblock.memory.virtio_mem import VirtioMem

__all__ = [
    "BackendKind",
    "ConversionResult",
    "GuestMemory",
    "HostMemoryBackend",
    "Mapper",
    "MappingPolicy",
    "NumaBinding",
    "NumaPolicy",
    "PageState",
    "RamBlock",
    "RamBlockAttributes",
    "RamDiscardManager",
    "RamSection",
    "VirtioMem",
]

# Where each name lives. They are imported when they are first asked for (PEP 562): half of the time that `ramblock --help`
# takes would otherwise go into parts that it does not need.
_HOMES = {
    "BackendKind": "ramblock.memory.backend",
    "ConversionResult": "ramblock.guest.conversion",
    "GuestMemory": "ramblock.guest.memory",
    "HostMemoryBackend": "ramblock.memory.backend",
    "Mapper": "ramblock.dma.mapper",
    "MappingPolicy": "ramblock.dma.target",
    "NumaBinding": "ramblock.memory.numa",
    "NumaPolicy": "ramblock.memory.numa",
    "PageState": "ramblock.memory.attributes",
    "RamBlock": "ramblock.memory.block",
    "RamBlockAttributes": "ramblock.memory.attributes",
    "RamDiscardManager": "ramblock.memory.discard_manager",
    "RamSection": "ramblock.memory.section",
    "VirtioMem": "ramblock.memory.virtio_mem",
}

if not TYPE_CHECKING:  # a checker would believe that every name exists

    def __getattr__(name):
        """Import what is asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        """List the names, imported or not."""
        return sorted({*globals(), *_HOMES})
