# SPDX-License-Identifier: Apache-2.0
"""
The events of a trace, whichever program wrote it.

The readers turn lines and records into these; the audit knows nothing else. Ranges are ``[start,
end)`` in bytes: a format with inclusive ends, page frame numbers or sizes is converted by its
reader. A call that failed is no event that changes something; its reader says so with
``done=False`` where that is worth showing.

Times are nanoseconds of the clock of the trace (with the offset that the user gave), or None where
the trace has none. The structs are immutable by convention, not by ``frozen``: that would double
the cost of the one thing the readers do most.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

__all__ = [
    "Access",
    "Attach",
    "Attributes",
    "Block",
    "Conversion",
    "ConversionEnd",
    "Detach",
    "DeviceMemory",
    "Discard",
    "Event",
    "Layout",
    "Map",
    "Origin",
    "Plug",
    "PlugRequest",
    "Region",
    "Remark",
    "Reset",
    "Source",
    "StateChange",
    "Unmap",
    "VcpuEntry",
    "Viommu",
]


class Source(msgspec.Struct, eq=False):
    """One guest in one input, shared by all of its events there."""

    name: str
    """The file as it was given; ``<stdin>``."""
    format: str
    """``ramblock``, ``qemu``, ``simpletrace``, ``ftrace`` or ``perf``."""
    guest: str | None = None
    """The process that runs the guest; None: the trace does not name it."""


class Origin(msgspec.Struct, gc=False, frozen=True, order=True):
    """Where an event was read: printed as ``file:line``."""

    name: str
    line: int
    """1-based line, or the record's number in a binary trace."""

    def __str__(self) -> str:
        return f"{self.name}:{self.line}"


class _Event(msgspec.Struct, gc=False):
    time: int | None
    source: Source
    line: int

    @property
    def origin(self) -> Origin:
        """The file and line that it was read from."""
        return Origin(self.source.name, self.line)


class Block(msgspec.Struct, gc=False, frozen=True):
    """A place of RAM in the guest's addresses."""

    name: str
    start: int
    end: int
    offset: int = 0
    """First byte of the place inside the RAM block."""
    confidential: bool | None = None
    """Whether it has a private side; None: not known."""
    host: int | None = None
    """Host virtual address of the first byte."""
    guest_memfd: int | None = None
    """Descriptor of the private side; ``offset`` is inside it. None: none, or not known."""


class Layout(_Event):
    """
    Where blocks are, from here on.

    A place that is given again replaces those that it overlaps.
    """

    blocks: tuple[Block, ...]
    targets: tuple[str, ...] = ()
    """Targets that map all of the RAM."""
    unmap: str | None = None
    """
    The rule for an unmap: ``exact`` one whole mapping, ``whole`` mappings, ``cut`` any range.

    None: not known.
    """
    removed: bool = False
    """The places are gone."""
    ends: bool = False
    """Every conversion of this source has its :class:`ConversionEnd`, and one follows the other."""


class Conversion(_Event):
    """A conversion begins: the guest asks, or the VMM starts."""

    start: int
    end: int
    private: bool
    vcpu: str | None = None
    """The thread that does it; its :class:`VcpuEntry` ends the conversion."""


class ConversionEnd(_Event):
    """A conversion is over; nothing of it may be left half-done."""

    start: int
    end: int
    private: bool
    began: int | None = None
    """When it had begun; None: not known."""
    result: str = "done"


class VcpuEntry(_Event):
    """A vCPU goes on running the guest: the conversion that it was in is over."""

    vcpu: str


class Attributes(_Event):
    """Pages became private or shared for the guest."""

    start: int
    end: int
    private: bool
    vcpu: str | None = None


class StateChange(_Event):
    """The page states of a block changed. Relative to the block, which the trace may not name."""

    block: str | None
    start: int
    end: int
    private: bool


class Map(_Event):
    """A target mapped a range."""

    target: str
    start: int
    end: int
    writable: bool = True
    done: bool = True
    """False: the call failed; nothing is mapped."""
    key: int | None = None
    """The physical address: the same again at the same place is another domain's copy."""
    host: int | None = None


class Unmap(_Event):
    """A target unmapped a range."""

    target: str
    start: int
    end: int
    unmapped: int | None = None
    """Bytes that were really unmapped; None: the trace does not tell, and it is taken as done."""
    done: bool = True
    """False: the call failed; everything that was mapped there still is."""


class Region(_Event):
    """
    A region of RAM whose pages have no discard manager came to the guest, or went.

    A VMM maps all of it; where the trace has no maps, this stands for them.
    """

    start: int
    end: int
    added: bool
    host: int | None = None


class DeviceMemory(_Event):
    """A device has memory of its own that will be mapped too, of so many bytes: it is no RAM."""

    size: int


class Reset(_Event):
    """The guest starts again: all of its confidential pages are private."""


class Viommu(_Event):
    """The guest has an IOMMU of its own: IOVAs are not guest addresses from here on."""


class Discard(_Event):
    """Memory was given back to the host: of the shared side, or the private one."""

    start: int
    end: int
    shared: bool = True
    host: int | None = None
    """Where ``start`` and ``end`` are host virtual addresses, this is ``start``; else None."""
    done: bool = True


class Access(_Event):
    """A device's access. Those that succeed are in few traces."""

    target: str
    start: int
    end: int | None
    write: bool
    refused: bool
    """The IOMMU refused it: a fault."""
    device: str | None = None
    """As the trace names it: a PCI address, or bus, device and function."""


class Attach(_Event):
    """
    A target is there, or a device was attached to it.

    The same again, without a *device* and before its :class:`Detach`, is a further target of that
    name, which the trace does not tell from the first: each maps everything.
    """

    target: str
    device: str | None = None


class Detach(_Event):
    """A target is gone, and its mappings with it."""

    target: str


class PlugRequest(_Event):
    """virtio-mem: the guest asks for memory, or gives some back; its :class:`Plug` follows."""

    start: int
    end: int
    plugged: bool


class Plug(_Event):
    """virtio-mem: memory was plugged or unplugged."""

    start: int
    end: int
    plugged: bool
    done: bool = True
    """False: the request was refused, and nothing has changed."""


class Remark(_Event):
    """A report of the trace itself: a rule that its writer saw broken, events that it lost."""

    rule: str
    text: str
    target: str | None = None
    start: int | None = None
    end: int | None = None
    stale: bool = False
    """The writer saw a mapping that stayed though it should have gone."""
    lost: bool = False
    """The trace has gaps from here on."""


Event: TypeAlias = (
    Layout
    | Conversion
    | ConversionEnd
    | VcpuEntry
    | Attributes
    | StateChange
    | Map
    | Unmap
    | Region
    | DeviceMemory
    | Reset
    | Viommu
    | Discard
    | Access
    | Attach
    | Detach
    | PlugRequest
    | Plug
    | Remark
)
