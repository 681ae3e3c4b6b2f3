# SPDX-License-Identifier: Apache-2.0
"""
The memory of confidential VMs: page states, their conversion, and DMA mappings exactly in step.

Start with :class:`RamBlock` and :class:`GuestMemory`; targets are in :mod:`ramblock.dma`, errors in
:mod:`ramblock.errors`, help for testing a VMM in :mod:`ramblock.testing`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ramblock.discard.attributes import PageState, RamBlockAttributes
    from ramblock.discard.listeners import Listener
    from ramblock.discard.manager import RamDiscardManager
    from ramblock.discard.section import Block, RamSection
    from ramblock.discard.sources import Source
    from ramblock.discard.virtio_mem import VirtioMem
    from ramblock.dma.mapper import Mapper
    from ramblock.dma.target import DmaTarget, MappingPolicy
    from ramblock.guest.block import RamBlock
    from ramblock.guest.conversion import ConversionResult
    from ramblock.guest.memory import GuestMemory
    from ramblock.guest.vm import MemorySlots, Vm
    from ramblock.hostmem.backend import BackendKind, HostMemoryBackend
    from ramblock.hostmem.backing import PrivateBacking, SharedBacking
    from ramblock.hostmem.in_place import InPlaceBacking
    from ramblock.hostmem.numa import NumaBinding, NumaPolicy

__all__ = [
    "BackendKind", "Block", "ConversionResult", "DmaTarget", "GuestMemory", "HostMemoryBackend",
    "InPlaceBacking", "Listener", "Mapper", "MappingPolicy", "MemorySlots", "NumaBinding",
    "NumaPolicy", "PageState", "PrivateBacking", "RamBlock", "RamBlockAttributes",
    "RamDiscardManager", "RamSection", "SharedBacking", "Source", "VirtioMem", "Vm",
]  # fmt: skip

# A refusal that the caller handles is no news: without a handler of the application's, Python
# would print it (logging.lastResort).
logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # a checker would believe that every name exists

    def __getattr__(name):
        # A part is imported when it is first asked for (PEP 562), the lowest first: half of the
        # time that `ramblock --help` takes would otherwise go into parts that it does not need.
        for part in ("hostmem", "discard", "dma", "guest") if name in __all__ else ():
            value = getattr(import_module(f"{__name__}.{part}"), name, None)
            if value is not None:
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
