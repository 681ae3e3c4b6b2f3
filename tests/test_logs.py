"""A guest cannot flood the log."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import ConversionError, MappingLimitError
from ramblock.logs import Sparingly
from ramblock.testing import FaultyTarget
from ramblock.units import PAGE_SIZE


def test_the_first_the_tenth_and_so_on_are_logged_with_their_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Sparingly(logging.getLogger("ramblock.test"))
    for number in range(1, 1001):
        log("refused %d", number)
    assert [record.getMessage() for record in caplog.records] == [
        f"refused {number} (number {number} of its kind)" for number in (1, 10, 100, 1000)
    ]


def test_a_guest_over_its_budget_is_logged_sparingly(caplog: pytest.LogCaptureFixture) -> None:
    with RamBlock.create("ram", 16 * PAGE_SIZE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(SoftIommu(), max_mappings=1)
        memory.convert(0, PAGE_SIZE, PageState.SHARED)
        for _ in range(100):
            with pytest.raises(MappingLimitError):
                memory.convert(4 * PAGE_SIZE, PAGE_SIZE, PageState.SHARED)
    assert sum("refused" in record.message for record in caplog.records) == 3


def test_failures_that_were_put_back_are_logged_sparingly(caplog: pytest.LogCaptureFixture) -> None:
    with RamBlock.create("ram", 16 * PAGE_SIZE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(FaultyTarget(SoftIommu(), fail_map=range(1000)))
        for _ in range(100):
            with pytest.raises(ConversionError):
                memory.convert(0, PAGE_SIZE, PageState.SHARED)
    messages = [record.message for record in caplog.records]
    assert sum("nothing has changed" in message for message in messages) == 3


def test_poison_is_critical_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with RamBlock.create("ram", 16 * PAGE_SIZE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(FaultyTarget(SoftIommu(), short_unmap={1}))
        memory.convert(0, 4 * PAGE_SIZE, PageState.SHARED)
        with pytest.raises(ConversionError):
            memory.convert(0, 4 * PAGE_SIZE, PageState.PRIVATE)
        critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert sum(record.message.startswith("poisoned:") for record in critical) == 1


QUIET = """
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import MappingLimitError
memory = GuestMemory()
block = RamBlock.create("ram", 16 * 4096, private="stand-in")
memory.map(block, 0)
memory.attach(SoftIommu(), max_mappings=1)
memory.convert(0, 4096, PageState.SHARED)
try:
    memory.convert(8192, 4096, PageState.SHARED)
except MappingLimitError:
    print("handled")
"""


def test_a_refusal_that_the_caller_handles_is_not_printed() -> None:
    command = [sys.executable, "-c", QUIET]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (child.stdout, child.stderr) == ("handled\n", "")
