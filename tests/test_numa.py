"""NUMA bindings: what is accepted, and what the kernel makes of it (/proc/self/numa_maps)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from doubles import PAGE
from ramblock import BackendKind, GuestMemory, HostMemoryBackend, PageState, RamBlock
from ramblock.errors import UsageError
from ramblock.hostmem import NumaBinding, NumaPolicy, host_facts, numa
from ramblock.hostmem.host_calls import populate, set_memory_policy
from ramblock.hostmem.host_facts import HugePagePool, nodes_with_memory
from ramblock.uapi.mempolicy import MempolicyMode
from ramblock.units import MIB
from require import require_hugetlb

BIND, PREFERRED, INTERLEAVE = NumaPolicy.BIND, NumaPolicy.PREFERRED, NumaPolicy.INTERLEAVE

#: The last node: on a host with several, not the one that memory comes from anyway.
NODE = max(nodes_with_memory() or {0})
needs_numa = pytest.mark.skipif(
    not Path("/proc/self/numa_maps").exists(), reason="this kernel has no NUMA (CONFIG_NUMA)"
)

PROC_NAMES = {BIND: "bind", PREFERRED: "prefer", INTERLEAVE: "interleave"}


def placement(address: int) -> tuple[str, dict[int, int]]:
    """What the kernel says of the mapping at *address*: policy, and pages by node."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        start, policy, *facts = line.split()
        if int(start, 16) == address:
            nodes = [re.fullmatch(r"N(\d+)=(\d+)", fact) for fact in facts]
            return policy, {int(node[1]): int(node[2]) for node in nodes if node}
    raise AssertionError(f"no mapping begins at {address:#x}")


# -- what is accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [(), (-1,), (True,), ("0",), (0, None), (1.0,)])
def test_what_is_no_set_of_nodes(nodes: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match="is not a set of NUMA nodes"):
        NumaBinding(frozenset(nodes))  # type: ignore[arg-type]  # hostile on purpose


def test_what_is_no_policy() -> None:
    with pytest.raises(UsageError, match="'bind' is not a NUMA policy"):
        NumaBinding(frozenset({0}), "bind")  # type: ignore[arg-type]  # hostile on purpose


def test_preferred_takes_one_node() -> None:
    with pytest.raises(UsageError, match="policy preferred takes one node, not nodes 0, 1"):
        NumaBinding(frozenset({0, 1}), PREFERRED)


def test_what_is_no_binding() -> None:
    with pytest.raises(UsageError, match="is not a NUMA binding"):
        HostMemoryBackend(size=PAGE, numa={0})  # type: ignore[arg-type]  # hostile on purpose


def test_any_collection_of_nodes_will_do() -> None:
    assert NumaBinding([1, 0, 1]).nodes == {0, 1}  # type: ignore[arg-type]  # a kindness, not a promise
    assert str(NumaBinding(frozenset({2, 10, 1}), INTERLEAVE)) == "interleave nodes 1, 2, 10"


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with memory on nodes 0, 1 and 3, of which this process may use 0 and 1."""
    (tmp_path / "has_memory").write_text("0-1,3\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Mems_allowed_list:\t0-1\n")
    monkeypatch.setattr(host_facts, "NODES", tmp_path)
    monkeypatch.setattr(host_facts, "_PROC", tmp_path)


def test_nodes_that_the_host_does_not_have_are_named(two_nodes: None) -> None:
    with pytest.raises(UsageError) as caught:
        HostMemoryBackend(size=PAGE, numa=NumaBinding(frozenset({0, 2, 9}))).allocate("ram")
    assert str(caught.value) == (
        "no memory on NUMA nodes 2, 9: this host has memory on nodes 0, 1, 3"
    )
    assert (caught.value.value, caught.value.expected) == ({2, 9}, "nodes 0, 1, 3")


def test_nodes_that_the_process_may_not_use_are_named(two_nodes: None) -> None:
    with pytest.raises(UsageError, match="may take memory from nodes 0, 1 only") as caught:
        NumaBinding(frozenset({1, 3})).check()
    assert caught.value.value == {3}
    NumaBinding(frozenset({1})).check()


def test_a_kernel_without_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "nodes_with_memory", lambda: None)
    with pytest.raises(OSError, match="knows no NUMA nodes"):
        NumaBinding(frozenset({0})).check()


# -- what the kernel makes of it -------------------------------------------------------------------


@needs_numa
@pytest.mark.parametrize("policy", NumaPolicy)
@pytest.mark.parametrize("kind", [BackendKind.MEMFD, BackendKind.ANONYMOUS])
def test_pages_come_from_the_node(kind: BackendKind, policy: NumaPolicy) -> None:
    backend = HostMemoryBackend(
        size=64 * PAGE, kind=kind, prealloc=True, numa=NumaBinding(frozenset({NODE}), policy)
    )
    memory = backend.allocate("ram")
    said, pages = placement(memory.address)
    assert said == f"{PROC_NAMES[policy]}:{NODE}"
    assert pages == {NODE: 64}
    memory.close()


@needs_numa
@pytest.mark.parametrize("kind", [BackendKind.MEMFD, BackendKind.ANONYMOUS])
def test_so_do_pages_that_are_touched_later(kind: BackendKind) -> None:
    memory = HostMemoryBackend(
        size=64 * PAGE, kind=kind, numa=NumaBinding(frozenset({NODE}))
    ).allocate("ram")
    assert placement(memory.address) == (f"bind:{NODE}", {})
    memory.write(0, b"x" * memory.size)  # on a memfd not through the mapping
    populate(memory.address, memory.size)  # numa_maps counts what is in our page tables
    assert placement(memory.address)[1] == {NODE: 64}
    memory.close()


@needs_numa
def test_what_was_freed_in_a_conversion_comes_from_the_node_again() -> None:
    backend = HostMemoryBackend(size=64 * PAGE, prealloc=True, numa=NumaBinding(frozenset({NODE})))
    with RamBlock.from_backend("ram", backend, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.convert(0, block.size, PageState.SHARED)
        assert placement(block.address)[1] == {NODE: 64}
        memory.convert(16 * PAGE, 32 * PAGE, PageState.PRIVATE)
        assert block.allocated_bytes() == 32 * PAGE
        assert placement(block.address)[1] == {NODE: 32}
        memory.convert(16 * PAGE, 32 * PAGE, PageState.SHARED)
        block.write(0, b"x" * block.size)
        populate(block.address, block.size)
        assert placement(block.address) == (f"bind:{NODE}", {NODE: 64})


@needs_numa
@require_hugetlb
def test_huge_pages_come_from_the_node() -> None:
    pools = [HugePagePool.read(2 * MIB, node) for node in nodes_with_memory() or ()]
    node = max((pool.free, pool.node) for pool in pools if pool is not None)[1]
    assert node is not None
    backend = HostMemoryBackend(
        size=4 * MIB,
        kind=BackendKind.HUGETLB,
        page_size=2 * MIB,
        prealloc=True,
        numa=NumaBinding(frozenset({node})),
    )
    memory = backend.allocate("ram")
    assert placement(memory.address) == (f"bind:{node}", {node: 2})
    memory.discard(0, 2 * MIB)
    populate(memory.address, memory.size)
    assert placement(memory.address) == (f"bind:{node}", {node: 2})
    memory.close()


@needs_numa
def test_a_refusal_of_the_kernel_names_the_nodes() -> None:
    memory = HostMemoryBackend(size=PAGE).allocate("ram")
    with pytest.raises(OSError, match=r"mbind\(MPOL_BIND, nodes \[500\]\): Invalid argument"):
        set_memory_policy(memory.address, PAGE, MempolicyMode.MPOL_BIND, {500})
    memory.close()
