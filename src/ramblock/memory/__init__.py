# SPDX-License-Identifier: Apache-2.0
"""Blocks, their page states, sources and listeners. Pure but for the backings, which hold the system calls."""

from ramblock.memory.attributes import PageState, RamBlockAttributes
from ramblock.memory.backend import BackendKind, HostMemoryBackend
from ramblock.memory.backing import (
    AnonymousBacking,
    MemfdBacking,
    PrivateBacking,
    SharedBacking,
    StandInPrivate,
)
from ramblock.memory.block import RamBlock
from ramblock.memory.coordination import DiscardCoordinator, DiscardHold, HoldKind
from ramblock.memory.discard_manager import RamDiscardManager
from ramblock.memory.guard import InDoubt
from ramblock.memory.in_place import InPlaceBacking
from ramblock.memory.numa import NumaBinding, NumaPolicy
from ramblock.memory.protocols import Listener, Source
from ramblock.memory.section import RamSection
from ramblock.memory.virtio_mem import VirtioMem

__all__ = [
    "AnonymousBacking",
    "BackendKind",
    "DiscardCoordinator",
    "DiscardHold",
    "HoldKind",
    "HostMemoryBackend",
    "InDoubt",
    "InPlaceBacking",
    "Listener",
    "MemfdBacking",
    "NumaBinding",
    "NumaPolicy",
    "PageState",
    "PrivateBacking",
    "RamBlock",
    "RamBlockAttributes",
    "RamDiscardManager",
    "RamSection",
    "SharedBacking",
    "Source",
    "StandInPrivate",
    "VirtioMem",
]
