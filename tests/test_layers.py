"""
The layers of ARCHITECTURE.md, read off the import statements of the installed package.

A layer knows the layers below it and nothing else, and the part that decides (states, manager,
mapper) makes no system call. Both are easy to break by one convenient import, and neither shows in
any other test.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# What stands directly below `ramblock`, low to high; a module that is named with its part stands
# higher than the part. Members of one layer are strangers to each other, except in the lowest,
# whose members are single modules that belong together (a bitmap raises errors).
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {"bitmap", "errors", "events", "interrupts", "logs", "process", "ranges", "text", "units"}
    ),
    # Numbers and layouts of kernel interfaces; what uses them lies above.
    frozenset({"uapi"}),
    frozenset({"hostmem"}),
    frozenset({"discard"}),
    frozenset({"dma"}),
    frozenset({"guest"}),
    # The face that `import ramblock` shows, and the kit for other people's tests: both see all of
    # the pure part.
    frozenset({"__init__", "testing"}),
    frozenset({"kvm", "trace", "vfio"}),
    # Runs on a vCPU.
    frozenset({"guest_program"}),
    frozenset({"check", "doctor", "probe", "report", "run"}),
    # Both read what a check reads; a plan knows of a host what the doctor knows.
    frozenset({"explain", "plan"}),
    # The faces of the jobs: a command line, and fixtures for pytest. The plugin is for those who
    # test their own VMM, so it is in their kit; but it is the one module there that runs a job, and
    # only pytest loads it.
    frozenset({"cli", "testing.plugin"}),
    frozenset({"__main__"}),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The library must work without its test kit, whatever the ranks say; the jobs use it (faults on
# purpose).
TEST_KIT = "testing"
FIRST_TO_USE_THE_TEST_KIT = RANKS["run"]

# As prefixes of module names below `ramblock`; the underscore of a private module does not matter.
PURE = ("bitmap", "ranges", "discard", "guest", "dma.mapper")
FORBIDDEN_IN_PURE = {"fcntl", "select", "socket", "subprocess", "time"}

# Slow to import and needed by few callers, or (hypothesis) not always installed.
NOT_AT_IMPORT = {"argparse", "asyncio", "hypothesis"}


class Import(NamedTuple):
    target: str  # absolute name of the module, or of a name in it
    line: int
    types_only: bool


class Module(NamedTuple):
    path: Path
    name: str  # below `ramblock`, as in "dma.mapper"; a package is named without its __init__
    tree: ast.Module

    @property
    def part(self) -> str:
        return self.name if self.name in RANKS else self.name.partition(".")[0] or "__init__"

    def is_below(self, prefix: str) -> bool:
        name = ".".join(part.removeprefix("_") for part in self.name.split("."))
        return f"{name}.".startswith(f"{prefix}.")

    @property
    def package(self) -> str:
        full = f"ramblock.{self.name}".rstrip(".")
        return full if self.path.name == "__init__.py" else full.rpartition(".")[0]

    def imports(self) -> Iterator[Import]:
        types_only = {
            id(node)
            for branch in ast.walk(self.tree)
            if isinstance(branch, ast.If)
            and ast.unparse(branch.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
            for statement in branch.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                relative = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(relative, self.package)
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                yield Import(target, node.lineno, id(node) in types_only)


def read_package(root: Path) -> list[Module]:
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(path, name, ast.parse(path.read_bytes(), filename=str(path))))
    return modules


def upward_imports(modules: list[Module]) -> Iterator[str]:
    """Yield what is wrong, one line each."""
    parts = {module.part for module in modules}
    for module in modules:
        for target, line, types_only in module.imports():
            top, *below = target.split(".")
            if top != "ramblock":
                continue
            # `from ramblock import dma` names a part; `from ramblock import RamBlock` asks the face
            # for it.
            part = below[0] if below and below[0] in parts else "__init__"
            if ".".join(below[:2]) in RANKS:
                part = ".".join(below[:2])
            if part == module.part:
                continue
            same_layer = RANKS[part] == RANKS[module.part]
            allowed = RANKS[part] < RANKS[module.part] or (
                same_layer and (types_only or RANKS[part] == 0)
            )
            if part == TEST_KIT and RANKS[module.part] < FIRST_TO_USE_THE_TEST_KIT:
                allowed = False
            if not allowed:
                yield f"{module.path}:{line}: {module.part} may not import {target}"


def circles(modules: list[Module]) -> list[list[str]]:
    """
    List the groups of modules that import each other, around any corner; imports for types count
    too.

    A package's `__init__` only re-exports, so importing a name from it is an import of the module
    that has the name.
    """
    by_name = {module.name: module for module in modules if module.path.name != "__init__.py"}
    exported = {
        f"{module.name}.{target.rpartition('.')[2]}".lstrip("."): target.removeprefix("ramblock.")
        for module in modules
        if module.path.name == "__init__.py"
        for target, _, _ in module.imports()
    }
    edges: dict[str, set[str]] = {name: set() for name in by_name}
    for name, module in by_name.items():
        for target, _, _ in module.imports():
            below = target.removeprefix("ramblock.")
            below = exported.get(below, below)
            while below and below not in by_name:
                below = below.rpartition(".")[0]
            if below and below != name and target.startswith("ramblock."):
                edges[name].add(below)
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[start] = seen
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def impure_imports(modules: list[Module]) -> Iterator[str]:
    """Yield what is wrong, one line each."""
    for module in modules:
        if any(module.is_below(prefix) for prefix in PURE):
            for target, line, _ in module.imports():
                if target.partition(".")[0] in FORBIDDEN_IN_PURE:
                    yield f"{module.path}:{line}: {module.name} is pure, may not import {target}"


@pytest.fixture(scope="module")
def package() -> list[Module]:
    spec = importlib.util.find_spec("ramblock")
    assert spec is not None
    assert spec.origin is not None
    return read_package(Path(spec.origin).parent)


def test_every_part_has_a_rank(package: list[Module]) -> None:
    assert {module.part for module in package} - RANKS.keys() == set()


def test_imports_point_down(package: list[Module]) -> None:
    assert list(upward_imports(package)) == []


def test_no_module_is_part_of_a_circle(package: list[Module]) -> None:
    assert circles(package) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "from ramblock.b import x", "b": "x = 1"}, []),
        ({"a": "from ramblock.b import x", "b": "from ramblock import a"}, [["a", "b"]]),
        (
            {
                "p/__init__": "from ramblock.p.b import x",
                "p/b": "import ramblock.a",
                "a": "from ramblock.p import x",
            },
            [["a", "p.b"]],
        ),
        (
            {
                "a": "import ramblock.b",
                "b": "def f():\n    from ramblock.c import y",
                "c": "if TYPE_CHECKING:\n    from ramblock.a import z",
            },
            [["a", "b", "c"]],
        ),
    ],
)
def test_a_circle_is_found(tmp_path: Path, sources: dict[str, str], found: list[list[str]]) -> None:
    for name, source in sources.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    assert circles(read_package(tmp_path)) == found


def test_every_pure_part_is_there(package: list[Module]) -> None:
    # Otherwise a module that was renamed would leave the next test, which would go on passing.
    for prefix in PURE:
        assert any(module.is_below(prefix) for module in package), prefix


def test_the_pure_part_makes_no_system_calls(package: list[Module]) -> None:
    assert list(impure_imports(package)) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        # down, sideways, up
        ("dma/soft.py", "from ramblock.hostmem import MemfdBacking", 0),
        ("dma/soft.py", "import ramblock.discard.section", 0),
        ("discard/section.py", "from .attributes import RamBlockAttributes", 0),
        ("discard/section.py", "from . import attributes", 0),
        ("bitmap.py", "from ramblock.errors import UsageError", 0),
        ("testing/__init__.py", "from ramblock.guest import GuestMemory", 0),
        ("__init__.py", "from ramblock.guest import GuestMemory", 0),
        ("__init__.py", "from ramblock.kvm import Vm", 1),
        ("discard/section.py", "from ramblock.dma import HostRange", 1),
        ("hostmem/backing.py", "from ramblock.discard import RamSection", 1),
        ("discard/section.py", "from ramblock.hostmem.backing import PrivateBacking", 0),
        ("discard/section.py", "from ramblock import dma", 1),
        ("discard/section.py", "from ..dma.mapper import Mapper", 1),
        ("discard/section.py", "def later():\n    import ramblock.dma.mapper", 1),
        ("discard/section.py", "from ramblock import PageState", 1),
        ("kvm/vm.py", "from ramblock import PageState", 0),
        ("kvm/vm.py", "from ramblock.trace import parse", 1),
        ("run/job.py", "from ramblock.testing import RecordingTarget", 0),
        ("kvm/vm.py", "from ramblock.testing import RecordingTarget", 1),
        # a module above its part
        ("testing/plugin.py", "from ramblock.probe import Probe", 0),
        ("testing/plugin.py", "from ramblock.testing.model import GuestModel", 0),
        ("testing/plugin.py", "from ramblock.cli import main", 1),
        ("testing/model.py", "from ramblock.probe import Probe", 1),
        ("testing/model.py", "from ramblock.testing.plugin import ProbedVmm", 1),
        ("testing/__init__.py", "from ramblock.testing import plugin", 1),
        ("run/job.py", "import ramblock.testing.plugin", 1),
        # for types only: fine in one layer, and no way around it
        ("kvm/vm.py", "if TYPE_CHECKING:\n    from ramblock.trace import Event", 0),
        ("discard/section.py", "if typing.TYPE_CHECKING:\n    import ramblock.dma", 1),
        ("kvm/vm.py", "if not TYPE_CHECKING:\n    import ramblock.trace", 1),
        ("kvm/vm.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import ramblock.trace", 1),
        # system calls
        ("discard/section.py", "import time", 1),
        ("guest/__init__.py", "from time import monotonic", 1),
        ("dma/mapper.py", "import socket", 1),
        ("dma/_mapper.py", "import socket", 1),
        ("dma/soft.py", "import socket", 0),
        ("bitmap.py", "import timeit", 0),
    ],
)
def test_what_the_checks_find(tmp_path: Path, path: str, source: str, wrong: int) -> None:
    for part in RANKS:
        file = tmp_path / f"{part.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(source)
    modules = read_package(tmp_path)
    found = [*upward_imports(modules), *impure_imports(modules)]
    assert len(found) == wrong, found


def test_import_is_light() -> None:
    # What the interpreter has loaded before is not the library's doing.
    code = (
        "import json, sys; before = set(sys.modules); import ramblock; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    child = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(child.stdout)}
    assert "ramblock" in loaded
    assert loaded & NOT_AT_IMPORT == set()
