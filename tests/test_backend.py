from collections.abc import Callable

import pytest

from doubles import PAGE
from ramblock import BackendKind, HostMemoryBackend, PageState, RamBlock
from ramblock.errors import UsageError
from ramblock.hostmem import AnonymousBacking, MemfdBacking
from ramblock.units import GIB, MIB

MEMFD, ANONYMOUS, HUGETLB = BackendKind.MEMFD, BackendKind.ANONYMOUS, BackendKind.HUGETLB


@pytest.mark.parametrize(
    ("kind", "size", "page_size"),
    [
        (MEMFD, PAGE, 2 * MIB),
        (MEMFD, PAGE, 0),
        (ANONYMOUS, 2 * MIB, 2 * MIB),
        (HUGETLB, 2 * MIB, PAGE),
        (HUGETLB, 4 * MIB, 4 * MIB),
        (HUGETLB, 3 * MIB, 2 * MIB),
        (HUGETLB, 2 * MIB, GIB),
        (MEMFD, 0, PAGE),
        (MEMFD, -PAGE, PAGE),
        (MEMFD, PAGE + 1, PAGE),
        (MEMFD, 1 << 63, PAGE),
        (MEMFD, 1 << 64, PAGE),
        (ANONYMOUS, 1 << 63, PAGE),
        (MEMFD, True, PAGE),
        (MEMFD, None, PAGE),
        (MEMFD, "4096", PAGE),
        (MEMFD, float(PAGE), PAGE),
    ],
)
def test_what_does_not_fit_together(kind: BackendKind, size: int, page_size: int) -> None:
    with pytest.raises(UsageError):
        HostMemoryBackend(size=size, kind=kind, page_size=page_size)


def test_defaults() -> None:
    backend = HostMemoryBackend(size=PAGE)
    assert (backend.kind, backend.page_size) == (MEMFD, PAGE)
    HostMemoryBackend(size=2 * GIB, kind=HUGETLB, page_size=GIB)


@pytest.mark.parametrize("kind", [MEMFD, ANONYMOUS])
def test_what_the_host_does_not_have_is_an_os_error(kind: BackendKind) -> None:
    backend = HostMemoryBackend(size=1 << 62, kind=kind)
    with pytest.raises(OSError):  # noqa: PT011 - the text is the kernel's
        backend.allocate("ram")


def test_each_kind_allocates_its_own() -> None:
    memfd = HostMemoryBackend(size=PAGE).allocate("ram")
    anonymous = HostMemoryBackend(size=PAGE, kind=ANONYMOUS).allocate("ram")
    assert isinstance(memfd, MemfdBacking)
    assert isinstance(anonymous, AnonymousBacking)
    assert memfd.fd is not None
    assert anonymous.fd is None
    memfd.close()
    anonymous.close()


def from_backend(name: str, size: int, *, private: str | None) -> RamBlock:
    return RamBlock.from_backend(name, HostMemoryBackend(size=size), private=private)


@pytest.mark.parametrize("private", [None, "stand-in"])
@pytest.mark.parametrize("make", [RamBlock.create, from_backend])
def test_a_block_made_from_it_is_like_any_other(
    make: Callable[..., RamBlock], private: str | None
) -> None:
    with make("ram", 4 * PAGE, private=private) as block:
        assert (block.name, block.size, block.page_size) == ("ram", 4 * PAGE, PAGE)
        assert block.fd is not None
        assert (block.private is None) == (private is None)
        assert (block.attributes is None) == (private is None)
        assert len(block.discard_manager.sources) == (0 if private is None else 1)
        block.write(PAGE, b"abc")
        assert block.read(PAGE, 4) == b"abc\0"
        assert block.allocated_bytes() == PAGE
        if block.attributes is not None:
            block.attributes.state_change(0, PAGE, PageState.SHARED)
            assert block.attributes.shared_bytes == PAGE
