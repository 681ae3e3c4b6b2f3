# SPDX-License-Identifier: Apache-2.0
"""
The seam between what to map and how: two verbs and a description of what the target can do.

No target knows page states; the mapper knows no ioctl.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from ramblock.units import PAGE_SIZE


class MappingPolicy(Enum):
    """How much one mapping covers."""

    #: One mapping per page: any target can unmap any page later. 65,535 entries are 256 MiB.
    PAGE = "page"
    RUN = "run"  #: One mapping per run of each conversion; the target has to cut.
    AUTO = "auto"  #: ``RUN`` where the target cuts, else ``PAGE``.


@dataclass(frozen=True, slots=True)
class DmaCapabilities:
    """What a target can do."""

    #: Smallest piece it maps, in bytes; addresses and sizes are multiples of it.
    page_size: int = PAGE_SIZE
    max_mappings: int | None = None  #: How many mappings may exist at once; None: any number.
    #: An unmap may remove a part of a mapping while the rest stays mapped without a gap.
    cut: bool = False
    exact: bool = False
    """An unmap must name one whole mapping (libvfio-user: dma_controller_remove_region())."""
    #: Half-open ranges of addresses that devices can use; None: all of them.
    iova_ranges: tuple[tuple[int, int], ...] | None = None


class HostRange(NamedTuple):
    """Where the bytes are on this host."""

    fd: int | None  #: Descriptor of the memory; None for anonymous memory.
    offset: int  #: First byte in the descriptor.
    address: int  #: Host virtual address of the first byte.
    size: int  #: In bytes.


class DmaTarget(Protocol):
    """
    Whatever maps IOVAs for devices. The mapper uses these and nothing else.

    A call that raises :class:`~ramblock.errors.DmaError`, with ``iova`` and ``size`` of the call,
    has done nothing, unless the error says ``in_doubt``. After any other exception the call may or
    may not have been carried out, and the mapper finds out.
    """

    @property
    def capabilities(self) -> DmaCapabilities:
        """What it can do; does not change while something is mapped."""

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """
        Let devices reach *memory* at *iova*.

        :raises DmaError: EEXIST: something is mapped there. ENOSPC: no entry is left. EINVAL:
            misaligned, out of range.
        """

    def unmap(self, iova: int, size: int) -> int:
        """
        Take ``[iova, iova + size)`` away from devices; no access to it is under way on return.

        :return: Bytes really unmapped; 0 where nothing was mapped.
        :raises DmaError: EINVAL: misaligned, or it would cut a mapping and the target cannot.
            ENOENT: no such mapping (exact). ENOSPC: no entry is left for the part behind a cut.
        """

    def close(self) -> None:
        """Unmap everything and let go of the devices."""
