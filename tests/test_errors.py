import errno
import inspect

import pytest

from ramblock import PageState, errors
from ramblock.errors import (
    BusyError,
    ConversionError,
    DmaError,
    IommuFault,
    MappingLimitError,
    PoisonedError,
    RamblockError,
    TraceError,
    UsageError,
    describe_range,
)


def test_one_root() -> None:
    classes = [
        thing
        for _, thing in inspect.getmembers(errors, inspect.isclass)
        if issubclass(thing, BaseException) and thing.__module__ == errors.__name__
    ]
    assert len(classes) >= 10
    for cls in classes:
        assert issubclass(cls, RamblockError), cls
        assert cls.__name__ in errors.__all__, cls


@pytest.mark.parametrize(
    ("cls", "bases"),
    [
        (RamblockError, {Exception}),
        (UsageError, {RamblockError, ValueError}),
        (BusyError, {RamblockError}),
        (ConversionError, {RamblockError}),
        (PoisonedError, {ConversionError}),
        (MappingLimitError, {RamblockError}),
        (DmaError, {RamblockError, OSError}),
        (IommuFault, {RamblockError}),
        (TraceError, {RamblockError}),
    ],
)
def test_hierarchy(cls: type[BaseException], bases: set[type[BaseException]]) -> None:
    assert set(cls.__bases__) == bases


def test_usage_error() -> None:
    error = UsageError("no", value=3, expected="4")
    assert (str(error), error.value, error.expected) == ("no", 3, "4")
    assert (UsageError("no").value, UsageError("no").expected) == (None, None)


def test_conversion_error() -> None:
    target = object()
    error = ConversionError(
        "no", gpa=4096, size=8192, to=PageState.PRIVATE, step="unmap", target=target
    )
    assert str(error) == "no"
    assert (error.gpa, error.size, error.to) == (4096, 8192, PageState.PRIVATE)
    assert (error.step, error.target) == ("unmap", target)
    assert error.rolled_back is True
    assert ConversionError("no").gpa is None


def test_poisoned_error_is_a_conversion_error_that_was_not_rolled_back() -> None:
    assert PoisonedError("no").rolled_back is False


def test_mapping_limit_error() -> None:
    error = MappingLimitError("no", limit=10, needed=11)
    assert (str(error), error.limit, error.needed) == ("no", 10, 11)


@pytest.mark.parametrize(
    ("args", "number"),
    [((errno.ENOSPC, "no entry left"), errno.ENOSPC), (("peer went away",), None), ((), None)],
)
def test_dma_error_may_have_no_errno(args: tuple[object, ...], number: int | None) -> None:
    error = DmaError(*args, iova=4096, size=8192)
    assert isinstance(error, OSError)
    assert error.errno == number
    assert (error.iova, error.size, error.in_doubt) == (4096, 8192, False)
    for arg in args[-1:]:
        assert str(arg) in str(error)


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOENT, errno.EINTR, errno.EPIPE])
def test_dma_error_does_not_become_one_of_pythons_own(number: int) -> None:
    # OSError(ENOENT, ...) makes a FileNotFoundError; a subclass stays what it is.
    error = DmaError(number, "no")
    assert type(error) is DmaError
    assert error.errno == number


def test_dma_error_in_doubt() -> None:
    assert DmaError("half done", in_doubt=True).in_doubt is True


def test_iommu_fault() -> None:
    fault = IommuFault("no", iova=4096, size=8, write=True)
    assert (str(fault), fault.iova, fault.size, fault.write) == ("no", 4096, 8, True)
    # A fault is the device's doing, not a failed system call of ours.
    assert not isinstance(fault, OSError)


def test_trace_error() -> None:
    error = TraceError("no", path="a.dat", line=3)
    assert (str(error), error.path, error.line) == ("no", "a.dat", 3)


def test_ranges_in_messages_are_half_open_and_in_hex() -> None:
    assert describe_range(0x1000, 0x2000) == "[0x1000, 0x3000)"
    assert describe_range(0, 1 << 64) == "[0x0, 0x10000000000000000)"
