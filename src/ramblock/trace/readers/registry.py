# SPDX-License-Identifier: Apache-2.0
"""
The formats by name, and how a reader of each is had.

A format is one file. Ours are the modules of :mod:`ramblock.trace.readers.formats`, and a module's
name is the format's. A package of somebody else's names its reader as an entry point of the group
``ramblock.trace_readers``; a program may also register one for itself, with the decorator. Nothing
is imported before it is needed: a recording of 4 KB should not wait for the readers of the others.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from ramblock.errors import UsageError
from ramblock.trace.events import Source
from ramblock.trace.readers import formats
from ramblock.trace.readers.base import TraceReader

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "claim", "make_reader", "names", "register"]

#: The group of entry points of readers outside this package.
GROUP = "ramblock.trace_readers"

_R = TypeVar("_R", bound=type[TraceReader])
_OWN = frozenset(module.name for module in pkgutil.iter_modules(formats.__path__))
_readers: dict[str, type[TraceReader]] = {}
_claims: dict[str, Callable[[bytes], bool]] = {}


def register(name: str, *, claims: Callable[[bytes], bool] | None = None) -> Callable[[_R], _R]:
    """
    Register the reader of a format; a decorator of its class.

    :param name: As ``--format`` gets it.
    :param claims: Whether a file is of this format, from its first bytes (at most 64 KiB, perhaps
        fewer). None: only ``--format`` chooses it. It is asked where no event of ours is found.
    """

    def decorate(reader: _R) -> _R:
        _readers[name] = reader
        if claims is not None:
            _claims[name] = claims
        return reader

    return decorate


def names() -> tuple[str, ...]:
    """List the formats, without importing a reader."""
    return tuple(sorted({*_OWN, *_readers, *_entry_points()}))


def make_reader(
    name: str, source: Source, *, virtio_mem_block_size: int | None = None
) -> TraceReader:
    """
    Make the reader of a format.

    :raises UsageError: There is no such format.
    """
    if name not in _readers:
        if name in _OWN:
            import_module(f"{formats.__name__}.{name}")
        else:
            _load_others(name)
    reader = _readers.get(name)
    if reader is None:
        raise UsageError(f"format {name!r}", value=name, expected=", ".join(names()))
    return reader(source, virtio_mem_block_size=virtio_mem_block_size)


def claim(head: bytes) -> str | None:
    """Name the format of somebody else's reader that claims a file; None: none does."""
    _load_others(None)
    return next((name for name, claims in _claims.items() if claims(head)), None)


def _load_others(wanted: str | None) -> None:
    for name, entry in _entry_points().items():
        if name not in _readers and wanted in (None, name):
            reader = entry.load()
            _readers.setdefault(name, reader)  # the decorator may have done it


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}
