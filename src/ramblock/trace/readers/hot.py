# SPDX-License-Identifier: Apache-2.0
"""
The fast way: one pattern over a chunk for the lines that recordings mostly consist of.

A pattern here is narrower than the careful way, and whatever it does not match goes that way, in
its place; so both give the same events (``tests/trace/test_hot.py``). A line costs some 2 µs here,
one of a run 0.5 µs, and 10 to 20 µs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ramblock.trace.events import Event
from ramblock.trace.readers.detect import format_of
from ramblock.trace.readers.hot_calls import HotCalls
from ramblock.trace.readers.hot_kernel import HotKernel
from ramblock.trace.readers.hot_qemu import HotQemu

__all__ = ["FastTextReader"]

# The first event: our script's, the kernel's, or QEMU's. It decides which shapes to look for.
_FIRST = re.compile(
    rb"(?:^|\s)ramblock-vfio ()"
    rb"|\d: {1,24}(?:iommu:|kvm:)?(?:map|unmap|kvm_\w{1,32}|dma_\w{1,32}): ()"
    rb"|(?:^|[ :\"])(?:iommufd|kvm|ram_block|sev|tdx|vfio|virtio_mem)_\w{1,64} ()",
    re.MULTILINE,
)
_STYLES = ("bpftrace", "ftrace", "qemu")


class FastTextReader(HotQemu, HotKernel, HotCalls):
    """The reader of text; the same as the careful one, faster."""

    #: The shapes to look for; None: not known yet.
    _style: str | None = None

    def _block(self, block: bytes, found: list[Event]) -> None:
        if self._style is None:
            if self.counts.by_name:
                self._style = format_of(self.counts.by_name)
            elif first := _FIRST.search(block):
                self._style = _STYLES[(first.lastindex or 1) - 1]
            else:
                self.block_with_care(block, found)
                return
        before = len(found)
        careful = 0
        for start, end in self._spans(block, 0, found):
            careful += end - start
            self.block_with_care(block[start:end], found)
        if careful > len(block) // 2 and len(found) > before:
            self._style = None  # it has become another kind of text

    def _spans(self, block: bytes, position: int, found: list[Event]) -> Iterator[tuple[int, int]]:
        """Read the hot lines; yield the spans of the others, each to be read when it comes."""
        if self._style == "qemu":
            return self.hot_qemu(block, position, found)
        if self._style == "ftrace":
            return self.hot_kernel(block, position, found)
        return self.hot_calls(block, position, found)
