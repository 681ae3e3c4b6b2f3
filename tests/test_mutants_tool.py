"""The tool that breaks the core on purpose: it finds its places, and says what came of it."""

from __future__ import annotations

import ast
import difflib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mutation: Any = pytest.importorskip("tools.mutation", reason="the tools are not there")
mutants: Any = pytest.importorskip("tools.mutants", reason="the tools are not there")
mechanical: Any = pytest.importorskip("tools.mechanical", reason="the tools are not there")

SOURCE = '''
TABLE = (
    step("first", one,
         two),
    step("second", three),  # a comment
)


class Guard:
    """A lock."""

    def run(self, work, *arguments):
        """Run."""
        if self.poisoned:
            raise RuntimeError
        with self.lock:
            self.note(
                work,
                urgent=True,
            )
            return work(*arguments)

    def other(self, low, high):
        def inner():
            return low < high
        try:
            inner()
        except BaseException:
            self.note("failed")
        for _ in range(3):
            self.note("again")
'''


def change(where: str, operator: object, folder: Path) -> str:
    """The lines of SOURCE that are there no longer, and those that are new."""
    (folder / "module.py").write_text(SOURCE)
    mutant = mutation.Mutant("a mutant", f"module:{where}", operator, ())
    file, tree = mutation.changed_tree(mutant, folder)
    assert file == folder / "module.py"
    before, after = ast.unparse(ast.parse(SOURCE)), ast.unparse(tree)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:2] not in {"--", "++", "@@"})


CHANGES: dict[str, tuple[str, Callable[[], object], str]] = {
    "drop a statement, however it is laid out": (
        "Guard.run",
        lambda: mutation.drop("self.note(work, urgent=True)"),
        "-            self.note(work, urgent=True)",
    ),
    "drop a statement by its head": (
        "Guard.run",
        lambda: mutation.drop("if self.poisoned: ..."),
        """
-        if self.poisoned:
-            raise RuntimeError
""",
    ),
    "a body that would be empty passes": (
        "Guard.run",
        lambda: mutation.drop("raise RuntimeError"),
        """
-            raise RuntimeError
+            pass
""",
    ),
    "drop a row": (
        "TABLE",
        lambda: mutation.drop("step('second', ...)"),
        """
-TABLE = (step('first', one, two), step('second', three))
+TABLE = (step('first', one, two),)
""",
    ),
    "swap rows": (
        "TABLE",
        lambda: mutation.swap("step('first', ...)", "step('second', ...)"),
        """
-TABLE = (step('first', one, two), step('second', three))
+TABLE = (step('second', three), step('first', one, two))
""",
    ),
    "swap statements": (
        "Guard.run",
        lambda: mutation.swap("self.note(...)", "return work(*arguments)"),
        """
+            return work(*arguments)
-            return work(*arguments)
""",
    ),
    "replace an expression": (
        "Guard.other.inner",
        lambda: mutation.replace("low<high", "low <= high"),
        """
-            return low < high
+            return low <= high
""",
    ),
    "replace a statement by several": (
        "Guard.other",
        lambda: mutation.replace("for _ in range(3): ...", "one()\ntwo()"),
        """
-        for _ in range(3):
-            self.note('again')
+        one()
+        two()
""",
    ),
    "turn a condition round": (
        "Guard.run",
        lambda: mutation.negate("self.poisoned"),
        """
-        if self.poisoned:
+        if not self.poisoned:
""",
    ),
    "take a with away": (
        "Guard.run",
        lambda: mutation.unwrap("with self.lock: ..."),
        """
-        with self.lock:
-            self.note(work, urgent=True)
-            return work(*arguments)
+        self.note(work, urgent=True)
+        return work(*arguments)
""",
    ),
    "catch less": (
        "Guard.other",
        lambda: mutation.narrow("inner()"),
        """
-        except BaseException:
+        except Exception:
""",
    ),
    "return early": (
        "Guard.other.inner",
        lambda: mutation.prepend("return True"),
        "+            return True",
    ),
    "do something before a statement": (
        "Guard.other",
        lambda: mutation.insert("extra()", before="try: ...\nfinally: ..."),
        "+        extra()",
    ),
    "leave out an argument": (
        "Guard.run",
        lambda: mutation.drop_keyword("urgent", of="self.note(...)"),
        """
-            self.note(work, urgent=True)
+            self.note(work)
""",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_changes_its_place_and_nothing_else(name: str, tmp_path: Path) -> None:
    where, operator, expected = CHANGES[name]
    assert change(where, operator(), tmp_path) == expected.strip("\n")


MOVED: dict[str, tuple[str, Callable[[], object]]] = {
    "no such function": ("Guard.walk", lambda: mutation.prepend("return")),
    "no such table": ("ROWS", lambda: mutation.drop("step('first', ...)")),
    "no such statement": ("Guard.run", lambda: mutation.drop("self.stop()")),
    "no such expression": ("Guard.other", lambda: mutation.replace("low > high", "True")),
    "twice": ("Guard.other", lambda: mutation.drop("self.note(...)")),
    "another number of arguments": ("TABLE", lambda: mutation.drop("step('first', one)")),
    "no such argument": ("Guard.run", lambda: mutation.drop_keyword("soon", of="self.note(...)")),
    "nothing to narrow": ("Guard.other", lambda: mutation.narrow("outer()")),
    "no change": ("Guard.other", lambda: mutation.replace("low < high", "low < high")),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_place_that_is_not_there_exactly_once_is_named(name: str, tmp_path: Path) -> None:
    where, operator = MOVED[name]
    with pytest.raises(mutation.MovedError, match=r"^a mutant: module:") as caught:
        change(where, operator(), tmp_path)
    assert where in str(caught.value)


def test_each_mutant_finds_its_place() -> None:
    package = mutants.ROOT / "src" / mutants.PACKAGE
    if not package.is_dir():
        pytest.skip("the source is not there")
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(names) == len(set(names))
    moved = []
    for mutant in mutants.MUTANTS:
        try:
            mutation.changed_tree(mutant, package)
        except mutation.MovedError as error:
            moved.append(str(error))
        for test in mutant.tests:
            file, _, function = test.partition("::")
            text = (mutants.ROOT / file).read_text(encoding="utf-8")
            assert f"def {function}(" in text or not function, f"{mutant.name}: no {test}"
    assert moved == []


# -- running ---------------------------------------------------------------------------------------

CODE = """
import time

LIMIT = 3

def fits(size):
    return size <= LIMIT

def wait():
    for _ in range(2):
        time.sleep(0)
"""

TESTS = """
import os

import pytest
import thing


def test_fits():
    assert thing.fits(1)
    assert not thing.fits(5)


def test_wait():
    thing.wait()


def test_wrong():
    assert os.environ.get("HOME") is None
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("src/thing", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src/thing/__init__.py").write_text("from thing.code import *\n")
    (tmp_path / "src/thing/code.py").write_text(CODE)
    (tmp_path / "tests/test_thing.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def mutant(name: str, where: str, operator: object, test: str = "test_fits") -> object:
    return mutation.Mutant(name, where, operator, (f"tests/test_thing.py::{test}",))


@pytest.fixture
def _of_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "ROOT", project)
    monkeypatch.setattr(mutants, "PACKAGE", "thing")
    monkeypatch.setattr(
        mutants,
        "MUTANTS",
        [
            mutant("everything fits", "code:fits", mutation.prepend("return True")),
            mutant("a little more fits", "code:LIMIT", mutation.replace("3", "4")),
            mutant("no end", "code:wait", mutation.prepend("while True: pass"), "test_wait"),
            mutant("no import", "code:fits", mutation.prepend("raise SystemExit"), "test_gone"),
        ],
    )


@pytest.mark.usefixtures("_of_the_project")
def test_the_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--jobs", "2", "--timeout", "4", "fits", "no end"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:-1]] == ["killed", "SURVIVED", "hang"]
    assert told[0].endswith("test_thing.py::test_fits")
    assert "no end in 4 s" in told[2]
    assert told[-1].startswith("3 mutants, 2 killed (1 hang), 1 survive")
    assert mutants.main(["everything"]) == 0
    # Nothing was changed in place.
    assert (mutants.ROOT / "src/thing/code.py").read_text() == CODE


@pytest.mark.usefixtures("_of_the_project")
def test_tests_that_say_nothing_kill_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["no import"]) == 1
    assert "the tests fail without a mutant: pytest ended with 4" in capsys.readouterr().err
    only = mutant("wrong anyway", "code:LIMIT", mutation.replace("3", "4"), "test_wrong")
    mutants.MUTANTS.append(only)
    assert mutants.main(["wrong anyway"]) == 1
    assert "the tests fail without a mutant" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mutants.main(["no such name"])


@pytest.mark.usefixtures("_of_the_project")
def test_one_that_cannot_be_imported_is_not_killed(capsys: pytest.CaptureFixture[str]) -> None:
    only = mutant("no module", "code:LIMIT", mutation.replace("3", "1 // 0"))
    mutants.MUTANTS.append(only)
    assert mutants.main(["no module"]) == 1
    assert capsys.readouterr().out.startswith("BROKEN")


@pytest.mark.usefixtures("_of_the_project")
def test_an_interrupt_that_leaves_its_test_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    change = mutation.prepend("raise KeyboardInterrupt('now')")
    mutants.MUTANTS.append(mutant("interrupted", "code:fits", change))
    assert mutants.main(["interrupted"]) == 0
    assert "a KeyboardInterrupt that left its test" in capsys.readouterr().out


@pytest.mark.usefixtures("_of_the_project")
def test_a_mutant_that_has_moved_stops_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    mutants.MUTANTS.append(mutant("moved", "code:fits", mutation.drop("size = 1")))
    assert mutants.main([]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "moved: code:fits: 'size = 1' is there 0 times\n"


@pytest.mark.usefixtures("_of_the_project")
def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--list", "fits"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["code:fits", "code:LIMIT"]


# -- mechanical mutants

FUNCTION = """
class Table:
    def find(self, low, high):
        # A comment.
        if low < high and self.rows:
            self.note(low, high)
            return max(low + 1, high)
        return None
"""

FOUND = {
    "if low < high and self.rows: ... -> if not (low < high and self.rows): ...",
    "if low < high and self.rows: ... -> pass",
    "low < high and self.rows -> self.rows",
    "low < high and self.rows -> low < high",
    "low < high -> low <= high",
    "self.note(low, high) -> pass",
    "self.note(low, high) -> self.note(high, low)",
    "return max(low + 1, high) -> return None",
    "max(low + 1, high) -> min(low + 1, high)",
    "low + 1 -> low - 1",
    "1 -> 2",
}


def test_what_the_operators_make_of_a_function() -> None:
    found = mechanical.mutants_of("module", FUNCTION)
    assert {each.where for each in found} == {"module:Table.find"}
    assert {each.change for each in found} == FOUND
    assert len(found) == len(FOUND)


@pytest.mark.parametrize("part", mechanical.PARTS)
def test_each_equivalent_mutant_and_each_test_is_there(part: str) -> None:
    if not (mechanical.ROOT / "src").is_dir():
        pytest.skip("the source is not there")
    chosen = mechanical.PARTS[part]
    every, _ = mechanical.all_of(chosen._replace(equivalent={}))
    assert chosen.equivalent.keys() <= {each.name for each in every}
    assert all((mechanical.ROOT / test.partition("::")[0]).is_file() for test in chosen.tests)
    assert len(every) == len({each.name for each in every})


def _tell(*arguments: str) -> str:
    """Run the tool in a process of its own, in which pytest does not run yet."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.mechanical", *arguments],
        cwd=mechanical.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.stdout}{done.returncode}"


@pytest.mark.slow
def test_a_mechanical_mutant_is_killed_by_its_tests() -> None:
    told = _tell("audit", "Lengths.add", "--sample", "4")
    assert "4 of" in told
    assert told.endswith("0")
