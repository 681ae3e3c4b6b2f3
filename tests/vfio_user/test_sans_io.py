"""The protocol makes no system call: what its modules import says so."""

import ast
import importlib
from pathlib import Path

import pytest

PURE = (
    "capabilities",
    "connection",
    "descriptors",
    "events",
    "header",
    "inbox",
    "layout",
    "messages",
    "numbers",
    "replies",
    "requests",
)
FORBIDDEN = {"array", "asyncio", "fcntl", "io", "os", "select", "socket", "threading", "time"}


@pytest.mark.parametrize("name", PURE)
def test_what_a_pure_module_imports(name: str) -> None:
    module = importlib.import_module(f"ramblock.dma.vfio_user.{name}")
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for imported in names:
            assert imported.partition(".")[0] not in FORBIDDEN, (name, imported)
            if imported.startswith("ramblock.dma"):
                assert imported.rpartition(".")[2] in PURE, (name, imported)
