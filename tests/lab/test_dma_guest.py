"""
A guest's memory behind real targets: a device reaches what is shared and nothing else, and the
kernel's own books agree.
"""

import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iommu_trace import IommuTrace
from lab_devices import BASE, BOUNCE, Rig, Way, entry_limit, open_rig, wait_for_fault
from lab_faults import FaultLog
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import DmaError, MappingLimitError, UsageError
from ramblock.testing import RecordingTarget
from ramblock.units import KIB, MIB, PAGE_SIZE
from ramblock.vfio import BouncePage

pytestmark = pytest.mark.lab_variant("intel-iommu", "amd-iommu", "one-vcpu")

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
HUGE = 2 * MIB
BLOCK = 8 * MIB


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@pytest.fixture
def blocks() -> Iterator[tuple[RamBlock, RamBlock]]:
    """Two blocks that lie side by side in the guest."""
    with (
        RamBlock.create("low", BLOCK, private="stand-in") as low,
        RamBlock.create("high", BLOCK, private="stand-in") as high,
    ):
        yield low, high


@pytest.fixture
def memory(blocks: tuple[RamBlock, RamBlock]) -> GuestMemory:
    memory = GuestMemory()
    for number, block in enumerate(blocks):
        memory.map(block, BASE + number * BLOCK)
    return memory


def check_borders(rig: Rig, memory: GuestMemory, gpa: int, size: int) -> None:
    """
    Compare what the device reaches with the states, on both sides of both ends and in between.
    """
    inside = range(gpa, gpa + size, max(PAGE_SIZE, size // 7 // PAGE_SIZE * PAGE_SIZE))
    for at in {gpa - PAGE_SIZE, *inside, gpa + size - PAGE_SIZE, gpa + size}:
        if BASE <= at < BASE + 2 * BLOCK:
            assert rig.reaches(at) == (memory.state(at) is SHARED), hex(at)


# -- conversions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, PAGE_SIZE),
        (HUGE, HUGE),
        (HUGE + 3 * PAGE_SIZE, HUGE),
        (HUGE, HUGE + 5 * PAGE_SIZE),
        (PAGE_SIZE, 3 * HUGE - 2 * PAGE_SIZE),
        (BLOCK - HUGE, 2 * HUGE),
        (BLOCK - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
    ids=["page", "2M", "inside-2M", "past-2M", "between", "two-blocks", "pages-of-two-blocks"],
)
def test_shared_is_reached_and_private_is_not(
    rig: Rig, memory: GuestMemory, offset: int, size: int
) -> None:
    mapper = memory.attach(rig.target)
    gpa = BASE + offset
    check_borders(rig, memory, gpa, size)
    result = memory.convert(gpa, size, SHARED)
    pieces = 1 + (offset < BLOCK < offset + size)
    assert result.map_calls == (pieces if rig.way is Way.CUTTING else size // PAGE_SIZE)
    check_borders(rig, memory, gpa, size)
    # A page of its middle, and its first.
    for part in (gpa + size // 2 // PAGE_SIZE * PAGE_SIZE, gpa):
        memory.convert(part, PAGE_SIZE, PRIVATE)
        check_borders(rig, memory, part, PAGE_SIZE)
        memory.convert(part, PAGE_SIZE, SHARED)
        check_borders(rig, memory, part, PAGE_SIZE)
    memory.convert(gpa, size, PRIVATE)
    check_borders(rig, memory, gpa, size)
    assert (mapper.entries, mapper.mapped_bytes) == (0, 0)


def test_detached_nothing_is_reached(rig: Rig, memory: GuestMemory) -> None:
    memory.convert(BASE, HUGE, SHARED)
    mapper = memory.attach(rig.target)
    check_borders(rig, memory, BASE, HUGE)
    memory.detach(mapper)
    assert not rig.reaches(BASE)
    assert not rig.reaches(BASE + HUGE - PAGE_SIZE)


def test_ordinary_ram_is_mapped_and_a_rom_not_for_writing(rig: Rig) -> None:
    with RamBlock.create("ram", MIB) as ram, RamBlock.create("rom", MIB) as rom:
        memory = GuestMemory()
        memory.map(ram, BASE)
        memory.map(rom, BASE + MIB, readonly=True)
        memory.attach(rig.target)
        rom.write(0, b"firmware")
        assert rig.reaches(BASE + MIB - PAGE_SIZE)
        assert not rig.reaches(BASE + MIB)
        with BouncePage(rig.target, BOUNCE) as bounce:
            assert rig.edu.read_from_ram(BASE + MIB, 8, bounce) == b"firmware"


def test_a_section_where_no_dma_goes_is_refused(rig: Rig) -> None:
    with RamBlock.create("ram", 2 * MIB, private="stand-in") as block:
        memory = GuestMemory()
        # Writes to [0xfee00000, 0xfef00000) are interrupts.
        memory.map(block, 0xFED0_0000)
        with pytest.raises(UsageError, match=r"outside the target's addresses \[0x0, 0xfee00000\)"):
            memory.attach(rig.target)


# -- DMA -------------------------------------------------------------------------------------------


def test_edu_moves_data_in_shared_pages_both_ways(
    rig: Rig, memory: GuestMemory, blocks: tuple[RamBlock, RamBlock]
) -> None:
    memory.attach(rig.target)
    memory.convert(BASE, HUGE, SHARED)
    with BouncePage(rig.target, BOUNCE) as bounce:
        # Across a page border: a translation for each.
        rig.edu.write_to_ram(BASE + HUGE - PAGE_SIZE - 8, b"from the device!", bounce)
        assert blocks[0].read(HUGE - PAGE_SIZE - 8, 16) == b"from the device!"
        blocks[0].write(MIB, b"for the device")
        assert rig.edu.read_from_ram(BASE + MIB, 14, bounce) == b"for the device"


def test_a_page_just_made_private_faults_and_keeps_its_bytes(
    rig: Rig, memory: GuestMemory, blocks: tuple[RamBlock, RamBlock], lab_iommu: str
) -> None:
    memory.attach(rig.target)
    memory.convert(BASE, HUGE, SHARED)
    page = MIB
    with BouncePage(rig.target, BOUNCE) as bounce:
        rig.edu.write_to_ram(BASE + page, b"was reachable", bounce)
        memory.convert(BASE + page, PAGE_SIZE, PRIVATE)
        # What the guest has there now.
        private = blocks[0].private
        assert private is not None
        private.write(page, b"secret")  # type: ignore[attr-defined]  # the stand-in has it
        log = FaultLog()
        lines = wait_for_fault(log, lambda: rig.edu.write_to_ram(BASE + page, b"stolen", bounce))
        if lab_iommu == "intel":
            assert f"fault addr {BASE + page:#x}" in lines[0]
            assert "DMA Write" in lines[0]
        lines = wait_for_fault(log, lambda: rig.edu.load(BASE + page, 6))
        if lab_iommu == "intel":
            assert f"fault addr {BASE + page:#x}" in lines[0]
            assert "DMA Read" in lines[0]
        log.close()
        assert rig.edu.read_from_ram(BASE + page, 6, bounce) not in (b"secret", b"stolen")
        assert private.read(page, 6) == b"secret"  # type: ignore[attr-defined]
        # The shared side was freed, and is not allocated again by a device that tries.
        assert blocks[0].read(page, 13) == bytes(13)
        # Its neighbours go on working.
        for neighbour in (page - PAGE_SIZE, page + PAGE_SIZE):
            rig.edu.write_to_ram(BASE + neighbour, b"neighbour", bounce)
            assert blocks[0].read(neighbour, 9) == b"neighbour"
        memory.convert(BASE + page, PAGE_SIZE, SHARED)
        rig.edu.write_to_ram(BASE + page, b"shared again", bounce)
        assert blocks[0].read(page, 12) == b"shared again"


# -- the budget ------------------------------------------------------------------------------------


def test_type1_is_refused_before_the_kernel_would_refuse(blocks: tuple[RamBlock, RamBlock]) -> None:
    memory = GuestMemory()
    memory.map(blocks[0], BASE)
    with entry_limit(64), open_rig(Way.TYPE1) as rig:
        target = RecordingTarget(rig.target)
        mapper = memory.attach(target)
        assert mapper.limit == 64
        memory.convert(BASE, 60 * PAGE_SIZE, SHARED)
        before = list(target.calls)
        with pytest.raises(MappingLimitError) as caught:
            memory.convert(BASE + MIB, 5 * PAGE_SIZE, SHARED)
        assert (caught.value.limit, caught.value.needed) == (64, 65)
        # The kernel was not asked, and would have said so at the fifth.
        assert target.calls == before
        assert memory.state(BASE + MIB) is PRIVATE
        memory.convert(BASE + MIB, 4 * PAGE_SIZE, SHARED)
        with pytest.raises(DmaError, match="No space left"):
            BouncePage(rig.target, BOUNCE)
        check_borders(rig, memory, BASE + MIB, 4 * PAGE_SIZE)
        # Going private frees entries, whatever the state of the budget.
        memory.convert(BASE, BLOCK, PRIVATE)
        assert mapper.entries == 0
        memory.detach(mapper)


# -- other books -----------------------------------------------------------------------------------


def test_the_kernels_tracepoints_agree(rig: Rig, memory: GuestMemory) -> None:
    target = RecordingTarget(rig.target)
    random_numbers = random.Random(1)
    mapped: set[int] = set()
    with IommuTrace(BASE) as trace:
        mapper = memory.attach(target)
        for _ in range(60):
            count = random_numbers.choice((1, 1, 2, 5, 64, 300))
            first = random_numbers.randrange(2 * BLOCK // PAGE_SIZE - count)
            to = random_numbers.choice((SHARED, SHARED, PRIVATE))
            target.calls.clear()
            memory.convert(BASE + first * PAGE_SIZE, count * PAGE_SIZE, to)
            events = trace.read()
            for verb in ("map", "unmap"):
                said: set[int] = set()
                for call, iova, size in target.calls:
                    if call == verb:
                        said |= set(range(iova // PAGE_SIZE, (iova + size) // PAGE_SIZE))
                told = [event.pages for event in events if event.verb == verb]
                # One unmap may cover holes; no page is mapped or unmapped twice.
                assert set().union(*told) == (said - mapped if verb == "map" else said & mapped)
                assert sum(map(len, told)) == len(set().union(*told))
                mapped = (
                    mapped | set().union(*told) if verb == "map" else mapped - set().union(*told)
                )
            assert len(mapped) * PAGE_SIZE == mapper.mapped_bytes
        shared = {
            (gpa + step) // PAGE_SIZE
            for gpa, size in memory.ranges(SHARED)
            for step in range(0, size, PAGE_SIZE)
        }
        assert mapped == shared
        memory.detach(mapper)
        gone = set().union(*(event.pages for event in trace.read() if event.verb == "unmap"))
        assert gone == mapped


PAGES = 24


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(0, PAGES - 1), st.integers(1, 8), st.sampled_from(PageState)),
        min_size=5,
        max_size=25,
    )
)
def test_the_device_reaches_what_the_software_iommu_has_mapped(
    rig: Rig, todo: list[tuple[int, int, PageState]]
) -> None:
    with RamBlock.create("ram", PAGES * PAGE_SIZE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        soft = SoftIommu(cut=rig.way is Way.CUTTING)
        mappers = [memory.attach(target) for target in (rig.target, soft)]
        for first, count, to in todo:
            memory.convert(BASE + first * PAGE_SIZE, min(count, PAGES - first) * PAGE_SIZE, to)
        expected = {
            (mapping.iova - BASE + step) // PAGE_SIZE
            for mapping in soft.mappings()
            for step in range(0, mapping.size, PAGE_SIZE)
        }
        assert rig.reached(PAGES) == expected
        assert mappers[0].entries == mappers[1].entries == len(soft.mappings())
        for mapper in mappers:
            memory.detach(mapper)


# -- what the policies cost ------------------------------------------------------------------------


def swiotlb_and_drivers() -> Iterator[tuple[int, int, PageState]]:
    """
    A pool of 6 MiB in slices of 2 MiB, then drivers that take and give back buffers.

    As (offset, size, state).
    """
    yield from ((slice_ * HUGE, HUGE, SHARED) for slice_ in range(3))
    random_numbers = random.Random(7)
    taken: list[tuple[int, int]] = []
    free = list(range(0, BLOCK, 64 * KIB))
    random_numbers.shuffle(free)
    for _ in range(300):
        if taken and random_numbers.random() < 0.45:
            offset, size = taken.pop(random_numbers.randrange(len(taken)))
            free.append(offset)
            yield BLOCK + offset, size, PRIVATE
        elif free:
            offset, size = free.pop(), random_numbers.choice((4, 8, 16, 64)) * KIB
            taken.append((offset, size))
            yield BLOCK + offset, size, SHARED


def test_calls_of_page_and_run_for_the_same_work(
    rig: Rig, memory: GuestMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = [MappingPolicy.PAGE]
    if rig.way is Way.CUTTING:
        policies.append(MappingPolicy.RUN)
    lines, reached = [], []
    for policy in policies:
        mapper = memory.attach(rig.target, policy)
        for offset, size, to in swiotlb_and_drivers():
            memory.convert(BASE + offset, size, to)
        reached.append([rig.reaches(at) for at in range(BASE, BASE + 2 * BLOCK, 64 * KIB)])
        lines.append(
            f"{rig.way.value}, policy {policy.value}: {mapper.map_calls} map calls, "
            f"{mapper.unmap_calls} unmap calls, {mapper.entries} mappings for"
            f" {mapper.mapped_bytes // KIB} KiB"
        )
        memory.detach(mapper)
        memory.convert(BASE, 2 * BLOCK, PRIVATE)
    assert all(answer == reached[0] for answer in reached)
    with capsys.disabled():
        sys.stdout.writelines(f"\n{line}" for line in lines)
