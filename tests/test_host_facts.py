"""What is read from /proc and /sys: made-up hosts, and this one."""

from pathlib import Path

import pytest

from ramblock.hostmem import host_facts
from ramblock.units import KIB


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty host: files are written to ``proc`` and ``node`` below."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(host_facts, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_facts, "NODES", tmp_path / "node")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", set()),
        ("\n", set()),
        ("0\n", {0}),
        ("0-3\n", {0, 1, 2, 3}),
        ("0,2-4,63,128-129\n", {0, 2, 3, 4, 63, 128, 129}),
    ],
)
def test_lists_as_the_kernel_writes_them(text: str, numbers: set[int]) -> None:
    assert host_facts.parse_list(text) == numbers


def test_a_host_that_says_nothing(host: Path) -> None:
    assert host_facts.nodes_with_memory() is None
    assert host_facts.allowed_nodes() is None
    assert host_facts.available_bytes() is None
    assert host_facts.available_on(frozenset({0})) is None


def test_nodes(host: Path) -> None:
    (host / "node/has_memory").write_text("0,2\n")
    (host / "proc/self/status").write_text(
        "Name:\tx\nMems_allowed:\t5\nMems_allowed_list:\t0,2-3\n"
    )
    assert host_facts.nodes_with_memory() == frozenset({0, 2})
    assert host_facts.allowed_nodes() == frozenset({0, 2, 3})


def test_available_memory(host: Path) -> None:
    (host / "proc/meminfo").write_text(
        "MemTotal:  9 kB\nMemAvailable:  100 kB\nHugePages_Total:  16\nSwapFree:  20 kB\n"
    )
    assert host_facts.available_bytes() == 120 * KIB
    (host / "node/node1").mkdir()
    (host / "node/node1/meminfo").write_text(
        "Node 1 MemTotal:  900 kB\nNode 1 MemFree:  7 kB\nNode 1 Active(file):  30 kB\n"
        "Node 1 Inactive(file):  200 kB\nNode 1 SReclaimable:  1000 kB\nNode 1 Slab:  5000 kB\n"
    )
    assert host_facts.available_on(frozenset({1})) == 1257 * KIB
    assert host_facts.available_on(frozenset({1, 2})) is None, "a node that says nothing"


def test_this_host() -> None:
    available = host_facts.available_bytes()
    assert available is not None
    assert 0 < available < 1 << 60
    nodes = host_facts.nodes_with_memory()
    if nodes is not None:
        assert nodes
        on_nodes = host_facts.available_on(nodes)
        assert on_nodes is not None
        assert on_nodes > 0
