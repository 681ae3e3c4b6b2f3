# SPDX-License-Identifier: Apache-2.0
"""A discard source comes and goes: a transaction over the whole block, told to its listener."""

from __future__ import annotations

from collections.abc import Iterator

from cases.replay import ten_runs
from harness.context import Context
from harness.measure import timed
from harness.ours import OURS, RecordingListener, confidential_block
from harness.rows import Row, Samples
from ramblock import PageState, RamBlock, VirtioMem
from ramblock.units import GIB, MIB, TIB

__all__ = ["CASE", "run"]

CASE = "adding and removing a source"


class AskedSource:
    """Calls the lower half of a block populated, and has to be asked granule by granule."""

    granularity = 2 * MIB

    def __init__(self, size: int) -> None:
        self._end = size // 2

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether the range lies in the lower half."""
        return offset + size <= self._end


class RunSource(AskedSource):
    """The same, and it can name its runs."""

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield what of the range lies in the lower half."""
        if offset < self._end:
            yield offset, min(offset + size, self._end) - offset


def run(context: Context) -> Iterator[Row]:
    """Yield two rows per kind of source."""
    context.say(CASE)
    yield from _rows(context, "names its runs", 16 * TIB, RunSource)
    yield from _rows(context, "asked by 2 MiB", GIB, AskedSource)
    yield from _virtio_mem(context)


def _rows(context: Context, name: str, size: int, kind: type[AskedSource]) -> Iterator[Row]:
    added, removed = [], []
    with confidential_block(size, RecordingListener()) as block:
        _share(block)
        source = kind(size)
        manager = block.discard_manager
        for _ in range(context.choose(20, 100)):
            added.append(timed(manager.add_source, source))
            removed.append(timed(manager.remove_source, source))
    yield _row(name, size, "add", added)
    yield _row(name, size, "remove", removed)


def _virtio_mem(context: Context) -> Iterator[Row]:
    """Add a virtio-mem device, with nothing plugged, so that all is discarded, and remove it."""
    added, removed = [], []
    with confidential_block(16 * TIB, RecordingListener()) as block:
        _share(block)
        for _ in range(context.choose(3, 20)):
            added.append(timed(VirtioMem, block, 2 * MIB))
            device = block.discard_manager.sources[-1]
            removed.append(timed(block.discard_manager.remove_source, device))
    yield _row("virtio-mem", 16 * TIB, "add", added)
    yield _row("virtio-mem", 16 * TIB, "remove", removed)


def _share(block: RamBlock) -> None:
    """Share ten runs, or in a small block all of it."""
    attributes = block.attributes
    assert attributes is not None
    for offset, size in ten_runs() if block.size > GIB else [(0, block.size)]:
        attributes.state_change(offset, size, PageState.SHARED)


def _row(name: str, size: int, operation: str, times: list[float]) -> Row:
    shared = "ten runs" if size > GIB else "all"
    samples = Samples()
    samples.add(OURS, times)
    return samples.row(
        CASE,
        {
            "source": name,
            "block": "16 TiB" if size > GIB else "1 GiB",
            "shared": shared,
            "operation": operation,
        },
    )
