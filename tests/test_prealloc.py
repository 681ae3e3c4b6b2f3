"""Preallocation: all or nothing, in pieces, on kernels old and new."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest

from doubles import PAGE
from ramblock import BackendKind, GuestMemory, HostMemoryBackend, PageState, RamBlock
from ramblock.hostmem import MemfdBacking, NumaBinding, NumaPolicy, backend, host_calls
from ramblock.hostmem.backend import preallocate
from ramblock.hostmem.host_calls import populate
from ramblock.units import GIB, KIB, MIB, TIB
from require import require_hugetlb

MEMFD, ANONYMOUS, HUGETLB = BackendKind.MEMFD, BackendKind.ANONYMOUS, BackendKind.HUGETLB


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def resident(address: int) -> int:
    """Bytes of the mapping at *address* that are in our page tables."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(rest.split()[0]) * KIB
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of 4 pages, so that little memory is many pieces."""
    monkeypatch.setattr(backend, "_PIECE", 4 * PAGE)
    return 4 * PAGE


@pytest.fixture(params=["new kernel", "kernel before 5.14"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "new kernel":
        # An advice that no kernel knows is what MADV_POPULATE_WRITE was to an old one.
        monkeypatch.setattr(host_calls, "_MADV_POPULATE_WRITE", 9999)
    return str(request.param)


def test_all_of_it_is_there_and_somebody_watched(pieces: int, kernel: str) -> None:
    seen: list[tuple[int, int]] = []
    memory = HostMemoryBackend(size=10 * PAGE, prealloc=True).allocate(
        "ram", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4 * PAGE, 10 * PAGE), (8 * PAGE, 10 * PAGE), (10 * PAGE, 10 * PAGE)]
    assert memory.allocated_bytes() == resident(memory.address) == 10 * PAGE
    assert memory.read(0, memory.size) == bytes(memory.size)
    memory.close()


def test_anonymous_memory_too(kernel: str) -> None:
    memory = HostMemoryBackend(size=3 * MIB, kind=ANONYMOUS, prealloc=True).allocate("ram")
    assert resident(memory.address) >= 3 * MIB
    memory.close()


@require_hugetlb
def test_huge_pages_too(kernel: str) -> None:
    seen: list[tuple[int, int]] = []
    memory = HostMemoryBackend(
        size=4 * MIB, kind=HUGETLB, page_size=2 * MIB, prealloc=True
    ).allocate("ram", progress=lambda done, total: seen.append((done, total)))
    assert memory.allocated_bytes() == 4 * MIB
    assert seen == [(4 * MIB, 4 * MIB)]
    memory.close()


@require_hugetlb
def test_a_piece_is_a_huge_page_at_least(pieces: int) -> None:
    seen: list[int] = []
    memory = HostMemoryBackend(
        size=6 * MIB, kind=HUGETLB, page_size=2 * MIB, prealloc=True
    ).allocate("ram", progress=lambda done, _: seen.append(done))
    assert seen == [2 * MIB, 4 * MIB, 6 * MIB]
    memory.close()


def test_without_it_nothing_is_taken_and_nobody_is_told() -> None:
    seen: list[int] = []
    memory = HostMemoryBackend(size=10 * PAGE).allocate(
        "ram", progress=lambda done, _: seen.append(done)
    )
    assert (memory.allocated_bytes(), seen) == (0, [])
    memory.close()


def test_what_a_conversion_frees_is_free() -> None:
    seen: list[int] = []
    with RamBlock.from_backend(
        "ram",
        HostMemoryBackend(size=16 * PAGE, prealloc=True),
        private="stand-in",
        progress=lambda done, _: seen.append(done),
    ) as block:
        assert seen == [16 * PAGE]
        assert block.allocated_bytes() == 16 * PAGE
        memory = GuestMemory()
        memory.map(block, 0)
        memory.convert(0, block.size, PageState.SHARED)
        memory.convert(0, 4 * PAGE, PageState.PRIVATE)
        assert block.allocated_bytes() == 12 * PAGE


# -- when it fails ---------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt, BrokenPipeError])
@pytest.mark.parametrize("kind", [MEMFD, ANONYMOUS])
def test_whoever_watches_may_stop_it_and_nothing_is_held(
    pieces: int, kind: BackendKind, stop: type[BaseException]
) -> None:
    before = open_files()
    seen: list[int] = []

    def watch(done: int, _: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise stop

    with pytest.raises(stop):
        HostMemoryBackend(size=16 * PAGE, kind=kind, prealloc=True).allocate(
            "stopped-ram", progress=watch
        )
    assert seen == [4 * PAGE, 8 * PAGE]
    assert open_files() == before
    assert "stopped-ram" not in Path("/proc/self/maps").read_text()


def test_a_page_that_cannot_be_had_is_an_error_that_says_how_much_there_was(
    pieces: int, kernel: str
) -> None:
    # A file that is shorter than its mapping: touching what is behind its end is a SIGBUS.
    memory = MemfdBacking("ram", 16 * PAGE)
    os.ftruncate(memory.fd, 9 * PAGE)
    seen: list[int] = []
    with pytest.raises(
        OSError, match="'ram': only 36 KiB of 64 KiB could be had: Bad address"
    ) as no:
        preallocate(memory, "memory 'ram'", lambda done, _: seen.append(done))
    assert no.value.errno == errno.ENOMEM
    assert seen == [4 * PAGE, 8 * PAGE]
    memory.close()


def test_the_hint_stands_behind_the_error() -> None:
    memory = MemfdBacking("ram", PAGE)
    os.ftruncate(memory.fd, 0)
    with pytest.raises(OSError, match=r"could be had: .*; ask for less$"):
        preallocate(memory, "memory", hint=lambda: "ask for less")
    memory.close()


def test_memory_without_a_count_says_what_was_done(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_later(address: int, size: int) -> None:
        if resident(address) >= 4 * PAGE:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        populate(address, size)

    monkeypatch.setattr(backend, "populate", fail_later)
    backing = HostMemoryBackend(size=16 * PAGE, kind=ANONYMOUS, prealloc=True)
    with pytest.raises(OSError, match=r"anonymous memory 'ram' of 64 KiB: only \d+ KiB of 64 KiB"):
        backing.allocate("ram")


def test_more_than_the_host_has_is_refused_before_anything_is_taken() -> None:
    before = open_files()
    with pytest.raises(
        OSError, match=r"memfd memory 'ram' of 1024 TiB: this host has .* at most"
    ) as no:
        HostMemoryBackend(size=1024 * TIB, prealloc=True).allocate("ram")
    assert no.value.errno == errno.ENOMEM
    assert open_files() == before
    # Without it that is what overcommitting means.
    HostMemoryBackend(size=TIB).allocate("ram").close()


def test_a_host_that_does_not_say_what_it_has_is_asked_by_trying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "available_bytes", lambda: None)
    HostMemoryBackend(size=PAGE, prealloc=True).allocate("ram").close()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A host of two nodes, of which node 0 has little left and the first pool of huge pages is empty.
    """
    monkeypatch.setattr(backend, "nodes_with_memory", lambda: frozenset({0, 1}))
    monkeypatch.setattr(backend, "available_on", lambda nodes: MIB if nodes == {0} else TIB)
    monkeypatch.setattr(NumaBinding, "check", lambda _: None)
    monkeypatch.setattr(NumaBinding, "apply", lambda *_: None)


def test_more_than_the_nodes_have_is_refused(two_nodes: None) -> None:
    bound = HostMemoryBackend(size=GIB, prealloc=True, numa=NumaBinding(frozenset({0})))
    with pytest.raises(OSError, match="of 1 GiB: NUMA node 0 has 1 MiB available at most"):
        bound.allocate("ram")
    # What may come from elsewhere is asked of the whole host.
    for nodes, policy in (({0}, NumaPolicy.PREFERRED), ({0, 1}, NumaPolicy.BIND)):
        binding = NumaBinding(frozenset(nodes), policy)
        HostMemoryBackend(size=2 * MIB, prealloc=True, numa=binding).allocate("ram").close()


def test_huge_pages_that_the_nodes_do_not_have_are_refused_before_a_sigbus(
    two_nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "lacking_on", lambda nodes, size, page_size: 1)
    bound = HostMemoryBackend(
        size=2 * MIB, kind=HUGETLB, page_size=2 * MIB, numa=NumaBinding(frozenset({0}))
    )
    with pytest.raises(OSError, match="hugetlb memory 'ram' of 2 MiB: pages needed: 1, but") as no:
        bound.allocate("ram")
    assert no.value.errno == errno.ENOMEM


@require_hugetlb
def test_a_huge_page_that_cannot_be_had_names_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, size: int) -> None:
        raise OSError(errno.EFAULT, f"Bad address at {address:#x}")

    monkeypatch.setattr(backend, "populate", refuse)
    with pytest.raises(
        OSError, match=r"only 0 B of 4 MiB could be had.*the pool of 2 MiB pages has"
    ):
        HostMemoryBackend(size=4 * MIB, kind=HUGETLB, page_size=2 * MIB, prealloc=True).allocate(
            "ram"
        )


def test_populating_what_is_not_mapped() -> None:
    with pytest.raises(OSError, match="at 0x1000"):
        populate(0x1000, PAGE)
