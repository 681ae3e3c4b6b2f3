# SPDX-License-Identifier: Apache-2.0
"""
How an ioctl number is made, and the call (include/uapi/asm-generic/ioctl.h, fs/ioctl.c).

Bits 0-7 are the number, 8-15 the type, 16-29 the size of the argument, 30-31 its direction as user
space sees it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

__all__ = ["call", "io", "ior", "iow", "iowr"]

_TYPE_SHIFT, _SIZE_SHIFT, _DIRECTION_SHIFT = 8, 16, 30
_WRITE, _READ = 1, 2


def _number(direction: int, kind: int, number: int, size: int) -> int:
    return direction << _DIRECTION_SHIFT | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number


def io(kind: int, number: int) -> int:
    """_IO: an argument by value, or one whose size is not part of the number."""
    return _number(0, kind, number, 0)


def ior(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    """_IOR: the kernel writes the structure."""
    return _number(_READ, kind, number, ctypes.sizeof(argument))


def iow(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    """_IOW: the kernel reads the structure."""
    return _number(_WRITE, kind, number, ctypes.sizeof(argument))


def iowr(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    """_IOWR: both."""
    return _number(_READ | _WRITE, kind, number, ctypes.sizeof(argument))


def call(
    fd: int, request: int, argument: int | ctypes.Structure | ctypes.Array[ctypes.c_char] = 0
) -> int:
    """
    Make the call; the interpreter's lock is released while it lasts.

    A structure is changed in place.

    :return: The kernel's return value, 0 or more.
    :raises OSError: With the kernel's errno; the text names the request by number only, callers
        know its name.
    :raises InterruptedError: A signal came (EINTR); nothing is retried here.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        number = error.errno or 0
        raise OSError(number, f"ioctl {request:#x}: {os.strerror(number)}") from None
