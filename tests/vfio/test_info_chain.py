import ctypes
import errno
import struct
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.info_chain import ask_with_chain, read_array, read_structure, walk_chain
from ramblock.dma.type1 import Type1Limits, parse_type1_info
from ramblock.errors import DmaError
from ramblock.uapi.vfio import CapabilityHeader, IovaRange, Type1Info
from ramblock.vfio.region import RegionLayout, parse_region_info

T = TypeVar("T")
HEAD = ctypes.sizeof(Type1Info)


def info(flags: int = 3, page_sizes: int = 0x1000, first: int = HEAD, *parts: bytes) -> bytes:
    rest = b"".join(parts)
    return struct.pack("=IIQII", HEAD + len(rest), flags, page_sizes, first, 0) + rest


def available(count: int, following: int) -> bytes:
    return struct.pack("=HHIII", 3, 1, following, count, 0)


def ranges(following: int, *entries: tuple[int, int], count: int | None = None) -> bytes:
    head = struct.pack("=HHIII", 1, 1, following, len(entries) if count is None else count, 0)
    return head + b"".join(struct.pack("=QQ", *entry) for entry in entries)


def outcome(parse: Callable[[], T]) -> T | None:
    """
    What was parsed; None if it was refused in the one way there is.

    Any other exception gets out.
    """
    try:
        return parse()
    except DmaError as error:
        if error.errno != errno.EPROTO:
            raise
        return None


def test_what_type1_says() -> None:
    answer = info(
        3,
        0x4020_1000,
        HEAD,
        available(65000, HEAD + 16),
        ranges(0, (0, 0xFFF), (0x2000, 2**64 - 1)),
    )
    # The kernel's ends are inclusive, ours are not.
    assert parse_type1_info(answer) == Type1Limits(0x1000, ((0, 0x1000), (0x2000, 1 << 64)), 65000)


def test_a_kernel_that_says_little() -> None:
    # Linux 4.x: no capabilities; the limit is what it always was.
    assert parse_type1_info(info(1, 0x1000, 0)) == Type1Limits(0x1000, None, 65535)
    # Without the flag, what stands at cap_offset is not looked at.
    assert parse_type1_info(info(0, 0x10000, 4096)) == Type1Limits(4096, None, 65535)


def test_no_limit() -> None:
    assert parse_type1_info(info(3, 0x1000, HEAD, available(0xFFFF_FFFF, 0))).available is None
    assert parse_type1_info(info(3, 0x1000, HEAD, available(0, 0))).available == 0


def test_a_large_page_size() -> None:
    assert parse_type1_info(info(1, 0x5_0000, 0)).page_size == 0x1_0000


def test_capabilities_that_nobody_knows_are_passed_over() -> None:
    unknown = struct.pack("=HHI", 77, 9, HEAD + 8)
    assert parse_type1_info(info(3, 0x1000, HEAD, unknown, available(5, 0))).available == 5


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        info()[:-1],
        info(3, 0x1000, HEAD),  # the chain begins where the answer ends
        info(3, 0x1000, HEAD, available(1, HEAD)),  # leads back to itself
        info(3, 0x1000, HEAD, available(1, 0xFFFF_FFFF)),
        info(3, 0x1000, HEAD, available(1, 0)[:-5]),
        info(3, 0x1000, HEAD, ranges(0, (0, 1), count=2)),
        info(3, 0x1000, HEAD, ranges(0, (0, 1), count=0xFFFF_FFFF)),
        info(3, 0x1000, HEAD, ranges(0, (0x2000, 0x1000))),
    ],
)
def test_an_answer_that_contradicts_itself(answer: bytes) -> None:
    with pytest.raises(DmaError) as caught:
        parse_type1_info(answer)
    assert caught.value.errno == errno.EPROTO


@given(st.binary(max_size=200), st.integers(0, 1 << 32))
def test_a_chain_of_any_bytes_ends(answer: bytes, first: int) -> None:
    entries = outcome(lambda: list(walk_chain(answer, first)))
    if entries is not None:
        assert len({entry.offset for entry in entries}) == len(entries)
        assert all(entry.offset + 8 <= len(answer) for entry in entries)


@given(st.binary(max_size=120), st.integers(0, 3), st.integers(0, 200))
def test_any_bytes_are_limits_or_an_error(rest: bytes, flags: int, first: int) -> None:
    limits = outcome(lambda: parse_type1_info(info(flags, 0x1000, first, rest)))
    if limits is not None:
        assert limits.page_size == 0x1000
        assert all(start < end <= 1 << 64 for start, end in limits.iova_ranges or ())


@given(st.binary(max_size=120))
def test_any_bytes_are_a_region_or_an_error(answer: bytes) -> None:
    layout = outcome(lambda: parse_region_info(answer))
    assert layout is None or isinstance(layout, RegionLayout)


def test_a_region_of_which_parts_can_be_mapped() -> None:
    # As with MSI-X tables in the middle of a BAR on kernels that do not let them be mapped.
    areas = struct.pack("=HHIIIQQQQ", 1, 1, 0, 2, 0, 0, 0x1000, 0x2000, 0x2000)
    answer = struct.pack("=IIIIQQ", 32 + len(areas), 0xF, 2, 32, 0x4000, 2 << 40) + areas
    layout = parse_region_info(answer)
    assert layout.mappable == ((0, 0x1000), (0x2000, 0x4000))
    assert (layout.index, layout.size, layout.offset) == (2, 0x4000, 2 << 40)


def test_reading_past_the_end() -> None:
    assert read_array(b"", 0, IovaRange, 0) == []
    for offset, size in ((0, 7), (1, 8), (8, 8)):
        with pytest.raises(DmaError, match="are expected at"):
            read_structure(bytes(size), offset, CapabilityHeader)


def test_asking_until_there_is_room() -> None:
    sizes = []

    def answer(buffer: ctypes.Array[ctypes.c_char]) -> None:
        sizes.append(len(buffer))
        # More is there the second time than the first answer said.
        wanted = ctypes.c_uint32.from_buffer(buffer)
        assert wanted.value == len(buffer)
        wanted.value = min(100, len(buffer) + 40)

    assert len(ask_with_chain(Type1Info, answer)) == 100
    assert sizes == [HEAD, HEAD + 40, 100]


def test_an_answer_of_absurd_size_is_not_asked_for() -> None:
    def answer(buffer: ctypes.Array[ctypes.c_char]) -> None:
        ctypes.c_uint32.from_buffer(buffer).value = 0xFFFF_FFFF

    with pytest.raises(DmaError, match="0xffffffff"):
        ask_with_chain(Type1Info, answer)
