# SPDX-License-Identifier: Apache-2.0
"""Structures of cachestat(2) (include/uapi/linux/mman.h)."""

from __future__ import annotations

import ctypes
from ctypes import c_uint64
from typing import Final

HEADER: Final = "linux/mman.h"


class CachestatRange(ctypes.Structure):
    """In bytes; a length of 0 goes to the end of the file."""

    C_NAME = "struct cachestat_range"
    _fields_ = (("off", c_uint64), ("len", c_uint64))
    off: int
    len: int


class Cachestat(ctypes.Structure):
    """In pages."""

    C_NAME = "struct cachestat"
    _fields_ = (
        ("nr_cache", c_uint64),
        ("nr_dirty", c_uint64),
        ("nr_writeback", c_uint64),
        ("nr_evicted", c_uint64),
        ("nr_recently_evicted", c_uint64),
    )
    nr_cache: int
    nr_dirty: int
    nr_writeback: int
    nr_evicted: int
    nr_recently_evicted: int
