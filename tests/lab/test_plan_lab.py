"""
`ramblock plan` held against real targets: what each can do, and where a container of type1 is full.
"""

import errno
import json

import pytest

from lab_devices import BASE, Way, entry_limit, host_range, open_rig
from ramblock import RamBlock
from ramblock.cli import main
from ramblock.errors import DmaError
from ramblock.plan import TARGETS, limits_of_host
from ramblock.units import MIB, PAGE_SIZE


@pytest.mark.parametrize(
    ("way", "name"),
    [(Way.TYPE1, "type1"), (Way.NATIVE, "iommufd"), (Way.CUTTING, "iommufd-cutting")],
)
def test_targets_can_what_a_plan_says(way: Way, name: str) -> None:
    (planned,) = (target for target in TARGETS if target.name == name)
    with open_rig(way) as rig:
        real = rig.target.capabilities
        assert (planned.cuts, planned.exact) == (real.cut, real.exact)
        assert planned.max_mappings(limits_of_host()) == real.max_mappings


def test_a_container_is_full_where_a_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel itself refuses, page by page; the mapper would have said so before."""
    limit = 600
    with entry_limit(limit), open_rig(Way.TYPE1) as rig, RamBlock.create("ram", 4 * MIB) as block:
        arguments = ["plan", "--memory", "1G", "--policy", "page", "--target", "type1"]
        assert main([*arguments, "--this-host", "--json"]) == 1
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        (room,) = (each for each in row["headroom"] if each["counts_mappings"])
        assert room["limit"] == limit
        target = rig.target
        for page in range(limit):
            target.map(BASE + page * PAGE_SIZE, host_range(block.fd, block.address, page))
        with pytest.raises(DmaError) as caught:
            target.map(BASE + limit * PAGE_SIZE, host_range(block.fd, block.address, limit))
        assert caught.value.errno == errno.ENOSPC
        assert room["fails_at"] == (limit + 1) * PAGE_SIZE
        assert target.unmap(BASE, limit * PAGE_SIZE) == limit * PAGE_SIZE
