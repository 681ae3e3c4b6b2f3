# SPDX-License-Identifier: Apache-2.0
"""A target whose chosen calls fail, once it is armed."""

from __future__ import annotations

from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.run.faults import FaultPlan
from ramblock.testing.targets import FaultyTarget

__all__ = ["InjectedTarget"]


class InjectedTarget:
    """
    Lets calls through until it is armed; from then on the plan's calls fail, counted from 1.

    :param inner: The target.
    :param plan: Which calls fail.
    """

    def __init__(self, inner: DmaTarget, plan: FaultPlan) -> None:
        self._inner: DmaTarget = inner
        self._name = repr(inner)
        self._plan = plan
        self._faulty: FaultyTarget | None = None

    def arm(self) -> None:
        """Count from now on."""
        plan = self._plan
        self._inner = self._faulty = FaultyTarget(
            self._inner,
            fail_map=plan.fail_map,
            fail_unmap=plan.fail_unmap,
            short_unmap=plan.short_unmap,
        )

    def account(self) -> None:
        """Add the failures here to the plan's account."""
        plan, faulty = self._plan, self._faulty
        if faulty is not None:
            plan.happened["map"] = sum(number <= faulty.map_calls for number in plan.fail_map)
            plan.happened["unmap"] = sum(number <= faulty.unmap_calls for number in plan.fail_unmap)
            plan.happened["short unmap"] = sum(
                number <= faulty.unmap_calls for number in plan.short_unmap
            )

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the target."""
        return self._inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, or fail."""
        self._inner.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, or fail."""
        return self._inner.unmap(iova, size)

    def close(self) -> None:
        """Close the target."""
        self._inner.close()

    def __repr__(self) -> str:
        return self._name
