"""The arguments of KVM_HC_MAP_GPA_RANGE, by field."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock import PageState
from ramblock.errors import UsageError
from ramblock.kvm import HypercallExit, HypercallResult, MapGpaRange
from ramblock.units import GIB, KIB, MIB

words = st.integers(0, (1 << 64) - 1)


def call(gpa: int, pages: int, word: int, *, nr: int = 12) -> HypercallExit:
    return HypercallExit(nr=nr, args=(gpa, pages, word, 0xDEAD, 0xBEEF, 0), long_mode=True)


@pytest.mark.parametrize(
    ("word", "to", "hint"),
    [
        (0x00, PageState.SHARED, 4 * KIB),
        (0x10, PageState.PRIVATE, 4 * KIB),
        # The hint is not the direction, though it is in the lowest bits.
        (0x01, PageState.SHARED, 2 * MIB),
        (0x02, PageState.SHARED, GIB),
        (0x11, PageState.PRIVATE, 2 * MIB),
        (0x12, PageState.PRIVATE, GIB),
        (0x0F, PageState.SHARED, None),
        (0x13, PageState.PRIVATE, None),
    ],
)
def test_attribute_word_is_read_by_field(word: int, to: PageState, hint: int | None) -> None:
    assert MapGpaRange.decode(call(0x1234_5000, 3, word)) == MapGpaRange(
        gpa=0x1234_5000, size=3 * 4096, to=to, page_size_hint=hint
    )


@given(gpa=words, pages=words, word=words)
def test_any_arguments_are_decoded_or_refused(gpa: int, pages: int, word: int) -> None:
    if word >> 5:
        with pytest.raises(UsageError, match="reserved bits") as caught:
            MapGpaRange.decode(call(gpa, pages, word))
        assert caught.value.value == word
    else:
        request = MapGpaRange.decode(call(gpa, pages, word))
        # No wrap-around: whoever checks the range sees the size that was asked for.
        assert (request.gpa, request.size) == (gpa, pages * 4096)
        assert (request.to is PageState.PRIVATE) == bool(word & 0x10)


@given(nr=words.filter(lambda nr: nr != 12))
def test_other_hypercalls_are_refused(nr: int) -> None:
    with pytest.raises(UsageError, match="is not known"):
        MapGpaRange.decode(call(0, 1, 0, nr=nr))


def test_results_are_what_kvm_takes() -> None:
    # Positive: a negative errno makes the next KVM_RUN fail.
    assert {int(result) for result in HypercallResult} == {0, errno.EINVAL, errno.EAGAIN}
