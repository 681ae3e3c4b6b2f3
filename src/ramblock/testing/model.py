# SPDX-License-Identifier: Apache-2.0
"""
A naive model of a guest: what devices *ought* to reach, as plain sets of pages.

It knows what was asked for, and nothing of what was done: that is the verifier's half
(:mod:`ramblock.testing.verifier`). It is slow, obvious, and shares no code with the library. Apply
to it what you apply to your VMM, and compare::

    model = GuestModel()
    model.add_block("ram", 16 * KIB)
    model.map("ram", 0)
    model.convert(0, 8 * KIB, PageState.SHARED)
    assert pages_of(iommu.mappings()) == model.populated()

A page is named by the address of its first byte: a guest address where the guest is meant, an
offset where a block is. The model checks nothing: apply no operation that is not allowed.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ramblock.discard.attributes import PageState
from ramblock.units import PAGE_SIZE

__all__ = ["GuestModel", "ModelBlock", "ModelSection", "pages_of"]


class _Extent(Protocol):
    @property
    def iova(self) -> int: ...
    @property
    def size(self) -> int: ...


def pages_of(mappings: Iterable[_Extent], page_size: int = PAGE_SIZE) -> set[int]:
    """Name the pages of *mappings* (anything with ``iova`` and ``size``) by their first bytes."""
    return {
        page
        for mapping in mappings
        for page in range(mapping.iova, mapping.iova + mapping.size, page_size)
    }


@dataclass(kw_only=True)
class ModelBlock:
    """A block: pages as offsets."""

    size: int
    """In bytes."""
    confidential: bool = True
    """It has a private side; without one its pages are always shared."""
    shared: set[int] = field(default_factory=set)
    """Pages that are shared."""
    plugged: set[int] | None = None
    """Pages that virtio-mem has plugged; None: no virtio-mem."""
    sources: dict[Hashable, set[int]] = field(default_factory=dict)
    """Further discard sources, by any name: the pages that each calls populated."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Where a part of a block appears."""

    block: str
    offset: int
    size: int
    gpa: int


class GuestModel:
    """
    Blocks, sections, and the pages of each block that are shared, plugged, and populated by others.

    :param page_size: In bytes; every address and size is a multiple of it.
    """

    def __init__(self, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        #: By name.
        self.blocks: dict[str, ModelBlock] = {}
        self.sections: list[ModelSection] = []

    def copy(self) -> GuestModel:
        """Copy everything, to keep what was."""
        return copy.deepcopy(self)

    def _pages(self, offset: int, size: int) -> set[int]:
        return set(range(offset, offset + size, self.page_size))

    # -- what happens ------------------------------------------------------------------------------

    def add_block(self, name: str, size: int, *, confidential: bool = True) -> None:
        """Make a block; everything private, or (not *confidential*) shared."""
        block = ModelBlock(size=size, confidential=confidential)
        if not confidential:
            block.shared = self._pages(0, size)
        self.blocks[name] = block

    def map(self, name: str, gpa: int, *, offset: int = 0, size: int | None = None) -> None:
        """Let a block, or a part of it, appear at *gpa*."""
        length = self.blocks[name].size - offset if size is None else size
        self.sections.append(ModelSection(block=name, offset=offset, size=length, gpa=gpa))

    def unmap(self, gpa: int) -> None:
        """Take out the section that begins at *gpa*."""
        self.sections = [section for section in self.sections if section.gpa != gpa]

    def convert(self, gpa: int, size: int, to: PageState) -> None:
        """Convert guest pages, whatever blocks they are in."""
        for page in self._pages(gpa, size):
            block, offset = self._at(page)
            self.state_change(block, offset, self.page_size, to)

    def state_change(self, name: str, offset: int, size: int, to: PageState) -> None:
        """Change the state of pages of one block."""
        pages = self._pages(offset, size)
        if to is PageState.SHARED:
            self.blocks[name].shared |= pages
        else:
            self.blocks[name].shared -= pages

    def add_virtio_mem(self, name: str) -> None:
        """Give a block virtio-mem, with everything unplugged."""
        self.blocks[name].plugged = set()

    def plug(self, name: str, offset: int, size: int) -> None:
        """Plug pages of a block that has virtio-mem."""
        plugged = self.blocks[name].plugged
        assert plugged is not None, f"block {name!r} has no virtio-mem"
        plugged |= self._pages(offset, size)

    def unplug(self, name: str, offset: int, size: int) -> None:
        """Unplug pages of a block that has virtio-mem."""
        plugged = self.blocks[name].plugged
        assert plugged is not None, f"block {name!r} has no virtio-mem"
        plugged -= self._pages(offset, size)

    # -- what ought to be --------------------------------------------------------------------------

    def _at(self, gpa: int) -> tuple[str, int]:
        for section in self.sections:
            if section.gpa <= gpa < section.gpa + section.size:
                return section.block, section.offset + gpa - section.gpa
        raise KeyError(f"nothing at {gpa:#x}")

    def pages(self) -> set[int]:
        """Every guest page there is."""
        return {
            page for section in self.sections for page in self._pages(section.gpa, section.size)
        }

    def state(self, gpa: int) -> PageState:
        """Tell the state of a guest page."""
        name, offset = self._at(gpa)
        return PageState.SHARED if offset in self.blocks[name].shared else PageState.PRIVATE

    def shared(self) -> set[int]:
        """Guest pages that are shared."""
        return {page for page in self.pages() if self.state(page) is PageState.SHARED}

    def private(self) -> set[int]:
        """Guest pages that are private; their attribute is."""
        return self.pages() - self.shared()

    def populated(self) -> set[int]:
        """Guest pages that devices ought to reach: shared, plugged, populated in every source."""
        return {page for page in self.pages() if self._is_populated(*self._at(page))}

    def populated_in(self, name: str) -> set[int]:
        """Pages of a block, as offsets, that its listeners ought to hold, wherever it appears."""
        block = self.blocks[name]
        return {page for page in block.shared if self._is_available(name, page)}

    def used_privately_in(self, name: str) -> set[int]:
        """Pages of a block, as offsets, whose private side holds the guest's data."""
        block = self.blocks[name]
        private = self._pages(0, block.size) - block.shared
        return {page for page in private if self._is_available(name, page)}

    def _is_available(self, name: str, offset: int) -> bool:
        block = self.blocks[name]
        plugged = block.plugged is None or offset in block.plugged
        return plugged and all(offset in pages for pages in block.sources.values())

    def _is_populated(self, name: str, offset: int) -> bool:
        return offset in self.blocks[name].shared and self._is_available(name, offset)

    def __repr__(self) -> str:
        return (
            f"<GuestModel: {len(self.sections)} sections, {len(self.populated())} pages populated>"
        )
