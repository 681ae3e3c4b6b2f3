"""Who keeps whom alive: a target what it reaches, and nobody anything else."""

import gc
import logging
import weakref
from pathlib import Path

import pytest

from doubles import PAGE
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import PoisonedError
from ramblock.guest import block as module
from ramblock.testing import FaultyTarget


def is_mapped(name: str) -> bool:
    """Whether a memfd of that name is mapped into this process."""
    gc.collect()
    return f"/memfd:{name} " in Path("/proc/self/maps").read_text()


def make(name: str, target: SoftIommu) -> tuple[GuestMemory, RamBlock]:
    memory = GuestMemory()
    block = RamBlock.create(name, 4 * PAGE, private="stand-in")
    memory.map(block, 0)
    memory.attach(target)
    memory.convert(0, PAGE, PageState.SHARED)
    block.write(0, b"reachable")
    return memory, block


def test_a_device_does_not_outlive_the_memory_it_reaches() -> None:
    iommu = SoftIommu()
    memory, block = make("forgotten", iommu)
    del memory, block
    assert is_mapped("forgotten")
    assert iommu.read(0, 9) == b"reachable"
    del iommu
    assert not is_mapped("forgotten")


def test_also_what_was_mapped_after_the_device_came() -> None:
    iommu = SoftIommu()
    memory, block = make("attached-first", iommu)
    second = RamBlock.create("attached-second", PAGE)
    memory.map(second, 8 * PAGE)
    del memory, block, second
    assert iommu.read(8 * PAGE, 1) == b"\0"
    del iommu
    assert not is_mapped("attached-first")
    assert not is_mapped("attached-second")


@pytest.mark.parametrize("how", ["detach", "unmap", "close"])
def test_a_device_keeps_nothing_that_it_does_not_reach(how: str) -> None:
    iommu = SoftIommu()
    memory, block = make("let-go", iommu)
    if how == "detach":
        memory.detach(memory.mappers[0])
    elif how == "unmap":
        memory.unmap(memory.sections[0])
    else:
        block.close()
    assert iommu.mappings() == []
    del memory, block
    assert not is_mapped("let-go")


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_nothing_is_kept_when_nobody_holds_anything(closed: bool, detached: bool) -> None:
    iommu = SoftIommu()
    memory, block = make("gone", iommu)
    mapper = memory.mappers[0]
    watched = [weakref.ref(thing) for thing in (iommu, memory, block, mapper)]
    if detached:
        memory.detach(mapper)
    if closed:
        block.close()
    del iommu, memory, block, mapper
    assert not is_mapped("gone")
    assert [reference() for reference in watched] == [None] * 4


@pytest.mark.parametrize("how", ["detach", "unmap", "close"])
def test_what_is_in_doubt_stays_as_long_as_the_device(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    iommu = SoftIommu()
    target = FaultyTarget(iommu)
    memory = GuestMemory()
    block = RamBlock.create("in-doubt", 4 * PAGE, private="stand-in")
    memory.map(block, 0)
    memory.attach(target)
    memory.convert(0, PAGE, PageState.SHARED)
    block.write(0, b"reachable")
    target.short_unmap = range(1, 100)
    with pytest.raises(PoisonedError):
        memory.convert(0, PAGE, PageState.PRIVATE)
    if how == "detach":
        memory.detach(memory.mappers[0])
    elif how == "unmap":
        memory.unmap(memory.sections[0])
    else:
        block.close()
    del memory, block
    assert is_mapped("in-doubt")
    assert iommu.read(0, 9) == b"reachable"
    while module._kept:
        module._kept.pop().close()
