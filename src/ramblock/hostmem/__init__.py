# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a block are on this host, and the system calls that get and free them."""

from ramblock.hostmem.backend import BackendKind, HostMemoryBackend
from ramblock.hostmem.backing import (
    AnonymousBacking,
    MemfdBacking,
    PrivateBacking,
    SharedBacking,
    StandInPrivate,
)
from ramblock.hostmem.in_place import InPlaceBacking
from ramblock.hostmem.numa import NumaBinding, NumaPolicy

__all__ = [
    "AnonymousBacking", "BackendKind", "HostMemoryBackend", "InPlaceBacking", "MemfdBacking",
    "NumaBinding", "NumaPolicy", "PrivateBacking", "SharedBacking", "StandInPrivate",
]  # fmt: skip
