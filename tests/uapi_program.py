"""
Compares a module of ``ramblock.uapi`` with the header it is named for, by a C program made from the
module.

What is compared: each public integer and each member of an enumeration, under its own name, which
is the C name; each structure or union with ``C_NAME``: its size, and offset and size of each
member. ``C_FIELDS`` has the C name of a member whose Python name differs. A member of a type
without ``C_NAME``, which has no name in C either, is compared member by member.
"""

import ctypes
import enum
import inspect
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeAlias

_Aggregate: TypeAlias = type[ctypes.Structure] | type[ctypes.Union]

_PROGRAM = """\
#include <stddef.h>
#include <stdio.h>
#include <{header}>

int main(void)
{{
{prints}
    return 0;
}}
"""


class Fact(NamedTuple):
    """One value that the module and the header have to agree on."""

    name: str
    expression: str
    """In C."""
    value: int
    """In the module."""


def facts(module: ModuleType) -> Iterator[Fact]:
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, int) and not isinstance(value, bool | enum.Enum):
            yield Fact(name, name, value)
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            if issubclass(value, enum.IntEnum | enum.IntFlag):
                yield from (Fact(f"{name}.{k}", k, int(v)) for k, v in value.__members__.items())
            elif issubclass(value, ctypes.Structure | ctypes.Union) and hasattr(value, "C_NAME"):
                yield from _layout(value)


def _layout(kind: _Aggregate) -> Iterator[Fact]:
    c_name: str = vars(kind)["C_NAME"]
    yield Fact(f"sizeof({c_name})", f"sizeof({c_name})", ctypes.sizeof(kind))
    for path, offset, size in _members(kind, 0):
        yield Fact(f"offsetof({c_name}, {path})", f"offsetof({c_name}, {path})", offset)
        yield Fact(f"sizeof({c_name}.{path})", f"sizeof((({c_name} *)0)->{path})", size)


def _members(kind: _Aggregate, start: int) -> Iterator[tuple[str, int, int]]:
    names: dict[str, str] = getattr(kind, "C_FIELDS", {})
    for name, type_, *_ in kind._fields_:
        descriptor = getattr(kind, name)
        offset, path = start + descriptor.offset, names.get(name, name)
        inner: Iterator[tuple[str, int, int]] = iter(())
        if issubclass(type_, ctypes.Structure | ctypes.Union) and not hasattr(type_, "C_NAME"):
            inner = _members(type_, offset)
        if name in getattr(kind, "_anonymous_", ()):
            yield from inner
            continue
        yield path, offset, descriptor.size
        yield from ((f"{path}.{rest}", at, size) for rest, at, size in inner)


def differences(module: ModuleType, headers: Path, folder: Path) -> list[str]:
    """
    Return a line for each fact that the header has another value for; none if all is well.

    :param headers: The folder that ``make headers_install`` of the kernel has filled.
    :param folder: For the program.
    """
    wanted = list(facts(module))
    # By its number: a name may have characters that a C string needs escapes for.
    prints = "\n".join(
        f'    printf("%llu\\n", (unsigned long long)({fact.expression})); /* {fact.name} */'
        for fact in wanted
    )
    source, program = folder / "compare.c", folder / "compare"
    source.write_text(_PROGRAM.format(header=module.HEADER, prints=prints))
    compiled = subprocess.run(
        ["gcc", "-isystem", headers / "include", source, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        return [f"the program does not compile: {compiled.stderr}"]
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = [int(line) for line in printed.split()]
    return [
        f"{fact.name}: {fact.value:#x} here, {actual:#x} in <{module.HEADER}>"
        for fact, actual in zip(wanted, found, strict=True)
        if fact.value % 2**64 != actual
    ]
