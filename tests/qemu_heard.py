"""What a device of QEMU's was told, as its vfio-user server heard it; requests and pages."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from lab.qemu_double import VfioUserDevice
from ramblock.trace import TraceWriter
from ramblock.units import PAGE_SIZE

__all__ = ["Call", "Heard", "Request", "Theirs", "pages_of", "runs_of"]

Call: TypeAlias = tuple[str, int, int]
"""``map`` or ``unmap``, address, size."""


class Heard(TraceWriter):
    """What a probe's client has mapped and unmapped, as the probe's server heard it."""

    def __init__(self) -> None:
        super().__init__(None)
        self._calls: list[Call] = []
        self.pages: set[int] = set()

    @property
    def active(self) -> bool:
        return True

    def emit(self, event: str, **fields: object) -> None:
        if event not in ("map", "unmap"):
            return
        iova, size = fields["iova"], fields["size"]
        assert isinstance(iova, int)
        assert isinstance(size, int)
        self._calls.append((event, iova, size))
        pages = pages_of(iova, size)
        # In place: QEMU has its answer only after this, so nobody else looks at it now.
        (self.pages.update if event == "map" else self.pages.difference_update)(pages)

    def take(self) -> list[Call]:
        """Return the calls since the last time."""
        calls, self._calls = self._calls, []
        return calls


class Theirs(NamedTuple):
    """A device of QEMU's."""

    device: VfioUserDevice
    heard: Heard


class Request(NamedTuple):
    gpa: int
    size: int
    private: bool

    @property
    def pages(self) -> set[int]:
        return pages_of(self.gpa, self.size)

    def __str__(self) -> str:
        to = "private" if self.private else "shared"
        return f"[{self.gpa:#x}, {self.gpa + self.size:#x}) to {to}"


def pages_of(start: int, size: int) -> set[int]:
    return set(range(start // PAGE_SIZE, (start + size) // PAGE_SIZE))


def runs_of(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of *pages* as (address, size), ascending."""
    start = end = None
    for page in sorted(pages):
        if page != end:
            if start is not None and end is not None:
                yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
            start = page
        end = page + 1
    if start is not None and end is not None:
        yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
