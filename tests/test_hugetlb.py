"""Pools of huge pages: what is said of them, and what is lacking."""

from pathlib import Path

import pytest

from ramblock.hostmem import host_facts
from ramblock.hostmem.host_facts import HugePagePool, describe_shortage, lacking_on
from ramblock.units import GIB, KIB, MIB

TWO = 2 * MIB


class Pools:
    """The pools of a made-up host, as files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, node: int | None, page_size: int = TWO) -> Path:
        folder = "pools" if node is None else f"node/node{node}/hugepages"
        return self.root / folder / f"hugepages-{page_size // KIB}kB"

    def write(self, node: int | None, page_size: int = TWO, **counts: int) -> None:
        path = self.path(node, page_size)
        path.mkdir(parents=True, exist_ok=True)
        for name, count in counts.items():
            (path / f"{name}_hugepages").write_text(f"{count}\n")


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pools:
    monkeypatch.setattr(host_facts, "_POOLS", tmp_path / "pools")
    monkeypatch.setattr(host_facts, "NODES", tmp_path / "node")
    return Pools(tmp_path)


def test_a_pool(pools: Pools) -> None:
    pools.write(None, nr=16, free=10, resv=4)
    pool = HugePagePool.read(TWO)
    assert pool is not None
    assert (pool.total, pool.free, pool.reserved, pool.available) == (16, 10, 4, 6)
    assert str(pool) == "the pool of 2 MiB pages has 16, 10 free, 4 of them promised"
    assert pool.advise(3) == f"as root: echo 19 > {pools.path(None)}/nr_hugepages"


def test_the_pool_of_a_node_keeps_no_count_of_promises(pools: Pools) -> None:
    pools.write(1, nr=8, free=5)
    pool = HugePagePool.read(TWO, 1)
    assert pool is not None
    assert (pool.total, pool.free, pool.reserved, pool.available) == (8, 5, 0, 5)
    assert str(pool) == "the pool of 2 MiB pages on node 1 has 8, 5 free"
    assert HugePagePool.read(TWO, 0) is None


def test_more_promised_than_free_is_nothing_available(pools: Pools) -> None:
    pools.write(None, nr=4, free=1, resv=3)  # the rest would be surplus pages
    pool = HugePagePool.read(TWO)
    assert pool is not None
    assert pool.available == 0


def test_what_a_block_lacks_and_what_to_do(pools: Pools) -> None:
    pools.write(None, nr=16, free=10, resv=4)
    assert describe_shortage(20 * MIB, TWO) == (
        "pages needed: 10, but the pool of 2 MiB pages has 16, 10 free, 4 of them promised;"
        f" as root: echo 20 > {pools.path(None)}/nr_hugepages"
    )


def test_gigantic_pages_are_best_had_at_boot(pools: Pools) -> None:
    pools.write(None, GIB, nr=0, free=0, resv=0)
    assert describe_shortage(2 * GIB, GIB).endswith(
        "nr_hugepages, or at boot, before memory is in pieces: hugepagesz=1G hugepages=2"
    )


def test_what_is_lacking_on_nodes(pools: Pools) -> None:
    pools.write(None, nr=16, free=16, resv=0, nr_overcommit=0, surplus=0)
    pools.write(0, nr=12, free=12)
    pools.write(1, nr=4, free=3)
    nodes = frozenset({1})
    assert lacking_on(nodes, 3 * TWO, TWO) == 0
    assert lacking_on(nodes, 5 * TWO, TWO) == 2
    assert lacking_on(frozenset({0, 1}), 16 * TWO, TWO) == 1
    assert describe_shortage(5 * TWO, TWO, nodes) == (
        "pages needed: 5, but the pool of 2 MiB pages on node 1 has 4, 3 free;"
        f" as root: echo 6 > {pools.path(1)}/nr_hugepages"
    )
    both = describe_shortage(16 * TWO, TWO, frozenset({0, 1}))
    assert "on node 0 has 12, 12 free; the pool of 2 MiB pages on node 1 has 4, 3 free" in both


def test_a_pool_that_may_grow_lacks_nothing_yet(pools: Pools) -> None:
    pools.write(None, nr=4, free=0, resv=0, nr_overcommit=8, surplus=3)
    pools.write(0, nr=4, free=0)
    assert lacking_on(frozenset({0}), 5 * TWO, TWO) == 0
    assert lacking_on(frozenset({0}), 6 * TWO, TWO) == 1


def test_a_host_without_such_pages(pools: Pools) -> None:
    assert (
        describe_shortage(TWO, TWO) == "this host has no pool of 2 MiB pages (it has: none at all)"
    )
    assert lacking_on(frozenset({0}), TWO, TWO) == 0
    pools.write(None, GIB, nr=0)
    pools.write(None, TWO, nr=0)
    assert describe_shortage(TWO, 512 * MIB) == (
        "this host has no pool of 512 MiB pages (it has: 2 MiB, 1 GiB)"
    )
