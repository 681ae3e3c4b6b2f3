# SPDX-License-Identifier: Apache-2.0
"""
Mutants: changes of a function or table that its tests must notice.

A change names its place by qualified name and works on the syntax tree, so that line breaks,
comments and what stands around it do not matter. Patterns are source text. In a pattern ``...``
stands for any expression, for the rest of a call's arguments, and as a body for any statements::

    drop("undo.do('attribute', ...)")
    drop("if guard.poisoned: ...")
    replace("low < high", "low <= high")

A pattern has to be found exactly once. If it is not, the code has moved and the mutant has to
follow: :class:`MovedError` says which.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

__all__ = [
    "Change",
    "MovedError",
    "Mutant",
    "Outcome",
    "changed_tree",
    "copy_source",
    "drop",
    "drop_keyword",
    "insert",
    "is_imported_from",
    "narrow",
    "negate",
    "prepend",
    "replace",
    "run_all",
    "run_tests",
    "same",
    "slots",
    "swap",
    "unwrap",
]


class MovedError(Exception):
    """A place or pattern is not in the source exactly once."""


#: Changes the tree of one function, class or table in place.
Change: TypeAlias = Callable[[ast.AST], None]


class Mutant(NamedTuple):
    """One way to break the code."""

    name: str
    where: str
    """``module:function``, ``module:Class.method`` or ``module:TABLE``, below the package."""
    change: Change
    tests: Sequence[str]
    """Arguments of pytest: what has to notice it, the quickest first."""


# -- patterns --------------------------------------------------------------------------------------


def _is_anything(pattern: object) -> bool:
    return isinstance(pattern, ast.Constant) and pattern.value is Ellipsis


def _is_any_body(pattern: object) -> bool:
    return (
        isinstance(pattern, list)
        and len(pattern) == 1
        and isinstance(pattern[0], ast.Expr)
        and _is_anything(pattern[0].value)
    )


def same(pattern: object, found: object) -> bool:
    """Whether *found*, a tree or a part of one, is what *pattern* describes."""
    if _is_anything(pattern):
        return isinstance(found, ast.expr)
    if _is_any_body(pattern):
        return isinstance(found, list)
    if isinstance(pattern, ast.Call) and pattern.args and _is_anything(pattern.args[-1]):
        first = pattern.args[:-1]
        return (
            isinstance(found, ast.Call)
            and same(pattern.func, found.func)
            and same(first, found.args[: len(first)])
            and all(any(same(word, other) for other in found.keywords) for word in pattern.keywords)
        )
    if isinstance(pattern, ast.AST):
        if type(pattern) is not type(found):
            return False
        ignored = {"ctx", "type_comment", "type_params"}
        if _is_any_body(getattr(pattern, "body", None)):
            ignored |= {"orelse", "handlers", "finalbody"}
        return all(
            same(value, getattr(found, field))
            for field, value in ast.iter_fields(pattern)
            if field not in ignored
        )
    if isinstance(pattern, list):
        return (
            isinstance(found, list)
            and len(pattern) == len(found)
            and all(map(same, pattern, found))
        )
    return type(pattern) is type(found) and pattern == found


def _parse(source: str) -> ast.expr | list[ast.stmt]:
    try:
        return ast.parse(source, mode="eval").body
    except SyntaxError:
        return ast.parse(source).body


def _statements(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


class _Slot:
    """A place in a tree: a field of a node, or an element of one that is a list."""

    def __init__(self, node: ast.AST, field: str, index: int | None = None) -> None:
        self.node = node
        self.field = field
        self.index = index

    def get(self) -> object:
        value: object = getattr(self.node, self.field)
        if self.index is not None:
            assert isinstance(value, list)
            value = value[self.index]
        return value

    def put(self, value: ast.AST | list[ast.stmt]) -> None:
        """Set it; a statement can become several."""
        if self.index is None:
            assert isinstance(value, ast.AST)
            setattr(self.node, self.field, value)
            return
        entries = getattr(self.node, self.field)
        entries[self.index : self.index + 1] = value if isinstance(value, list) else [value]

    def delete(self) -> None:
        """Take it out; a body that would be empty passes."""
        if self.index is None:
            raise MovedError("is no element of a list, and cannot be dropped")
        entries = getattr(self.node, self.field)
        statement = isinstance(entries[self.index], ast.stmt)
        del entries[self.index]
        if statement and not entries:
            entries.append(ast.Pass())


def slots(tree: ast.AST) -> Iterator[_Slot]:
    """Yield the places of all nodes in a tree, in an order that depends on nothing else."""
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                yield from (_Slot(node, field, index) for index in range(len(value)))
            elif isinstance(value, ast.AST):
                yield _Slot(node, field)


def _find(tree: ast.AST, source: str) -> _Slot:
    parsed = _parse(source)
    pattern: ast.AST = parsed if isinstance(parsed, ast.AST) else parsed[0]
    found = [slot for slot in slots(tree) if same(pattern, slot.get())]
    if len(found) != 1:
        raise MovedError(f"{source!r} is there {len(found)} times")
    return found[0]


def _find_statement(tree: ast.AST, source: str) -> _Slot:
    """Find a statement, also one that is an expression."""
    (pattern,) = _statements(source)
    found = [slot for slot in slots(tree) if same(pattern, slot.get())]
    if len(found) != 1:
        raise MovedError(f"{source!r} is a statement there {len(found)} times")
    return found[0]


# -- changes ---------------------------------------------------------------------------------------


def drop(source: str) -> Change:
    """Take out a statement, or an element of a table."""

    def change(tree: ast.AST) -> None:
        slot = _find(tree, source)
        if slot.index is None:
            slot = _find_statement(tree, source)
        slot.delete()

    return change


def replace(old: str, new: str) -> Change:
    """Put *new* in the place of an expression or a statement."""

    def change(tree: ast.AST) -> None:
        slot = _find(tree, old)
        value = _parse(new)
        if isinstance(value, list) and not isinstance(slot.get(), ast.stmt):
            slot = _find_statement(tree, old)
        slot.put(_statements(new) if isinstance(slot.get(), ast.stmt) else value)

    return change


def negate(condition: str) -> Change:
    """Turn a condition round."""
    return replace(condition, f"not ({condition})")


def swap(first: str, second: str) -> Change:
    """Let two statements, or two elements of a table, change places."""

    def change(tree: ast.AST) -> None:
        one, other = _find(tree, first), _find(tree, second)
        if one.index is None or other.index is None:
            one, other = _find_statement(tree, first), _find_statement(tree, second)
        before, after = one.get(), other.get()
        assert isinstance(before, ast.AST)
        assert isinstance(after, ast.AST)
        one.put(after)
        other.put(before)

    return change


def unwrap(head: str) -> Change:
    """Take away a ``with``, ``try``, ``if`` or loop and leave its body."""

    def change(tree: ast.AST) -> None:
        slot = _find(tree, head)
        body = getattr(slot.get(), "body", None)
        assert isinstance(body, list)
        slot.put(body)

    return change


def insert(statement: str, *, before: str) -> Change:
    """Do something more, before a statement."""

    def change(tree: ast.AST) -> None:
        slot = _find_statement(tree, before)
        found = slot.get()
        assert isinstance(found, ast.stmt)
        slot.put([*_statements(statement), found])

    return change


def prepend(statement: str) -> Change:
    """Do something first, for instance return early."""

    def change(tree: ast.AST) -> None:
        assert isinstance(tree, ast.FunctionDef)
        tree.body = [*_statements(statement), *tree.body]

    return change


def drop_keyword(word: str, *, of: str) -> Change:
    """Leave out a keyword argument of a call."""

    def change(tree: ast.AST) -> None:
        call = _find(tree, of).get()
        assert isinstance(call, ast.Call)
        kept = [keyword for keyword in call.keywords if keyword.arg != word]
        if len(kept) != len(call.keywords) - 1:
            raise MovedError(f"{of!r} has no argument {word!r}")
        call.keywords = kept

    return change


def narrow(statement: str) -> Change:
    """Let the ``try`` around *statement* catch Exception where it catches BaseException."""
    (pattern,) = _statements(statement)

    def change(tree: ast.AST) -> None:
        found = [
            handler
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) and any(same(pattern, entry) for entry in node.body)
            for handler in node.handlers
            if isinstance(handler.type, ast.Name) and handler.type.id == "BaseException"
        ]
        if len(found) != 1:
            raise MovedError(f"{len(found)} handlers of a BaseException around {statement!r}")
        found[0].type = ast.Name("Exception", ast.Load())

    return change


# -- making a mutant -------------------------------------------------------------------------------


def _is_named(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name == name
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _is_overload(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(decorator, ast.Name) and decorator.id == "overload"
        for decorator in node.decorator_list
    )


def _place(tree: ast.AST, names: Iterable[str]) -> ast.AST:
    for name in names:
        found = [
            node
            for node in ast.iter_child_nodes(tree)
            if _is_named(node, name) and not _is_overload(node)
        ]
        if len(found) != 1:
            raise MovedError(f"{name!r} is there {len(found)} times")
        (tree,) = found
    return tree


def changed_tree(mutant: Mutant, package: Path) -> tuple[Path, ast.Module]:
    """
    Change the tree of a source below *package*; nothing is written.

    :return: The file, and its tree.
    :raises MovedError: The place or a pattern is not there exactly once.
    """
    module, _, names = mutant.where.partition(":")
    file = package.joinpath(*module.split(".")).with_suffix(".py")
    try:
        if not file.is_file():
            raise MovedError("there is no such module")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        place = _place(tree, names.split("."))
        before = ast.dump(place)
        mutant.change(place)
        if ast.dump(place) == before:
            raise MovedError("the change changes nothing")
    except MovedError as error:
        raise MovedError(f"{mutant.name}: {mutant.where}: {error}") from None
    return file, ast.fix_missing_locations(tree)


# -- running ---------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a mutant, or the code as it is, came through its tests."""

    verdict: str
    """``killed``, ``hang``, ``SURVIVED``; and ``BROKEN`` where no test could say."""
    seconds: float
    by: str
    """The test that failed, or what else happened."""

    @property
    def dead(self) -> bool:
        """Whether the tests noticed."""
        return self.verdict in {"killed", "hang"}


_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_LEFT_ITS_TEST = re.compile(r"^!+ KeyboardInterrupt\b", re.MULTILINE)
_TESTS_FAILED, _INTERRUPTED = 1, 2
#: Seconds after which one test hangs; none that passes takes a tenth of that.
_HANGS_AFTER = 60

_running: set[int] = set()


def run_tests(root: Path, source: Path, tests: Sequence[str], seconds: float) -> Outcome:
    """Run *tests* of *root* against the package in *source*."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib", "-p", "pytest_timeout"]
    command += ["-o", f"timeout={_HANGS_AFTER}", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "CI": "1",  # the same examples each time
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # half of the time that it takes to start
        "COLUMNS": "200",
        "RAMBLOCK_STRESS_SECONDS": "4",
        "RAMBLOCK_INTERRUPT_SECONDS": "1",
    }
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own: a hang has children too
    )
    _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("hang", time.monotonic() - began, f"no end in {seconds:.0f} s")
    finally:
        _running.discard(process.pid)
    spent = time.monotonic() - began
    if process.returncode == 0:
        return Outcome("SURVIVED", spent, "")
    failed = _FAILED.search(output)
    if process.returncode < 0:
        number = signal.Signals(-process.returncode)
        return Outcome("killed", spent, f"the tests' process ended with {number.name}")
    if process.returncode == _TESTS_FAILED and failed and "ERROR collecting" not in output:
        hangs = f"Timeout (>{_HANGS_AFTER}" in output
        return Outcome("hang" if hangs else "killed", spent, failed[1].rpartition("/")[2])
    if process.returncode == _INTERRUPTED and _LEFT_ITS_TEST.search(output):
        return Outcome("killed", spent, "a KeyboardInterrupt that left its test")
    last = output.strip().splitlines()[-3:]
    return Outcome("BROKEN", spent, f"pytest ended with {process.returncode}: {' / '.join(last)}")


def copy_source(root: Path, folder: Path) -> Path:
    """Copy the source of *root* into *folder*, where it can be changed."""
    source = folder / "src"
    shutil.copytree(root / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def run_one(root: Path, package: str, mutant: Mutant, seconds: float) -> Outcome:
    """Run the tests of *mutant* against a copy that has it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = copy_source(root, Path(folder))
        file, tree = changed_tree(mutant, source / package)
        file.write_text(ast.unparse(tree), encoding="utf-8")
        return run_tests(root, source, mutant.tests, seconds)


def run_all(
    root: Path, package: str, mutants: Sequence[Mutant], jobs: int, seconds: float
) -> Iterator[tuple[Mutant, Outcome]]:
    """Run them side by side, and yield each with its outcome, in the order of *mutants*."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_one, root, package, mutant, seconds) for mutant in mutants]
        try:
            for mutant, future in zip(mutants, running, strict=True):
                yield mutant, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in list(_running):  # left by Ctrl-C
                os.killpg(group, signal.SIGKILL)


def is_imported_from(source: Path, package: str, root: Path) -> bool:
    """Whether tests that run with *source* in front import *package* from there."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}; print({package}.__file__)"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip()).is_relative_to(source)
