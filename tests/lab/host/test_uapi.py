"""
Each number and layout of ramblock.uapi against the headers of the lab's kernel, and that the
comparison can fail.
"""

import ctypes
import enum
import importlib
import os
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import ramblock.uapi
from uapi_program import differences, facts

_MODULES = sorted(module.name for module in pkgutil.iter_modules(ramblock.uapi.__path__))
# How numbers are made, calls are done and descriptors are owned: no header says that in numbers.
_WITHOUT_HEADER = {"ioctl", "owned"}


@pytest.fixture
def headers() -> Path:
    return Path(os.environ["RAMBLOCK_LAB_HEADERS"])


@pytest.mark.parametrize("name", sorted(set(_MODULES) - _WITHOUT_HEADER))
def test_module_agrees_with_its_header(name: str, headers: Path, tmp_path: Path) -> None:
    module = importlib.import_module(f"ramblock.uapi.{name}")

    assert list(facts(module))
    assert differences(module, headers, tmp_path) == []


class _Status(ctypes.Structure):
    C_NAME = "struct vfio_group_status"
    C_FIELDS = {"size": "argsz"}  # noqa: RUF012  # as the modules have it
    _fields_ = (("size", ctypes.c_uint64), ("flags", ctypes.c_uint32))


class _Flags(enum.IntFlag):
    VFIO_GROUP_FLAGS_VIABLE = 1
    VFIO_GROUP_FLAGS_CONTAINER_SET = 4


def _module(**contents: object) -> ModuleType:
    module = ModuleType("wrong")
    vars(module).update(contents, HEADER="linux/vfio.h")
    for value in contents.values():
        if isinstance(value, type):
            value.__module__ = "wrong"
    return module


def test_wrong_number_is_named(headers: Path, tmp_path: Path) -> None:
    module = _module(VFIO_API_VERSION=0, VFIO_BASE=101, Flags=_Flags)

    assert differences(module, headers, tmp_path) == [
        "VFIO_BASE: 0x65 here, 0x64 in <linux/vfio.h>",
        "Flags.VFIO_GROUP_FLAGS_CONTAINER_SET: 0x4 here, 0x2 in <linux/vfio.h>",
    ]


def test_wrong_layout_is_named(headers: Path, tmp_path: Path) -> None:
    assert differences(_module(Status=_Status), headers, tmp_path) == [
        "sizeof(struct vfio_group_status): 0x10 here, 0x8 in <linux/vfio.h>",
        "sizeof(struct vfio_group_status.argsz): 0x8 here, 0x4 in <linux/vfio.h>",
        "offsetof(struct vfio_group_status, flags): 0x8 here, 0x4 in <linux/vfio.h>",
    ]


def test_name_that_the_header_lacks_is_named(headers: Path, tmp_path: Path) -> None:
    (line,) = differences(_module(VFIO_NO_SUCH_THING=1), headers, tmp_path)

    assert "VFIO_NO_SUCH_THING" in line
