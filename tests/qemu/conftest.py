"""
Tests with QEMU's own confidential-guest path, the pretend way: any /dev/kvm, vfio-user devices.

All of them need what `make lab` builds, and are skipped elsewhere. tests/lab has the real way.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.qemu_double import Double

_HERE = Path(__file__).parent


# Before the hook of tests/conftest.py, which gives each requirement its mark.
@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.is_relative_to(_HERE):
        item.add_marker(pytest.mark.require("qemu"))


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as double:
        yield double
