# SPDX-License-Identifier: Apache-2.0
"""Targets that record and targets that fail, around any other target."""

from __future__ import annotations

import errno
from collections.abc import Collection
from typing import Literal

from ramblock.dma.soft import SoftIommu
from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.errors import DmaError
from ramblock.units import PAGE_SIZE

__all__ = ["FaultyTarget", "RecordingTarget"]


class RecordingTarget:
    """
    Notes every call, then makes it.

    :param inner: The target that does the work; None: a ``SoftIommu()``.
    """

    def __init__(self, inner: DmaTarget | None = None) -> None:
        self.inner: DmaTarget = SoftIommu() if inner is None else inner
        #: ``("map" | "unmap", iova, size)``, oldest first, with the calls that the inner target
        #: refused. May be cleared.
        self.calls: list[tuple[Literal["map", "unmap"], int, int]] = []

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the inner target."""
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Note it and make it."""
        self.calls.append(("map", iova, memory.size))
        self.inner.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Note it and make it."""
        self.calls.append(("unmap", iova, size))
        return self.inner.unmap(iova, size)

    def close(self) -> None:
        """Close the inner target."""
        self.inner.close()

    def __repr__(self) -> str:
        return f"<RecordingTarget of {self.inner!r}>"


class FaultyTarget:
    """
    Fails chosen calls.

    A failing call does nothing and raises ``DmaError`` with EIO; a short unmap leaves the last
    page.

    :param inner: The target that does the rest.
    :param fail_map: 1-based numbers of map calls that fail.
    :param fail_unmap: 1-based numbers of unmap calls that fail.
    :param short_unmap: 1-based numbers of unmap calls that remove too little, and say so.
    """

    def __init__(
        self,
        inner: DmaTarget,
        *,
        fail_map: Collection[int] = (),
        fail_unmap: Collection[int] = (),
        short_unmap: Collection[int] = (),
    ) -> None:
        self.inner = inner
        self.fail_map = fail_map
        self.fail_unmap = fail_unmap
        self.short_unmap = short_unmap
        #: Calls so far.
        self.map_calls = 0
        self.unmap_calls = 0

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the inner target."""
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, or fail."""
        self.map_calls += 1
        if self.map_calls in self.fail_map:
            raise DmaError(
                errno.EIO,
                f"map call {self.map_calls} was told to fail",
                iova=iova,
                size=memory.size,
            )
        self.inner.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, fail, or unmap too little."""
        self.unmap_calls += 1
        if self.unmap_calls in self.fail_unmap:
            raise DmaError(
                errno.EIO, f"unmap call {self.unmap_calls} was told to fail", iova=iova, size=size
            )
        if self.unmap_calls in self.short_unmap:
            return self._unmap_all_but_last_page(iova, size)
        return self.inner.unmap(iova, size)

    def _unmap_all_but_last_page(self, iova: int, size: int) -> int:
        kept = max(self.capabilities.page_size, PAGE_SIZE)
        if size <= kept:
            return 0
        try:
            return self.inner.unmap(iova, size - kept)
        except DmaError:
            return 0  # it cannot cut there: then nothing is removed, which is short too

    def close(self) -> None:
        """Close the inner target."""
        self.inner.close()

    def __repr__(self) -> str:
        return f"<FaultyTarget of {self.inner!r}>"
