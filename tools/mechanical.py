# SPDX-License-Identifier: Apache-2.0
"""
Break modules mechanically, by operators on the syntax tree, and see that the tests notice.

    python -m tools.mechanical PART [NAME ...] [--sample N] [--seed N] [--threshold PERCENT]

A hand-written list (tools/mutants.py) holds the mistakes that somebody thought of; this one finds
lines that no test looks at. A sample of all mutants is run, the same one for each seed. A NAME
chooses the places whose name contains it. Survivors are printed with their change; exit code 1 if
fewer are killed than the threshold. Those that change nothing that anybody could see are listed
with a reason (``EQUIVALENT``), and do not count.

There are thousands, and starting pytest costs more than most of them. So the tests are collected
once, and each mutant is a fork of that process, in which one function gets other code. Nothing is
written.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

from tools.mutants_of_check import PARTS, Part
from tools.mutation import slots

__all__ = ["Mechanical", "all_of", "main", "mutants_of"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ramblock"
#: Of processor time, for each test, so that a busy machine changes no verdict; none that passes
#: takes a third of it.
_CPU_SECONDS = 5.0
_MEMORY = 4 << 30


class Mechanical(NamedTuple):
    """One mutant: a function, its changed body, and the change in words."""

    where: str
    """``module:Class.method`` or ``module:function``, below the package."""
    change: str
    """``old -> new``, with ``#2`` and so on behind it where the function has the same again."""
    line: int
    slot: int
    choice: int

    @property
    def name(self) -> str:
        """Return the name by which ``EQUIVALENT`` knows it."""
        return f"{self.where}: {self.change}"


# -- operators -------------------------------------------------------------------------------------

_OTHER_COMPARISON: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OTHER_OPERATOR: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}
_OTHER_NAME = {"min": "max", "max": "min", "any": "all", "all": "any"}
_DROPPED = (
    ast.Assign,
    ast.AugAssign,
    ast.Break,
    ast.Continue,
    ast.Delete,
    ast.Expr,
    ast.For,
    ast.If,
    ast.While,
)


def _replacements(node: object) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node instead."""
    if isinstance(node, ast.stmt):
        yield from _other_statements(node)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _OTHER_COMPARISON[type(node.ops[0])]()
        yield ast.Compare(node.left, [other], node.comparators)
    elif isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            ops = [*node.ops]
            ops[index] = _OTHER_COMPARISON[type(operator)]()
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        for index in range(len(node.values)):
            rest = node.values[:index] + node.values[index + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _OTHER_OPERATOR:
        yield ast.BinOp(node.left, _OTHER_OPERATOR[type(node.op)](), node.right)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_statements(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.If | ast.While):
        other = copy.copy(node)
        other.test = ast.UnaryOp(ast.Not(), node.test)
        yield other
    if isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value in (None, False)):
            yield ast.Return(ast.Constant(None))
    elif isinstance(node, _DROPPED) or (isinstance(node, ast.Return) and node.value is None):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text:
            yield ast.Pass()


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    any_order = isinstance(node.func, ast.Name) and node.func.id in {"max", "min"}
    for index in range(0 if any_order else len(node.args) - 1):
        args = [*node.args]
        args[index], args[index + 1] = args[index + 1], args[index]
        if ast.dump(args[index]) != ast.dump(args[index + 1]):
            yield ast.Call(node.func, args, node.keywords)
    if isinstance(node.func, ast.Name) and node.func.id in _OTHER_NAME:
        yield ast.Call(ast.Name(_OTHER_NAME[node.func.id], ast.Load()), node.args, node.keywords)


# -- mutants ---------------------------------------------------------------------------------------


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node


def mutants_of(module: str, source: str) -> list[Mechanical]:
    """List all mutants of a module's functions, in the order of its source."""
    found = []
    for name, function in _functions(ast.parse(source)):
        seen: dict[str, int] = {}
        for index, slot in enumerate(slots(ast.Module(function.body, []))):
            node = slot.get()
            for choice, other in enumerate(_replacements(node)):
                assert isinstance(node, ast.AST)
                change = f"{_short(node)} -> {_short(other)}"
                again = seen[change] = seen.get(change, 0) + 1
                if again > 1:
                    change += f" #{again}"
                line = getattr(node, "lineno", function.lineno)
                found.append(Mechanical(f"{module}:{name}", change, line, index, choice))
    return found


def _short(node: ast.AST) -> str:
    """Return a node's text in one line; of a compound statement its head."""
    lines = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()
    return f"{lines[0]} ..." if len(lines) > 1 else lines[0]


def _code_of(mutant: Mechanical, source: str) -> CodeType:
    """Compile the mutant's function."""
    tree = ast.parse(source)
    name = mutant.where.partition(":")[2]
    function = dict(_functions(tree))[name]
    body = ast.Module(function.body, [])
    slot = [*slots(body)][mutant.slot]
    other = [*_replacements(slot.get())][mutant.choice]
    slot.put(other)
    function.body = body.body
    found = _find_code(compile(ast.fix_missing_locations(tree), "<mutant>", "exec"), name)
    assert found is not None
    return found


def _find_code(code: CodeType, name: str) -> CodeType | None:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name:
                return constant
            if (found := _find_code(constant, name)) is not None:
                return found
    return None


def _function_of(where: str) -> FunctionType:
    module, _, names = where.partition(":")
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    for name in names.split("."):
        found = vars(found)[name]
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__func__", found)
    assert isinstance(found, FunctionType), where
    return found


# -- running ---------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    dead: bool
    by: str


class _Runner:
    """A plugin of pytest: it runs the collected tests once for each mutant, each time in a fork."""

    def __init__(self, mutants: Sequence[Mechanical], sources: dict[str, str], jobs: int) -> None:
        self.mutants = mutants
        self.outcomes: dict[Mechanical, _Outcome] = {}
        self.passes = False
        self._sources = sources
        self._jobs = jobs
        #: By place: the test that killed the last mutant there, which is likely to kill the next.
        self._killer: dict[str, str] = {}
        self._running: dict[int, tuple[Mechanical | None, int, int]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return True  # a module could not be collected
        try:
            self._start(session, None)
            self._wait()
            if self.passes:
                for mutant in self.mutants:
                    while len(self._running) >= self._jobs:
                        self._wait()
                    self._start(session, mutant)
                while self._running:
                    self._wait()
        finally:
            for pid in self._running:
                os.kill(pid, signal.SIGKILL)
        return True

    def _start(self, session: pytest.Session, mutant: Mechanical | None) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.close(writer)
            self._running[pid] = mutant, reader, len(self.outcomes)
            return
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            failed = self._run(session, mutant)
            os.write(writer, failed.encode())
        finally:
            os._exit(0)

    def _run(self, session: pytest.Session, mutant: Mechanical | None) -> str:
        session.config.pluginmanager.unregister(name="terminalreporter")
        items = session.items
        if mutant is not None:
            module = mutant.where.partition(":")[0]
            _function_of(mutant.where).__code__ = _code_of(mutant, self._sources[module])
            first = self._killer.get(mutant.where)
            items = sorted(items, key=lambda item: item.nodeid != first)
        for item, following in zip(items, [*items[1:], None], strict=True):
            signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS if mutant else 0)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return item.nodeid
        return "-"

    def _wait(self) -> None:
        pid, status = os.wait()
        mutant, reader, _ = self._running.pop(pid)
        with os.fdopen(reader) as pipe:
            failed = pipe.read()
        if mutant is None:
            self.passes = failed == "-"
            if not self.passes:
                print(f"the tests fail without a mutant: {failed or status}", file=sys.stderr)
            return
        if failed and failed != "-":
            self._killer[mutant.where] = failed
        outcome = _Outcome(failed != "-", failed or f"ended with {status}")
        self.outcomes[mutant] = outcome
        if not outcome.dead:
            print(f"SURVIVED  line {mutant.line:4} of {mutant.name}", flush=True)


def all_of(part: Part) -> tuple[list[Mechanical], dict[str, str]]:
    """List a part's mutants that are not known as equivalent, and its modules' sources."""
    sources = {
        module: (ROOT / "src" / PACKAGE / (module.replace(".", "/") + ".py")).read_text("utf-8")
        for module in part.modules
    }
    return [
        mutant
        for module, source in sources.items()
        for mutant in mutants_of(module, source)
        if mutant.name not in part.equivalent
    ], sources


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sample of a part's mutants; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mechanical", description="Break modules, and see that tests notice."
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", metavar="NAME", help="places whose name contains it")
    parser.add_argument("--sample", type=int, default=300, metavar="N", help="0: all of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=95.0, metavar="PERCENT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="list them, and run nothing")
    chosen = parser.parse_args(arguments)
    part = PARTS[chosen.part]
    mutants, sources = all_of(part)
    mutants = [each for each in mutants if _is_chosen(each, chosen.names)]
    total = len(mutants)
    if 0 < chosen.sample < total:
        mutants = random.Random(chosen.seed).sample(mutants, chosen.sample)
    if chosen.list:
        print("\n".join(each.name for each in mutants))
        return 0
    began = time.monotonic()
    runner = _Runner(mutants, sources, chosen.jobs)
    _run_pytest(part.tests, runner)
    if not runner.passes:
        return 1
    killed = sum(outcome.dead for outcome in runner.outcomes.values())
    share = 100 * killed / max(len(mutants), 1)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(mutants)} of {total} mutants, {killed} killed: {share:.1f} %; {minutes:.1f} min")
    return int(share < chosen.threshold)


def _is_chosen(mutant: Mechanical, names: Iterable[str]) -> bool:
    return not names or any(name in mutant.where for name in names)


def _run_pytest(tests: Sequence[str], runner: _Runner) -> None:
    os.environ["CI"] = "1"  # the same examples each time
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT / "src"))
    os.chdir(ROOT)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["-o", "addopts=--import-mode=importlib"]
    pytest.main([*options, *tests], plugins=[runner])


if __name__ == "__main__":
    sys.exit(main())
