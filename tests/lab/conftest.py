"""
What the tests of the lab need, so that none of them can forget it, and which of the lab's variants
each is for.

    @pytest.mark.lab_variant("no-iommu")
    def test_refusal() -> None: ...

Without the mark a test is for the variants with an IOMMU and two processors. The others are left
out of a run, not skipped: what is skipped in the lab is something that should have run. Outside the
lab everything is skipped.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_HOST = _HERE / "host"
_DEFAULT = ("intel-iommu", "amd-iommu")


# Before the hook of tests/conftest.py, which gives each requirement its mark.
@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.require("lab_host" if _is_below(item, _HOST) else "lab"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    variant = os.environ.get("RAMBLOCK_LAB_VARIANT")
    if variant is None:
        return
    others = [item for item in items if _is_below(item, _HERE) and variant not in _variants(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def _is_below(item: pytest.Item, folder: Path) -> bool:
    return item.path.is_relative_to(folder)


def _variants(item: pytest.Item) -> Iterator[str]:
    known = os.environ["RAMBLOCK_LAB_VARIANTS"].split(",")
    # The nearest mark counts: a test's own before its module's.
    mark = item.get_closest_marker("lab_variant")
    for name in mark.args if mark else _DEFAULT:
        if name not in known:
            # A misspelt name would keep the test from running anywhere, without a word.
            raise pytest.UsageError(f"{item.nodeid}: no variant of the lab is called {name!r}")
        yield name


@pytest.fixture(scope="session")
def lab_iommu() -> str:
    """The kind of the variant's IOMMU: ``intel``, ``amd`` or ``none``."""
    return os.environ["RAMBLOCK_LAB_IOMMU"]
