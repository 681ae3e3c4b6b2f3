# SPDX-License-Identifier: Apache-2.0
"""What the core has done, as values; whoever wants a trace sets an observer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Observer", "StateChanged"]


@dataclass(frozen=True, slots=True)
class StateChanged:
    """
    A range of a block went from one page state to another, and its listeners followed.

    QEMU's ``ram_block_attributes_state_change`` (system/trace-events) has the same fields, but is
    emitted at entry, so also for calls that fail; this one is not.
    """

    block: str
    offset: int  #: Inside the block, in bytes; not a guest address.
    size: int  #: In bytes.
    before: str  #: ``"shared"``, ``"private"`` or ``"mixture"``.
    after: str  #: ``"shared"`` or ``"private"``.


#: Called under the memory's lock, after the fact; must not call back in. Its exceptions are logged
#: and dropped: to watch never changes an outcome.
Observer = Callable[[StateChanged], None]
