"""The client against the server that users have: the probe, on a UNIX socket."""

import errno
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.errors import ConversionError, DmaError, IommuFault, PoisonedError
from ramblock.hostmem.host_calls import address_of
from ramblock.probe.server import Probe
from ramblock.probe.windows import UnmapRule
from ramblock.testing.conformance import check_target
from ramblock.units import PAGE_SIZE
from ramblock.vfio import probe_registers as registers

P = PAGE_SIZE
BASE = 1 << 32


@pytest.fixture(params=UnmapRule)
def probe(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Probe]:
    with Probe(tmp_path / "probe.sock", unmap=request.param) as probe:
        yield probe
    assert probe.error is None


def test_it_is_a_target_like_any_other(probe: Probe) -> None:
    def reaches(target: VfioUserTarget, iova: int) -> bool:
        try:
            probe.read(iova, 1)
        except IommuFault:
            return False
        return next(w for w in target.mappings() if w.iova <= iova < w.end).writable

    check_target(lambda: VfioUserTarget(probe.path), reaches=reaches, examples=40)
    assert probe.record.clean


def test_thousands_of_windows(probe: Probe) -> None:
    target = VfioUserTarget(probe.path)
    with RamBlock.create("ram", 5000 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        mapper = memory.attach(target)
        memory.convert(BASE, 5000 * P, PageState.SHARED)
        assert len(probe.windows) == mapper.entries == 5000
        block.write(4321 * P, b"there")
        assert probe.read(BASE + 4321 * P, 5) == b"there"
        memory.convert(BASE + P, 4998 * P, PageState.PRIVATE)
        assert [window.address for window in probe.windows] == [BASE, BASE + 4999 * P]
        memory.detach(mapper)
        assert probe.windows == []
    target.close()
    assert probe.record.clean


def test_its_device_reaches_memory_by_message(probe: Probe) -> None:
    """
    Memory without descriptor: the answer to the register's write waits for what the client serves
    meanwhile.
    """
    mapping = mmap.mmap(-1, P)
    target = VfioUserTarget(probe.path)
    target.map(BASE, HostRange(None, 0, address_of(mapping), P))
    mapping[16:21] = b"hello"
    setting = struct.pack("<QII", BASE + 16, 5, 1)
    target.region_write(0, registers.Register.ADDRESS, setting)
    assert struct.unpack("<I", target.region_read(0, registers.Register.RESULT, 4)) == (0,)
    assert target.region_read(0, registers.DATA, 5) == b"hello"
    target.unmap(BASE, P)
    target.region_write(0, registers.Register.ADDRESS, setting)
    assert struct.unpack("<I", target.region_read(0, registers.Register.RESULT, 4)) == (14,)
    assert target.violations == 0
    target.close()
    mapping.close()


def test_the_probe_stops(probe: Probe) -> None:
    target = VfioUserTarget(probe.path)
    with RamBlock.create("ram", 4 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(target)
        memory.convert(BASE, 2 * P, PageState.SHARED)
        probe.stop()
        with pytest.raises(PoisonedError) as caught:
            memory.convert(BASE, 2 * P, PageState.PRIVATE)
        assert isinstance(caught.value.__cause__, DmaError)
        assert caught.value.__cause__.in_doubt
    target.close()


def test_maps_beyond_the_most_windows_are_refused_until_there_may_be_more(probe: Probe) -> None:
    target = VfioUserTarget(probe.path)
    with RamBlock.create("ram", 8 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        memory.attach(target)
        memory.convert(BASE, 2 * P, PageState.SHARED)
        probe.max_windows = 4
        with pytest.raises(ConversionError, match="nothing has changed") as caught:
            memory.convert(BASE + 2 * P, 4 * P, PageState.SHARED)
        assert isinstance(caught.value.__cause__, DmaError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert [window.address for window in probe.windows] == [BASE, BASE + P]
        probe.max_windows = None
        memory.convert(BASE + 2 * P, 4 * P, PageState.SHARED)
        assert len(probe.windows) == 6
        assert probe.max_windows is None
        for mapper in memory.mappers:
            memory.detach(mapper)
    target.close()


def test_limit_holds_for_a_client_that_comes_later(tmp_path: Path) -> None:
    with Probe(tmp_path / "limited.sock", max_windows=1) as probe:
        target = VfioUserTarget(probe.path)
        with RamBlock.create("ram", 2 * P) as block:
            address = HostRange(block.fd, 0, 0, P)
            target.map(BASE, address)
            with pytest.raises(DmaError) as caught:
                target.map(BASE + P, address)
            assert caught.value.errno == errno.ENOSPC
            target.unmap(BASE, P)
            target.map(BASE + P, address)
            target.unmap(BASE + P, P)
        target.close()
