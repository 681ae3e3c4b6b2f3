# SPDX-License-Identifier: Apache-2.0
"""The visibility of a block's pages: their states, the sources, the listeners."""

from ramblock.discard.attributes import PageState, RamBlockAttributes
from ramblock.discard.coordination import DiscardCoordinator, DiscardHold, HoldKind
from ramblock.discard.guard import InDoubt
from ramblock.discard.listeners import Listener
from ramblock.discard.manager import RamDiscardManager
from ramblock.discard.section import Block, RamSection
from ramblock.discard.sources import Source
from ramblock.discard.virtio_mem import VirtioMem

__all__ = ["Block", "DiscardCoordinator", "DiscardHold", "HoldKind", "InDoubt", "Listener"]
__all__ += ["PageState", "RamBlockAttributes", "RamDiscardManager", "RamSection", "Source"]
__all__ += ["VirtioMem"]
