from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE
from ramblock import RamBlock, RamSection
from ramblock.errors import UsageError
from ramblock.units import ADDRESS_LIMIT


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", 16 * PAGE) as block:
        yield block


def test_defaults_and_ends(block: RamBlock) -> None:
    section = RamSection(block, PAGE, 2 * PAGE)
    assert (section.gpa, section.readonly) == (0, False)
    assert (section.end, section.gpa_end) == (3 * PAGE, 2 * PAGE)


def test_frozen(block: RamBlock) -> None:
    section = RamSection(block, 0, PAGE)
    with pytest.raises(FrozenInstanceError):
        section.offset = 1  # type: ignore[misc]  # that is the test


def test_equal_by_value_and_usable_as_a_key(block: RamBlock) -> None:
    section = RamSection(block, 0, PAGE, 4096)
    assert section == RamSection(block, 0, PAGE, 4096)
    assert {section: 1}[RamSection(block, 0, PAGE, 4096)] == 1
    assert section != RamSection(block, 0, PAGE, 4096, readonly=True)
    with RamBlock.create("ram", 16 * PAGE) as twin:
        assert section != RamSection(twin, 0, PAGE, 4096)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_part_has_its_guest_address_moved_along(block: RamBlock, readonly: bool) -> None:
    section = RamSection(block, 2 * PAGE, 8 * PAGE, 0x10_0000, readonly)
    part = section.part(3 * PAGE, 5 * PAGE)
    assert part == RamSection(block, 3 * PAGE, 2 * PAGE, 0x10_0000 + PAGE, readonly)
    assert part.part(4 * PAGE, 5 * PAGE).gpa == 0x10_0000 + 2 * PAGE
    assert section.part(2 * PAGE, 10 * PAGE) == section


def test_any_alignment(block: RamBlock) -> None:
    # A manager can be asked about any bytes; only those who map them want whole pages.
    assert RamSection(block, 1, 3, 5).part(2, 3) == RamSection(block, 2, 1, 6)


@pytest.mark.parametrize(
    ("offset", "size", "gpa"),
    [
        (-1, PAGE, 0),
        (0, 0, 0),
        (0, -PAGE, 0),
        (0, 17 * PAGE, 0),
        (16 * PAGE, PAGE, 0),
        (1, 16 * PAGE, 0),
        (1 << 64, PAGE, 0),
        (0, PAGE, -1),
        (0, PAGE, ADDRESS_LIMIT),
        (0, 2 * PAGE, ADDRESS_LIMIT - PAGE),
        (True, PAGE, 0),
        (0, None, 0),
        ("0", PAGE, 0),
        (0, PAGE, 0.0),
    ],
)
def test_no_section_that_is_not_in_the_block_and_in_64_bits(
    block: RamBlock, offset: int, size: int, gpa: int
) -> None:
    with pytest.raises(UsageError):
        RamSection(block, offset, size, gpa)


def test_the_last_page_of_the_address_space(block: RamBlock) -> None:
    section = RamSection(block, 0, PAGE, ADDRESS_LIMIT - PAGE)
    assert section.gpa_end == ADDRESS_LIMIT


def test_text(block: RamBlock) -> None:
    section = RamSection(block, PAGE, PAGE, 0x10000)
    assert repr(section) == "<RamSection 'ram' [0x1000, 0x2000) at [0x10000, 0x11000)>"


# -- intersect -------------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(0, 15), st.integers(1, 16)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_intersect_is_the_common_part(inside: tuple[int, int], asked: tuple[int, int]) -> None:
    with RamBlock.create("ram", 32 * PAGE) as block:
        whole = RamSection(block, inside[0] * PAGE, inside[1] * PAGE, 1 << 30, readonly=True)
        part = whole.intersect(asked[0] * PAGE, asked[1] * PAGE)
        common = set(range(inside[0], sum(inside))) & set(range(asked[0], sum(asked)))
        if not common:
            assert part is None
        else:
            start = min(common) * PAGE
            assert part == RamSection(
                block, start, len(common) * PAGE, (1 << 30) + start - whole.offset, readonly=True
            )


def test_intersect_takes_any_alignment(block: RamBlock) -> None:
    whole = RamSection(block, PAGE, 2 * PAGE, 7)
    assert whole.intersect(PAGE + 5, 3) == RamSection(block, PAGE + 5, 3, 12)
    assert whole.intersect(0, 1 << 64) == whole
    assert whole.intersect(0, PAGE) is None
    assert whole.intersect(PAGE, 0) is None


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 5), (0, -1), (1.5, 2), (0, "1"), (None, 1), (True, 1)]
)
def test_intersect_refuses_what_is_no_range(block: RamBlock, offset: int, size: int) -> None:
    with pytest.raises(UsageError):
        RamSection(block, 0, PAGE).intersect(offset, size)
