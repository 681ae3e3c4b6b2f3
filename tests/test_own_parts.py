"""The parts that the documentation shows pass the conformance kit, and work together in a guest."""

import pytest

from own_parts import Balloon, DictDevice, DictTarget, Migration
from ramblock import GuestMemory, PageState, RamBlock, RamSection
from ramblock.errors import ConversionError
from ramblock.testing.conformance import check_listener, check_source, check_target

PAGE = 4096


def change(balloon: Balloon, offset: int, size: int, populate: bool) -> None:
    (balloon.deflate if populate else balloon.inflate)(offset, size)


def test_the_target() -> None:
    check_target(DictTarget, device=DictDevice, examples=50)


def test_the_source() -> None:
    check_source(Balloon, change=change)


@pytest.mark.parametrize("most", [3, 100])
def test_the_listener(most: int) -> None:
    check_listener(lambda: Migration(most=most), Migration.held)


def test_all_of_them_in_one_guest() -> None:
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        memory, target, migration = GuestMemory(), DictTarget(), Migration(most=6)
        memory.map(block, 0)
        memory.attach(target)
        block.discard_manager.register_listener(migration, RamSection(block, 0, block.size))
        balloon = Balloon(block)
        memory.convert(0, 4 * PAGE, PageState.SHARED)
        balloon.inflate(PAGE, PAGE)
        assert set(target.table) == pages_of_migration(migration) == {0, 2 * PAGE, 3 * PAGE}
        with pytest.raises(ConversionError) as caught:
            memory.convert(4 * PAGE, 4 * PAGE, PageState.SHARED)
        assert caught.value.target is migration
        assert isinstance(caught.value.__cause__, MemoryError)
        DictDevice(target).write(2 * PAGE, b"device")
        assert block.read(2 * PAGE, 6) == b"device"
        assert set(target.table) == pages_of_migration(migration) == {0, 2 * PAGE, 3 * PAGE}


def pages_of_migration(migration: Migration) -> set[int]:
    return {page for page, _ in migration.held()}
