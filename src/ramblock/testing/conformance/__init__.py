# SPDX-License-Identifier: Apache-2.0
"""
Checks of a part of one's own against the reference: a DMA target, a discard source, a listener.

Each function plays random steps (Hypothesis: ``pip install ramblock[testing]``) to the part and to
a naive model of it, and raises ``AssertionError`` with the shortest story that it found: the steps,
what the last one answered, and what was expected. Without pytest too::

    from ramblock.testing.conformance import check_target

    check_target(MyTarget, device=lambda target: target.device)

:doc:`testing` has a whole target, source and listener.
"""

from ramblock.testing.conformance.listener import check_listener
from ramblock.testing.conformance.source import check_source
from ramblock.testing.conformance.target import Device, check_target

__all__ = ["Device", "check_listener", "check_source", "check_target"]
