# SPDX-License-Identifier: Apache-2.0
"""Memory: this process's limits, huge pages, and free memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ramblock.dma.vfio_facts import locked_memory
from ramblock.doctor.line import Line, Purpose, Status, read_text
from ramblock.hostmem.host_facts import HugePagePool, available_bytes
from ramblock.units import KIB, MIB, format_size

__all__ = ["cgroup_limit", "look"]

_BOTH = (Purpose.VFIO, Purpose.IOMMUFD)
#: The usual setting where it matters; below it devices of guests fail at once.
_LITTLE_LOCKED = 64 * MIB


def look(root: Path) -> Iterator[Line]:
    """Look at memory."""
    yield _page_size()
    yield _available()
    yield _locked(root)
    yield _cgroup(root)
    yield from _pools(root)
    yield _shmem(root)


def _page_size() -> Line:
    size = os.sysconf("SC_PAGE_SIZE")
    return Line(
        name="page size",
        status=Status.GOOD if size == 4 * KIB else Status.NOTE,
        found=format_size(size),
        why="pages are converted one by one; this library was tried with 4 KiB",
    )


def _available() -> Line:
    size = available_bytes()
    return Line(
        name="memory",
        status=Status.UNSEEN if size is None else Status.NOTE,
        found="not known" if size is None else f"{format_size(size)} can be had, swap included",
        why="a guest with private memory and devices may hold pages twice: shared memory is pinned,"
        " private memory is not swapped",
    )


def _locked(root: Path) -> Line:
    facts = locked_memory(root=root)
    why = "type1 and iommufd pin mapped memory, and charge it against RLIMIT_MEMLOCK"
    if facts.exempt:
        status, found, todo = Status.GOOD, "no limit for this process (CAP_IPC_LOCK)", ""
    elif facts.limit is None:
        status, found, todo = Status.GOOD, "no limit", ""
    else:
        status = Status.LACKING if facts.limit <= _LITTLE_LOCKED else Status.NOTE
        found = f"{format_size(facts.limit)}, of which {format_size(facts.locked)} are locked"
        todo = (
            "ulimit -l unlimited, LimitMEMLOCK=infinity for a service,"
            " or the size of the guest and a little more"
        )
    return Line(
        name="RLIMIT_MEMLOCK", status=status, found=found, why=why, todo=todo, needed_for=_BOTH
    )


def cgroup_limit(root: Path) -> int | None:
    """
    Tell how much memory this process's control group may use, in bytes.

    With version 2 the smallest limit on the way up, with version 1 its own.

    :return: None: there is no limit, or it cannot be read.
    """
    limits = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        relative = path.strip("/")
        if not controllers:
            base = root / "sys/fs/cgroup"
            for folder in (base / relative, *(base / relative).parents):
                limits.append(read_text(folder / "memory.max"))
                if folder == base:
                    break
        elif "memory" in controllers.split(","):
            limits.append(
                read_text(root / "sys/fs/cgroup/memory" / relative / "memory.limit_in_bytes")
            )
    # Version 1 says "no limit" as the largest number of whole pages.
    numbers = [int(limit) for limit in limits if limit is not None and limit.isdecimal()]
    return min((number for number in numbers if number < 1 << 62), default=None)


def _cgroup(root: Path) -> Line:
    limit = cgroup_limit(root)
    return Line(
        name="control group",
        status=Status.NOTE,
        found="no limit of memory is seen" if limit is None else f"at most {format_size(limit)}",
        why="guest memory, the part that is held twice, and iommufd's page tables count against it",
    )


def _pools(root: Path) -> Iterator[Line]:
    folder = root / "sys/kernel/mm/hugepages"
    names = sorted(path.name for path in folder.glob("hugepages-*kB"))
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) * KIB for name in names)
    for size in sizes:
        path = folder / f"hugepages-{size // KIB}kB"
        pool = HugePagePool(
            page_size=size,
            node=None,
            path=path,
            total=int(read_text(path / "nr_hugepages") or 0),
            free=int(read_text(path / "free_hugepages") or 0),
            reserved=int(read_text(path / "resv_hugepages") or 0),
        )
        yield Line(
            name=f"huge pages of {format_size(size)}",
            status=Status.NOTE,
            found=str(pool),
            why="shared memory on them is freed only whole; a part that was converted waits",
        )


def _shmem(root: Path) -> Line:
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = "" if text is None or "[" not in text else text.split("[")[1].split("]")[0]
    return Line(
        name="huge pages for memfd",
        status=Status.NOTE if chosen else Status.UNSEEN,
        found=chosen or "not known",
        why="with `always` or `within_size` memfd memory is in huge pages:"
        " punching a hole splits them",
    )
