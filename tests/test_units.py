import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.errors import UsageError
from ramblock.units import (
    ADDRESS_LIMIT,
    GIB,
    KIB,
    MIB,
    PAGE_SIZE,
    TIB,
    check_granularity,
    check_positive,
    check_range,
    format_size,
    parse_size,
)

NOT_INTS = [None, "0", b"0", 0.0, 4096.0, True, False, [], object()]


def check(start: object, size: object, *, limit: int = ADDRESS_LIMIT, align: int = 1) -> None:
    check_range(start, size, limit=limit, align=align, what="range")  # type: ignore[arg-type]  # hostile on purpose


def test_page_size_is_the_hosts() -> None:
    assert PAGE_SIZE == mmap.PAGESIZE
    assert PAGE_SIZE & (PAGE_SIZE - 1) == 0


@pytest.mark.parametrize(
    ("start", "size", "limit", "align"),
    [
        (0, 1, 1, 1),
        (0, 4096, 4096, 4096),
        (4096, 4096, 8192, 4096),
        (1, 1, 2, 1),
        (ADDRESS_LIMIT - 4096, 4096, ADDRESS_LIMIT, 4096),
        (0, ADDRESS_LIMIT, ADDRESS_LIMIT, 4096),
    ],
)
def test_good_ranges(start: int, size: int, limit: int, align: int) -> None:
    check(start, size, limit=limit, align=align)


@pytest.mark.parametrize(
    ("start", "size", "limit", "align", "text"),
    [
        (0, 0, 4096, 1, "must be positive"),
        (0, -1, 4096, 1, "must be positive"),
        (-1, 1, 4096, 1, "must not be negative"),
        (-4096, 8192, 8192, 4096, "must not be negative"),
        (0, 4097, 4096, 1, r"\[0x0, 0x1001\) does not lie in \[0x0, 0x1000\)"),
        (4096, 1, 4096, 1, r"does not lie in \[0x0, 0x1000\)"),
        (ADDRESS_LIMIT - 4096, 8192, ADDRESS_LIMIT, 4096, "does not lie in"),
        (ADDRESS_LIMIT, 4096, ADDRESS_LIMIT, 4096, "does not lie in"),
        (4096, ADDRESS_LIMIT, ADDRESS_LIMIT, 4096, "does not lie in"),
        (10**30, 4096, ADDRESS_LIMIT, 1, "does not lie in"),
        (1, 4096, 8192, 4096, "not aligned to 0x1000 bytes"),
        (4096, 1, 8192, 4096, "not aligned to 0x1000 bytes"),
    ],
)
def test_bad_ranges(start: int, size: int, limit: int, align: int, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        check(start, size, limit=limit, align=align)
    assert caught.value.value == (start, size)
    assert caught.value.expected is not None


@pytest.mark.parametrize("wrong", NOT_INTS)
def test_what_is_no_int_is_no_range(wrong: object) -> None:
    for start, size in ((wrong, 4096), (0, wrong), (wrong, wrong)):
        with pytest.raises(UsageError, match="whole numbers"):
            check(start, size)


@given(st.integers(), st.integers(), st.integers(1, 1 << 70), st.integers(0, 30))
def test_a_range_passes_if_and_only_if_it_is_good(
    start: int, size: int, limit: int, shift: int
) -> None:
    align = 1 << shift
    good = start >= 0 and size > 0 and start + size <= limit
    good = good and start % align == 0 and size % align == 0
    if good:
        check(start, size, limit=limit, align=align)
    else:
        with pytest.raises(UsageError):
            check(start, size, limit=limit, align=align)


@pytest.mark.parametrize("granularity", [1, 2, 4096, 2 * MIB, 1 << 63])
def test_good_granularity(granularity: int) -> None:
    check_granularity(granularity, "thing")


@pytest.mark.parametrize("granularity", [0, -1, -4096, 3, 4097, 12288, *NOT_INTS])
def test_bad_granularity(granularity: object) -> None:
    with pytest.raises(UsageError, match=r"thing: granularity .* is not a power of two"):
        check_granularity(granularity, "thing")  # type: ignore[arg-type]  # hostile on purpose


@pytest.mark.parametrize("number", [0, -1, *NOT_INTS])
def test_not_positive(number: object) -> None:
    check_positive(1, "thing")
    with pytest.raises(UsageError, match=r"thing .* is not a positive number"):
        check_positive(number, "thing")  # type: ignore[arg-type]  # hostile on purpose


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (4 * KIB, "4 KiB"),
        (MIB, "1 MiB"),
        (MIB - KIB, "1023 KiB"),
        (GIB + GIB // 2, "1.5 GiB"),
        (2 * TIB, "2 TiB"),
        (4096 * TIB, "4096 TiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("010", 10),
        ("0x1000", 0x1000),
        ("0X1B", 0x1B),
        ("0x10B", 0x10B),
        ("12B", 12),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("4kb", 4 * KIB),
        ("2MiB", 2 * MIB),
        (" 4 GiB ", 4 * GIB),
        ("16T", 16 * TIB),
        ("0x10K", 16 * KIB),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "K",
        "B",
        "iB",
        "-1",
        "-4K",
        "+1",
        "1.5G",
        "1e3",
        "4KK",
        "4iB",
        "0x",
        "0xG",
        "1_000",
        "٤",
        "9" * 5000,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.value == text


@given(st.integers(0, 1 << 70))
def test_sizes_there_and_back(size: int) -> None:
    assert parse_size(str(size)) == parse_size(hex(size)) == size
    text = format_size(size)
    if "." not in text:
        assert parse_size(text) == size
