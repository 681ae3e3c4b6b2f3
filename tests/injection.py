"""
A small guest in which any call at an edge can be made to fail, and the judgement of what is left
afterwards.

The guest has eight pages in two blocks that lie side by side in guest addresses, one of which does
not begin at its block's first page. Around it stand wrappers: on the outside those that fail on
command, inside them the checker of `ramblock.testing`, which sees what really happened. `explore`
runs an operation once undisturbed, then once for each call and each way in which that call can
fail, and then again for each later call of each of those runs, most of them calls of the undo.

After each run exactly one of three things must be true: everything is as before; the operation is
done, with an account of what is not freed; or the memory is poisoned, and what is not known is in
doubt.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator, MutableSet, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, TypeVar

import pytest

from ramblock import (
    ConversionResult,
    GuestMemory,
    Mapper,
    MappingPolicy,
    PageState,
    RamBlock,
    RamSection,
    VirtioMem,
)
from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.dma import DmaCapabilities, HostRange, SoftIommu
from ramblock.errors import (
    ConversionError,
    DmaError,
    MappingLimitError,
    PoisonedError,
)
from ramblock.guest.block import _kept
from ramblock.hostmem.in_place import TRIES
from ramblock.testing import (
    CheckedInPlace,
    CheckedPrivate,
    CheckedShared,
    CheckedTarget,
    CheckedVm,
    GuestChecker,
    GuestModel,
    pages_of,
)

PAGE = 4096
BASE = 0x10_0000
SHARED = PageState.SHARED
PRIVATE = PageState.PRIVATE

T = TypeVar("T")


# -- failing on command ----------------------------------------------------------------------------


class Kind(Enum):
    """What is called."""

    MAP = "map"
    UNMAP = "unmap"
    ATTRIBUTE = "attribute"
    IN_PLACE = "attribute in place"
    FLIP = "state"
    FREE_SHARED = "free shared"
    FREE_PRIVATE = "free private"
    ADD_SLOT = "add slot"
    REMOVE_SLOT = "remove slot"
    POPULATE = "populate"
    DISCARD = "discard"
    ASK = "ask a source"


FREES = {Kind.FREE_SHARED, Kind.FREE_PRIVATE}


class Way(Enum):
    """How it fails."""

    REFUSE = auto()
    """It raises and has done nothing."""
    ERROR_AFTER = auto()
    """It raises and has done everything."""
    ERROR_PART = auto()
    """It raises and has done half."""
    PINNED = auto()
    """It raises EAGAIN and has done half; so does every later call that sets pages to the same."""
    PINNED_ONCE = auto()
    """It raises EAGAIN and has done half, and the next time it works."""
    DOUBT_BEFORE = auto()
    """It says that it does not know, and has done nothing."""
    DOUBT_AFTER = auto()
    """It says that it does not know, and has done everything."""
    DOUBT_PART = auto()
    """It says that it does not know, and has done half."""
    SHORT_NONE = auto()
    """An unmap removes nothing and says so."""
    SHORT_PART = auto()
    """An unmap leaves the last page and says so."""
    SHORT_LIE = auto()
    """An unmap removes everything and says that the last page is left."""
    INTERRUPT_BEFORE = auto()
    """Ctrl-C, and nothing was done."""
    INTERRUPT_AFTER = auto()
    """Ctrl-C, and everything was done."""


_INTERRUPTS = (Way.INTERRUPT_BEFORE, Way.INTERRUPT_AFTER)
_SHORT = {Way.SHORT_NONE, Way.SHORT_PART, Way.SHORT_LIE}
# A single page has no half.
_PARTIAL = {Way.DOUBT_PART, Way.SHORT_PART, Way.ERROR_PART}
_PINS = {Way.PINNED, Way.PINNED_ONCE}

WAYS: dict[Kind, tuple[Way, ...]] = {
    Kind.MAP: (Way.REFUSE, Way.DOUBT_BEFORE, Way.DOUBT_AFTER, *_INTERRUPTS),
    Kind.UNMAP: (
        Way.REFUSE,
        Way.DOUBT_BEFORE,
        Way.DOUBT_AFTER,
        Way.DOUBT_PART,
        Way.SHORT_NONE,
        Way.SHORT_PART,
        Way.SHORT_LIE,
        *_INTERRUPTS,
    ),
    Kind.ATTRIBUTE: (Way.REFUSE, Way.ERROR_AFTER, Way.ERROR_PART, *_INTERRUPTS),
    Kind.IN_PLACE: (
        Way.REFUSE,
        Way.ERROR_AFTER,
        Way.ERROR_PART,
        Way.PINNED,
        Way.PINNED_ONCE,
        *_INTERRUPTS,
    ),
    Kind.FLIP: _INTERRUPTS,
    Kind.FREE_SHARED: (Way.REFUSE, Way.ERROR_PART, *_INTERRUPTS),
    Kind.FREE_PRIVATE: (Way.REFUSE, Way.ERROR_PART, *_INTERRUPTS),
    Kind.ADD_SLOT: (Way.REFUSE, *_INTERRUPTS),
    Kind.REMOVE_SLOT: (Way.REFUSE, *_INTERRUPTS),
    # A listener that refuses holds what it held before: that is its contract.
    Kind.POPULATE: (Way.REFUSE, *_INTERRUPTS),
    Kind.DISCARD: (Way.REFUSE, *_INTERRUPTS),
    Kind.ASK: (Way.REFUSE, Way.INTERRUPT_BEFORE),
}


#: One way of each sort.
FEW = {Way.REFUSE, Way.SHORT_NONE, Way.INTERRUPT_AFTER, *_PINS}


class Call(NamedTuple):
    kind: Kind
    size: int
    who: object


class Failed(NamedTuple):
    """What went wrong, at which call."""

    number: int
    """From 1."""
    call: Call
    way: Way
    error: BaseException | None
    """None where the call only said too little."""


Plan = tuple[tuple[int, Way], ...]


class InjectedInterrupt(KeyboardInterrupt):
    """Told apart from the Ctrl-C of whoever runs the tests."""


class Injector:
    """Counts the calls at all edges together, and makes those fail that the plan names (from 1)."""

    def __init__(self) -> None:
        self.armed = False
        self.plan: dict[int, Way] = {}
        self.calls: list[Call] = []
        self.failed: list[Failed] = []
        self.pinned: set[object] = set()

    def arm(self, plan: Plan) -> None:
        self.plan = dict(plan)
        self.calls = []
        self.failed = []
        self.pinned = set()
        self.armed = True

    def disarm(self) -> None:
        self.armed = False
        assert len(self.calls) >= max(self.plan, default=0), "a call of the plan was never made"

    def forget(self) -> None:
        """
        Let go of calls and tracebacks, which lead to the targets: else a poisoned guest never goes
        (Attachment).
        """
        self.calls = []
        self.failed = []

    @property
    def raised(self) -> list[BaseException]:
        return [failed.error for failed in self.failed if failed.error is not None]

    @property
    def lasting(self) -> list[Failed]:
        """
        The failures that were not made good by trying again.

        The first of them is the one that decides.
        """
        lasting = []
        tries = last = 0
        for failed in self.failed:
            pinned = failed.way in _PINS
            tries = 1 + (tries if failed.number == last + 1 else 0) if pinned else 0
            last = failed.number
            if not pinned or tries == TRIES:
                lasting.append(failed)
                tries = 0
        return lasting

    def counted(self, *kinds: Kind) -> int:
        return sum(call.kind in kinds for call in self.calls)

    def perform(
        self,
        call: Call,
        effect: Callable[[], T],
        *,
        part: Callable[[], object] | None = None,
        short: Callable[[Way], T] | None = None,
        pinned_as: object = None,
    ) -> T:
        """
        Do *effect*, unless the plan says otherwise.

        *pinned_as* says which later calls meet the same pins.
        """
        if not self.armed:
            return effect()
        self.calls.append(call)
        way = self.plan.get(len(self.calls))
        if way is None and pinned_as in self.pinned:
            way = Way.PINNED
        if way is None:
            return effect()
        if way in _SHORT:
            assert short is not None
            self.failed.append(Failed(len(self.calls), call, way, None))
            return short(way)
        if way is Way.PINNED:
            self.pinned.add(pinned_as)
        if way in _PARTIAL or (way in _PINS and call.size > PAGE):
            assert part is not None
            part()
        elif way in {Way.ERROR_AFTER, Way.DOUBT_AFTER, Way.INTERRUPT_AFTER}:
            effect()
        error = self._error(call, way)
        self.failed.append(Failed(len(self.calls), call, way, error))
        raise error

    def _error(self, call: Call, way: Way) -> BaseException:
        text = f"call {len(self.calls)}, {call.kind.value}: {way.name}"
        if way in _INTERRUPTS:
            return InjectedInterrupt(text)
        if call.kind in {Kind.MAP, Kind.UNMAP}:
            in_doubt = way in {Way.DOUBT_BEFORE, Way.DOUBT_AFTER, Way.DOUBT_PART}
            return DmaError(errno.EIO, text, in_doubt=in_doubt)
        if call.kind in {Kind.POPULATE, Kind.DISCARD, Kind.ASK}:
            return RuntimeError(text)
        return OSError(errno.EAGAIN if way in _PINS else errno.EIO, text)


def ways_of(call: Call) -> Iterator[Way]:
    for way in WAYS[call.kind]:
        if call.size > PAGE or way not in _PARTIAL:
            yield way


class FaultyTarget:
    def __init__(self, injector: Injector, inner: CheckedTarget) -> None:
        self.inner = inner
        self.injector = injector

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        self.injector.perform(
            Call(Kind.MAP, memory.size, self),
            lambda: self.inner.map(iova, memory, writable=writable),
        )

    def unmap(self, iova: int, size: int) -> int:
        def short(way: Way) -> int:
            if way is Way.SHORT_PART:
                return self._remove_some(iova, size)
            if way is Way.SHORT_LIE:
                return max(self.inner.unmap(iova, size) - PAGE, 0)
            return 0

        return self.injector.perform(
            Call(Kind.UNMAP, size, self),
            lambda: self.inner.unmap(iova, size),
            part=lambda: self._remove_some(iova, size),
            short=short,
        )

    def _remove_some(self, iova: int, size: int) -> int:
        try:
            return self.inner.unmap(iova, size - PAGE)
        except DmaError:
            return 0  # it cannot cut there

    def close(self) -> None:
        self.inner.close()

    def __repr__(self) -> str:
        return f"<target {id(self):#x}>"


class FaultyVm:
    def __init__(self, injector: Injector, inner: CheckedVm | RenewedVm) -> None:
        self.inner = inner
        self.injector = injector

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        self.injector.perform(
            Call(Kind.ATTRIBUTE, size, None),
            lambda: self.inner.set_memory_attributes(gpa, size, private),
            part=lambda: self.inner.set_memory_attributes(gpa, size - PAGE, private),
        )

    def add_memory_slot(self, section: RamSection) -> None:
        self.injector.perform(
            Call(Kind.ADD_SLOT, PAGE, None), lambda: self.inner.add_memory_slot(section)
        )

    def remove_memory_slot(self, section: RamSection) -> None:
        self.injector.perform(
            Call(Kind.REMOVE_SLOT, PAGE, None), lambda: self.inner.remove_memory_slot(section)
        )


def block_of(section: RamSection) -> RamBlock:
    """A section knows its block as whoever maps it does; here it is one of ours."""
    assert isinstance(section.block, RamBlock)
    return section.block


class SlotVm:
    """A VM with memory slots, which notices a guest that could run with the wrong attributes."""

    def __init__(self, checker: GuestChecker) -> None:
        self.checker = checker
        self.slots: dict[int, RamSection] = {}
        self.serves: dict[int, object] = {}
        """The private side that a slot was made with: KVM does not look again."""
        self.private_pages: MutableSet[int] = checker.private_pages

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        pass

    def add_memory_slot(self, section: RamSection) -> None:
        block = block_of(section)
        attributes = block.attributes
        for page in range(0, section.size, PAGE) if attributes is not None else ():
            assert attributes is not None
            if attributes.is_shared(section.offset + page, PAGE):
                continue
            host_page = section.block.address + section.offset + page
            if (
                host_page not in self.checker.private_memory
                if block.in_place is not None
                else section.gpa + page not in self.private_pages
            ):
                self.checker.complain(f"slot of {section!r}: page {page:#x} is not private yet")
        if section.gpa in self.slots:
            raise OSError(errno.EEXIST, "there is a slot")
        self.slots[section.gpa] = section
        self.serves[section.gpa] = block.private

    def remove_memory_slot(self, section: RamSection) -> None:
        if section.gpa not in self.slots:
            raise OSError(errno.ENOENT, "there is no slot")
        del self.slots[section.gpa]


class RenewedVm(SlotVm):
    """The VM of the guest behind a reset: it has attributes and slots of its own."""

    def __init__(self, checker: GuestChecker) -> None:
        super().__init__(checker)
        self.private_pages = set()

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        for page in range(gpa, gpa + size, PAGE):
            (self.private_pages.add if private else self.private_pages.discard)(page)


class FakeShared:
    """A shared side without memory: which pages would be there."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.page_size = PAGE
        self.resident = set(range(0, size, PAGE))
        self.closed = False

    @property
    def fd(self) -> int | None:
        return None

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        pass

    def discard(self, offset: int, size: int) -> None:
        self.resident -= set(range(offset, offset + size, PAGE))

    def allocated_bytes(self) -> int:
        return len(self.resident) * PAGE

    def close(self) -> None:
        self.closed = True


class FakePrivate:
    """A private side without memory."""

    def __init__(self, size: int) -> None:
        self.fd = -1
        self.size = size
        self.resident = set(range(0, size, PAGE))

    def discard(self, offset: int, size: int) -> None:
        self.resident -= set(range(offset, offset + size, PAGE))


class FakeInPlace(FakeShared):
    """A memory for both states, without memory."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(address, size)
        self.private = set(range(0, size, PAGE))

    @property
    def fd(self) -> int:
        return -1

    def set_attributes(self, offset: int, size: int, private: bool) -> None:
        pages = set(range(offset, offset + size, PAGE))
        self.private = self.private | pages if private else self.private - pages


class FaultyShared:
    def __init__(self, injector: Injector, inner: CheckedShared) -> None:
        self.address = inner.address
        self.size = inner.size
        self.page_size = inner.page_size
        self.inner = inner
        self.injector = injector
        self.read = inner.read
        self.write = inner.write
        self.allocated_bytes = inner.allocated_bytes
        self.close = inner.close

    @property
    def fd(self) -> int | None:
        return self.inner.fd

    def discard(self, offset: int, size: int) -> None:
        self.injector.perform(
            Call(Kind.FREE_SHARED, size, None),
            lambda: self.inner.discard(offset, size),
            part=lambda: self.inner.discard(offset, size - PAGE),
        )


class FaultyPrivate:
    def __init__(self, injector: Injector, inner: CheckedPrivate) -> None:
        self.fd = inner.fd
        self.size = inner.size
        self.inner = inner
        self.injector = injector

    def discard(self, offset: int, size: int) -> None:
        self.injector.perform(
            Call(Kind.FREE_PRIVATE, size, None),
            lambda: self.inner.discard(offset, size),
            part=lambda: self.inner.discard(offset, size - PAGE),
        )


class FaultyInPlace(FaultyShared):
    inner: CheckedInPlace

    def __init__(self, injector: Injector, inner: CheckedInPlace) -> None:
        super().__init__(injector, inner)

    @property
    def fd(self) -> int:
        return self.inner.fd

    def set_attributes(self, offset: int, size: int, private: bool) -> None:
        self.injector.perform(
            Call(Kind.IN_PLACE, size, None),
            lambda: self.inner.set_attributes(offset, size, private),
            part=lambda: self.inner.set_attributes(offset, size - PAGE, private),
            pinned_as=(self, private),
        )


class FaultyBits(SparseBitmap):
    """Page states, or plug states, whose change can be interrupted."""

    __slots__ = ("injector",)

    def __init__(self, injector: Injector, length: int) -> None:
        super().__init__(length)
        self.injector = injector

    def set(self, start: int, end: int) -> int:
        call = Call(Kind.FLIP, PAGE, None)
        return self.injector.perform(call, lambda: SparseBitmap.set(self, start, end))

    def clear(self, start: int, end: int) -> int:
        call = Call(Kind.FLIP, PAGE, None)
        return self.injector.perform(call, lambda: SparseBitmap.clear(self, start, end))

    def restore(self, start: int, end: int, saved: SavedBits) -> None:
        call = Call(Kind.FLIP, PAGE, None)
        self.injector.perform(call, lambda: SparseBitmap.restore(self, start, end, saved))


class FaultyListener:
    """
    A listener of somebody else's: holds exactly what it is told, and notices when it is told what
    cannot be.
    """

    def __init__(self, injector: Injector, checker: GuestChecker, section: RamSection) -> None:
        self.injector = injector
        self.checker = checker
        self.section = section
        self.held: set[int] = set()

    def _complain(self, text: str) -> None:
        # After an interrupt, and on a poisoned block, nobody knows exactly what it holds.
        interrupted = any(_is_interrupt(error) for error in self.injector.raised)
        if not interrupted and not block_of(self.section).guard.poisoned:
            self.checker.complain(f"listener: {text}")

    def notify_populate(self, section: RamSection) -> None:
        call = Call(Kind.POPULATE, section.size, self)
        self.injector.perform(call, lambda: self._populate(_offsets(section)))

    def notify_discard(self, section: RamSection) -> None:
        call = Call(Kind.DISCARD, section.size, self)
        self.injector.perform(call, lambda: self._discard(_offsets(section)))

    def _populate(self, pages: set[int]) -> None:
        if self.held & pages:
            self._complain("populated twice")
        self.held |= pages

    def _discard(self, pages: set[int]) -> None:
        if not pages <= self.held:
            self._complain("a discard of what it does not hold")
        self.held -= pages


class FaultySource:
    """A source of somebody else's; some have `ranges`, some do not."""

    granularity = PAGE

    def __init__(self, injector: Injector, populated: set[int]) -> None:
        self.injector = injector
        self.populated = populated

    def is_populated(self, offset: int, size: int) -> bool:
        first = offset // PAGE * PAGE
        return self.injector.perform(
            Call(Kind.ASK, PAGE, None),
            lambda: set(range(first, offset + size, PAGE)) <= self.populated,
        )


class FaultyRangeSource(FaultySource):
    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        call = Call(Kind.ASK, PAGE, None)
        for page in sorted(self.populated):
            if offset <= page < offset + size:
                yield self.injector.perform(call, lambda page=page: (page, PAGE))  # type: ignore[misc]


def _offsets(section: RamSection) -> set[int]:
    return set(range(section.offset, section.end, PAGE))


# -- the guest -------------------------------------------------------------------------------------


class TargetKind(NamedTuple):
    """What a target can do, and how it is used."""

    name: str
    policy: MappingPolicy
    cut: bool = False
    exact: bool = False
    max_mappings: int | None = None


CUT = TargetKind("cut", MappingPolicy.RUN, cut=True)
CUT_PAGE = TargetKind("cut-page", MappingPolicy.PAGE, cut=True)
NO_CUT = TargetKind("no-cut", MappingPolicy.PAGE)
EXACT = TargetKind("exact", MappingPolicy.PAGE, exact=True)


class Placed(NamedTuple):
    """A block of the small guest."""

    pages: int
    offset: int
    """Where its section begins, in bytes."""
    size: int
    gpa: int
    address: int


BLOCKS = {
    "a": Placed(5, PAGE, 4 * PAGE, BASE, 0x7A00_0000_0000),
    "b": Placed(4, 0, 4 * PAGE, BASE + 4 * PAGE, 0x7B00_0000_0000),
}

Layout = Sequence[tuple[int, int, PageState]]
"""
Conversions that were made before, in order: first page, page behind the last, state.

Pages count from BASE.
"""


@dataclass(kw_only=True)
class Setup:
    """How a guest is before the operation."""

    targets: Sequence[TargetKind] = (CUT, CUT)
    attached: int | None = None
    """How many of the targets; None: all."""
    layout: Layout = ()
    place: Sequence[str] = ("a", "b")
    ordinary: Sequence[str] = ()
    """Blocks without a private side."""
    in_place: Sequence[str] = ()
    """Blocks with one memory for both states."""
    listener: bool = False
    """Somebody else's listener, for all of block a's section."""
    source: set[int] | None = None
    """A source of somebody else's on block a: what it calls populated, as offsets."""
    new_source: set[int] = field(default_factory=set)
    """The same of one that is still to be added."""
    source_has_ranges: bool = True
    virtio_mem: set[int] | None = None
    """virtio-mem on block a: what is plugged, as offsets."""
    states: dict[str, set[int]] = field(default_factory=dict)
    """Per block, offsets of pages that were shared before it was placed."""
    max_mappings: int | None = None


class Guest:
    """The small guest, set up, with nothing failing yet."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.injector = Injector()
        self.checker = GuestChecker()
        self.slots = SlotVm(self.checker)
        self.memory = GuestMemory(FaultyVm(self.injector, self.checker.vm(self.slots)))
        self.new_vm: FaultyVm | None = None
        self.new_private: list[FakePrivate] = []
        self.shared: dict[str, FakeShared] = {}
        self.private: dict[str, FakePrivate] = {}
        self.in_place: dict[str, FakeInPlace] = {}
        self.blocks = {name: self._block(name) for name in BLOCKS}
        self.first_private = [block.private for block in self.blocks.values()]
        for name, pages in setup.states.items():
            for page in sorted(pages):
                attributes = self.blocks[name].attributes
                assert attributes is not None
                attributes.state_change(page, PAGE, SHARED)
        self.sections = {name: self.place(name) for name in setup.place}
        self.listener = FaultyListener(self.injector, self.checker, self.section("a"))
        kind = FaultyRangeSource if setup.source_has_ranges else FaultySource
        populated = setup.new_source if setup.source is None else setup.source
        self.source = kind(self.injector, set(populated))
        self.virtio_mem: VirtioMem | None = None
        if setup.virtio_mem is not None:
            self.virtio_mem = VirtioMem(self.blocks["a"], PAGE)
            self.make_bits_faulty(self.virtio_mem)
            for page in sorted(setup.virtio_mem):
                self.virtio_mem.plug(page, PAGE)
        if setup.source is not None:
            self.blocks["a"].discard_manager.add_source(self.source)
        self.iommus = [
            SoftIommu(cut=kind.cut, exact=kind.exact, max_mappings=kind.max_mappings)
            for kind in setup.targets
        ]
        self.targets = [
            FaultyTarget(self.injector, self.checker.target(iommu)) for iommu in self.iommus
        ]
        count = len(self.targets) if setup.attached is None else setup.attached
        for index in range(count):
            self.attach(index)
        if setup.listener:
            self.blocks["a"].discard_manager.register_listener(self.listener, self.section("a"))
        for first, last, state in setup.layout:
            self.memory.convert(BASE + first * PAGE, (last - first) * PAGE, state)
        for backing in self.backings:
            backing.resident = set(range(0, backing.size, PAGE))
        self.checker.freed_pages.clear()

    def _block(self, name: str) -> RamBlock:
        placed = BLOCKS[name]
        size = placed.pages * PAGE
        if name in self.setup.in_place:
            self.in_place[name] = FakeInPlace(placed.address, size)
            memory = self.checker.in_place(self.in_place[name])
            block = RamBlock.create(name, size, private=FaultyInPlace(self.injector, memory))
            memory.block = block
            assert block.attributes is not None
            self.make_bits_faulty(block.attributes)
            return block
        self.shared[name] = FakeShared(placed.address, size)
        shared = self.checker.shared(self.shared[name])
        if name in self.setup.ordinary:
            block = RamBlock(name, FaultyShared(self.injector, shared), None, owns_private=False)
        else:
            self.private[name] = FakePrivate(size)
            private = self.checker.private(self.private[name])
            block = RamBlock(
                name,
                FaultyShared(self.injector, shared),
                FaultyPrivate(self.injector, private),
                owns_private=False,
            )
            private.block = block
            assert block.attributes is not None
            self.make_bits_faulty(block.attributes)
        shared.block = block
        return block

    def make_bits_faulty(self, source: object) -> None:
        bits: SparseBitmap = source.bits  # type: ignore[attr-defined]
        faulty = FaultyBits(self.injector, bits.length)
        for start, end in bits.runs(0, bits.length):
            faulty.set(start, end)
        source.bits = faulty  # type: ignore[attr-defined]

    def section(self, name: str) -> RamSection:
        placed = BLOCKS[name]
        return RamSection(self.blocks[name], placed.offset, placed.size, placed.gpa)

    def place(self, name: str) -> RamSection:
        placed = BLOCKS[name]
        return self.memory.map(
            self.blocks[name], placed.gpa, offset=placed.offset, size=placed.size
        )

    def attach(self, index: int) -> Mapper:
        return self.memory.attach(
            self.targets[index],
            self.setup.targets[index].policy,
            max_mappings=self.setup.max_mappings,
        )

    def renew_vm(self) -> FaultyVm:
        """Make the VM of a new guest, as a VMM does for a reset."""
        self.new_vm = FaultyVm(self.injector, RenewedVm(self.checker))
        return self.new_vm

    def renew_private(self) -> dict[RamBlock, FaultyPrivate]:
        """Make new private sides, by block."""
        renewed = {}
        self.new_private = []
        for name, old in self.private.items():
            fresh = FakePrivate(old.size)
            checked = self.checker.private(fresh)
            checked.block = self.blocks[name]
            self.new_private.append(fresh)
            renewed[self.blocks[name]] = FaultyPrivate(self.injector, checked)
        return renewed

    @property
    def vm(self) -> SlotVm:
        """The VM in force."""
        new = self.new_vm
        if new is not None and self.memory._vm is new:
            assert isinstance(new.inner, RenewedVm)
            return new.inner
        return self.slots

    @property
    def backings(self) -> list[FakeShared | FakePrivate]:
        return [*self.shared.values(), *self.private.values(), *self.in_place.values()]

    def is_private(self, section: RamSection, gpa: int) -> bool:
        """Whether the attribute of the page at *gpa* is private, whoever holds it."""
        memory = self.in_place.get(section.block.name)
        if memory is None:
            return gpa in self.vm.private_pages
        return section.offset + gpa - section.gpa in memory.private

    @property
    def poisoned(self) -> bool:
        return self.memory.poisoned or any(
            block.guard.poisoned for block in self.blocks.values() if not block.closed
        )


def model_of(setup: Setup) -> GuestModel:
    """The same guest, as sets of pages."""
    model = GuestModel()
    for name, placed in BLOCKS.items():
        model.add_block(name, placed.pages * PAGE, confidential=name not in setup.ordinary)
    for name, pages in setup.states.items():
        model.blocks[name].shared |= pages
    for name in setup.place:
        place_in_model(model, name)
    if setup.virtio_mem is not None:
        model.add_virtio_mem("a")
        for page in setup.virtio_mem:
            model.plug("a", page, PAGE)
    if setup.source is not None:
        model.blocks["a"].sources["other"] = set(setup.source)
    for first, last, state in setup.layout:
        model.convert(BASE + first * PAGE, (last - first) * PAGE, state)
    return model


def place_in_model(model: GuestModel, name: str) -> None:
    placed = BLOCKS[name]
    model.map(name, placed.gpa, offset=placed.offset, size=placed.size)


# -- what is, and what should be -------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """Everything about a guest that an operation can change."""

    shared: frozenset[int]
    private: frozenset[int]
    attributes: frozenset[int]
    """Guest pages whose attribute is private, where there is a section."""
    slots: frozenset[int]
    mapped: tuple[frozenset[tuple[int, int]], ...]
    """Per target: guest page, and the host page behind it."""
    attached: tuple[bool, ...]
    held: frozenset[int]
    """By somebody else's listener."""
    listening: bool
    source: bool
    plugged: frozenset[int] | None
    states: tuple[frozenset[int], ...]
    """Per block: offsets of shared pages."""
    holds: int
    """Claims on discards."""


@dataclass
class Expected:
    """What a guest should be like."""

    model: GuestModel
    attached: list[bool]
    listening: bool = False

    def picture(self) -> Picture:
        model = self.model
        block = model.blocks["a"]
        confidential = {
            page
            for section in model.sections
            if model.blocks[section.block].confidential
            for page in range(section.gpa, section.gpa + section.size, PAGE)
        }
        placed = BLOCKS["a"]
        in_section = set(range(placed.offset, placed.offset + placed.size, PAGE))
        reachable = frozenset((page, host_page(page)) for page in model.populated())
        holds = sum(self.attached) + (block.plugged is not None and self._is_placed("a"))
        holds += sum(
            entry.confidential and self._is_placed(name) for name, entry in model.blocks.items()
        )
        return Picture(
            shared=frozenset(model.shared()),
            private=frozenset(model.private()),
            attributes=frozenset(model.private() & confidential),
            slots=frozenset(section.gpa for section in model.sections),
            mapped=tuple(reachable if attached else frozenset() for attached in self.attached),
            attached=tuple(self.attached),
            held=frozenset(model.populated_in("a") & in_section if self.listening else ()),
            listening=self.listening,
            source="other" in block.sources,
            plugged=None if block.plugged is None else frozenset(block.plugged),
            states=tuple(frozenset(entry.shared) for entry in model.blocks.values()),
            holds=holds,
        )

    def _is_placed(self, name: str) -> bool:
        return any(section.block == name for section in self.model.sections)


def expected_of(setup: Setup) -> Expected:
    count = len(setup.targets) if setup.attached is None else setup.attached
    return Expected(
        model_of(setup),
        [index < count for index in range(len(setup.targets))],
        listening=setup.listener,
    )


def host_page(gpa: int) -> int:
    for placed in BLOCKS.values():
        if placed.gpa <= gpa < placed.gpa + placed.size:
            return placed.address + placed.offset + gpa - placed.gpa
    raise AssertionError(f"no block at {gpa:#x}")


def picture_of(guest: Guest) -> Picture:
    """Take it from the guest as it is, and complain about books that are wrong in themselves."""
    memory = guest.memory
    attached = [mapper.target for mapper in memory.mappers]
    manager = guest.blocks["a"].discard_manager
    virtio_mem = next((entry for entry in manager.sources if isinstance(entry, VirtioMem)), None)
    for mapper in memory.mappers:
        assert isinstance(mapper.target, FaultyTarget)
        mappings = guest.iommus[guest.targets.index(mapper.target)].mappings()
        assert mapper.entries == len(mappings), "entries"
        assert mapper.mapped_bytes == sum(mapping.size for mapping in mappings), "mapped_bytes"
        assert len(mapper.listeners) == len(memory.sections), "listeners of a mapper"
    for block in guest.blocks.values():
        if block.attributes is not None:
            runs = list(block.attributes.ranges(SHARED))
            assert block.attributes.shared_bytes == sum(size for _, size in runs), "shared_bytes"
        own = sum(section.block is block for section in memory.sections) * len(memory.mappers)
        own += any(entry.listener is guest.listener for entry in block.discard_manager.registry)
        assert len(list(block.discard_manager.registry)) == own, "registrations"
    return Picture(
        shared=_pages(memory.ranges(SHARED)),
        private=_pages(memory.ranges(PRIVATE)),
        attributes=frozenset(
            page
            for section in memory.sections
            for page in range(section.gpa, section.gpa_end, PAGE)
            if guest.is_private(section, page)
        ),
        slots=frozenset(guest.vm.slots),
        mapped=tuple(mapped_by(iommu) for iommu in guest.iommus),
        attached=tuple(any(target is entry for entry in attached) for target in guest.targets),
        held=frozenset(guest.listener.held),
        listening=any(entry.listener is guest.listener for entry in manager.registry),
        source=any(entry is guest.source for entry in manager.sources),
        plugged=None if virtio_mem is None else _pages(virtio_mem.ranges(0, virtio_mem.block.size)),
        states=tuple(
            frozenset(range(0, block.size, PAGE))
            if block.attributes is None
            else _pages(block.attributes.ranges(SHARED))
            for block in guest.blocks.values()
        ),
        holds=len(memory.discards.holds),
    )


def _pages(runs: Iterator[tuple[int, int]]) -> frozenset[int]:
    return frozenset(page for start, size in runs for page in range(start, start + size, PAGE))


def mapped_by(iommu: SoftIommu) -> frozenset[tuple[int, int]]:
    return frozenset(
        (mapping.iova + page, mapping.memory.address + page)
        for mapping in iommu.mappings()
        for page in range(0, mapping.size, PAGE)
    )


def assert_like(guest: Guest, expected: Picture) -> None:
    actual = picture_of(guest)
    if actual != expected:
        for name in Picture.__dataclass_fields__:
            assert getattr(actual, name) == getattr(expected, name), name


# -- an operation, and the judgement ---------------------------------------------------------------


@dataclass(kw_only=True)
class Scenario:
    """One operation on one guest."""

    setup: Setup
    act: Callable[[Guest], object]
    change: Callable[[Expected], None]
    """The same, done to what is expected."""
    conversion: tuple[int, int, PageState] | None = None
    """For a conversion: first byte, size, state."""
    depth: int = 2
    """How many failures at once."""
    frees: bool = True
    """What is no longer used is freed."""
    renews: str = ""
    """What a reset replaces: "vm", "private" or both."""
    resets: bool = False
    """Nothing is left on either side of a confidential block, used or not."""
    few: bool = False
    """Not every way in which a second call can fail, but one of each sort."""

    def __post_init__(self) -> None:
        expected = expected_of(self.setup)
        self.before = expected.picture()
        self.used_before = _used(expected.model, self.setup)
        self.change(expected)
        self.after = expected.picture()
        self.used_after = _used(expected.model, self.setup)

    def build(self) -> Guest:
        return Guest(self.setup)


class Used(NamedTuple):
    """
    Offsets per block, of pages whose shared, or private, side is in use.

    In place there are no sides.
    """

    shared: dict[str, set[int]]
    private: dict[str, set[int]]
    in_place: dict[str, set[int]]


def _used(model: GuestModel, setup: Setup) -> Used:
    split = [
        name
        for name, block in model.blocks.items()
        if block.confidential and name not in setup.in_place
    ]
    plugged = {name: model.blocks[name].plugged for name in setup.in_place}
    return Used(
        {name: model.populated_in(name) for name in split},
        {name: model.used_privately_in(name) for name in split},
        {
            name: set(range(0, BLOCKS[name].pages * PAGE, PAGE)) if pages is None else set(pages)
            for name, pages in plugged.items()
        },
    )


#: Cases so far, by what they showed.
counts: Counter[str] = Counter()


def explore(scenario: Scenario) -> None:
    """Run *scenario* undisturbed, and with every combination of failures."""
    guest = scenario.build()
    assert_like(guest, scenario.before)
    plans: list[Plan] = [()]
    while plans:
        plan = plans.pop()
        calls = run_case(scenario, plan)
        if len(plan) < scenario.depth:
            last = plan[-1][0] if plan else 0
            plans += [
                (*plan, (number, way))
                for number, call in enumerate(calls[last:], last + 1)
                for way in ways_of(call)
                if not (scenario.few and plan) or way in FEW
            ]


def run_case(scenario: Scenario, plan: Plan) -> list[Call]:
    """One run; says with which plan it went wrong, if it does."""
    guest = scenario.build()
    guest.injector.arm(plan)
    result: object = None
    error: BaseException | None = None
    try:
        result = scenario.act(guest)
    except (Exception, InjectedInterrupt) as caught:
        error = caught
    calls = guest.injector.calls
    guest.injector.disarm()
    try:
        judge(scenario, guest, result, error)
        guest.injector.forget()
    except BaseException as failure:
        told = ", ".join(
            f"{number} {calls[number - 1].kind.value} {way.name}" for number, way in plan
        )
        trace = "\n".join(f"  {number} {call}" for number, call in enumerate(calls, 1))
        failure.add_note(f"plan: {told or 'nothing fails'}\ncalls:\n{trace}\nraised: {error!r}")
        raise
    return calls


def judge(scenario: Scenario, guest: Guest, result: object, error: BaseException | None) -> None:
    lasting = guest.injector.lasting
    first = lasting[0] if lasting else None
    committed = first is None or first.call.kind in FREES
    if guest.poisoned:
        counts["poisoned"] += 1
        assert first is not None, "poisoned without a failure"
        assert not committed, "poisoned by a free"
        judge_poisoned(scenario, guest, error, first)
    elif committed:
        counts["committed"] += 1
        judge_committed(scenario, guest, result, error)
    else:
        counts["rolled back"] += 1
        assert first is not None
        assert first.way not in _SHORT, "a short unmap was believed"
        judge_rolled_back(scenario, guest, error, first)
    if first is not None and len(lasting) == 1:
        kind, way = first.call.kind, first.way
        # Nobody knows then whether there is a slot, and the VM does not tell.
        lost = kind in {Kind.ADD_SLOT, Kind.REMOVE_SLOT} and way is Way.INTERRUPT_BEFORE
        # A VM that is not taken over is dropped.
        lost = lost and "vm" not in scenario.renews
        assert guest.poisoned == (way in _SHORT or lost), "poisoned by one failure"
    guest.checker.verify()


def judge_committed(
    scenario: Scenario, guest: Guest, result: object, error: BaseException | None
) -> None:
    injector = guest.injector
    interrupt = next((entry for entry in injector.raised if _is_interrupt(entry)), None)
    if interrupt is None:
        assert error is None, f"raised {error!r}"
    else:
        assert _is_interrupt(error)
        assert not isinstance(error, ConversionError)
    assert_like(guest, scenario.after)
    waiting = sum(block.not_freed_bytes for block in guest.blocks.values())
    if scenario.conversion is not None and error is None:
        assert isinstance(result, ConversionResult)
        gpa, size, to = scenario.conversion
        assert result[:3] == (gpa, size, to)
        changed = scenario.before.shared ^ scenario.after.shared
        assert result.changed_bytes == len(changed) * PAGE
        assert result.map_calls == injector.counted(Kind.MAP)
        assert result.unmap_calls == injector.counted(Kind.UNMAP)
        assert result.not_freed_bytes == waiting
    frees_failed = any(failed.call.kind in FREES for failed in injector.failed)
    if scenario.renews:
        judge_renewed(scenario, guest, result, error)
        return
    assert (waiting > 0) == frees_failed, "the account of what is not freed"
    if scenario.resets:
        # Its own pages are the new guest's already: nobody but another reset may free them.
        assert guest.memory.reset() == 0
        for backing in [
            *guest.in_place.values(),
            *(side[name] for name in guest.private for side in (guest.private, guest.shared)),
        ]:
            assert not backing.resident, "something of the old guest is left"
        judge_close(guest)
        return
    assert sum(block.free_pending() for block in guest.blocks.values()) == 0
    used = scenario.used_after
    for name, private in guest.private.items():
        shared = guest.shared[name]
        assert used.shared[name] <= shared.resident, "freed what is shared"
        assert used.private[name] <= private.resident, "freed what is private"
        if not scenario.frees:
            continue
        idle = scenario.used_before.shared[name] - used.shared[name]
        assert not idle & shared.resident, "the shared side is not freed"
        idle = scenario.used_before.private[name] - used.private[name]
        assert not idle & private.resident, "the private side is not freed"
    for name, memory in guest.in_place.items():
        assert used.in_place[name] <= memory.resident, "freed what is in use"
        if scenario.frees:
            idle = scenario.used_before.in_place[name] - used.in_place[name]
            assert not idle & memory.resident, "the memory is not freed"
    judge_close(guest)


def judge_renewed(
    scenario: Scenario, guest: Guest, result: object, error: BaseException | None
) -> None:
    assert (guest.vm is not guest.slots) == ("vm" in scenario.renews)
    assert bool(guest.new_private) == ("private" in scenario.renews)
    failed = [failure.call.kind for failure in guest.injector.failed]
    if error is None:
        assert (result != 0) == bool(FREES & set(failed)), "the account of what is not freed"
    for gpa, served in guest.vm.serves.items():
        if gpa in guest.vm.slots:
            block = block_of(guest.vm.slots[gpa])
            assert served is block.private, "a slot serves a private side that has gone"
    assert guest.memory.reset() == 0
    sides: list[FakeShared | FakePrivate] = [*guest.shared.values(), *guest.new_private]
    for side in sides:
        assert not side.resident, "something of the old guest is left"
    if Kind.FREE_PRIVATE not in failed:
        for name, old in guest.private.items():
            assert not old.resident, f"the old private side of {name} is left"
    judge_close(guest)


def judge_rolled_back(
    scenario: Scenario, guest: Guest, error: BaseException | None, first: Failed
) -> None:
    injector = guest.injector
    assert error is not None, "no error was raised"
    cause = first.error
    if scenario.conversion is None or _is_interrupt(cause):
        assert error is cause
    else:
        assert type(error) is ConversionError
        judge_conversion_error(scenario, error, first)
        assert error.__cause__ is cause
    assert_like(guest, scenario.before)
    assert_nothing_freed(guest)
    assert [block.private for block in guest.blocks.values()] == guest.first_private
    assert not any(block.not_freed_bytes for block in guest.blocks.values())
    # And it is no worse off for it.
    injector.arm(())
    scenario.act(guest)
    injector.disarm()
    assert_like(guest, scenario.after)
    judge_close(guest)


def judge_conversion_error(scenario: Scenario, error: BaseException, first: Failed) -> None:
    assert isinstance(error, ConversionError)
    assert scenario.conversion is not None
    assert (error.gpa, error.size, error.to) == scenario.conversion
    kind = first.call.kind
    steps = {Kind.POPULATE: "map", Kind.DISCARD: "unmap", Kind.IN_PLACE: "attribute"}
    if kind is not Kind.ASK:
        assert error.step == steps.get(kind, kind.value)
    assert error.target is first.call.who
    assert error.rolled_back == (type(error) is not PoisonedError)


def assert_nothing_freed(guest: Guest) -> None:
    for backing in guest.backings:
        assert len(backing.resident) == backing.size // PAGE, "memory was freed"


def judge_poisoned(
    scenario: Scenario, guest: Guest, error: BaseException | None, first: Failed
) -> None:
    assert type(error) is PoisonedError, f"raised {error!r}"
    assert not error.rolled_back
    assert error.__cause__ is not None
    if first.way in _SHORT:
        assert isinstance(error.__cause__, DmaError)
    else:
        assert error.__cause__ is first.error
    if scenario.conversion is not None:
        judge_conversion_error(scenario, error, first)
    assert_nothing_freed(guest)
    doubts = assert_doubts_cover(guest)
    if counts["poisoned"] % 4 == 0:
        assert_changes_refused(guest)
    for gpa in _pages(guest.memory.ranges(SHARED)):
        assert guest.memory.state(gpa) is SHARED
    for gpa in _pages(guest.memory.ranges(PRIVATE)):
        assert guest.memory.state(gpa) is PRIVATE
    assert guest.blocks["a"].read(0, PAGE) == bytes(PAGE)
    # Closing is also what happens to a guest that nobody detaches from first: every other time.
    if counts["poisoned"] % 2:
        for mapper in guest.memory.mappers:
            guest.memory.detach(mapper)
        assert guest.memory.mappers == ()
        assert guest.memory.in_doubt() == doubts
    judge_close(guest)


def assert_doubts_cover(guest: Guest) -> list[object]:
    """What is mapped and what is populated may differ only where that was said."""
    memory = guest.memory
    doubts = memory.in_doubt()
    for block in guest.blocks.values():
        doubts += [doubt for doubt in block.guard.in_doubt() if doubt not in doubts]
    populated = {
        page
        for section in memory.sections
        for part in block_of(section).discard_manager.populated(section)
        for page in range(part.gpa, part.gpa_end, PAGE)
    }
    attached = [mapper.target for mapper in memory.mappers]
    for target, iommu in zip(guest.targets, guest.iommus, strict=True):
        ought = populated if any(target is entry for entry in attached) else set()
        in_doubt = _pages(doubt[:2] for doubt in doubts if doubt.target is target)
        wrong = pages_of(iommu.mappings()) ^ ought
        assert wrong <= in_doubt, f"not in doubt: {sorted(map(hex, wrong - in_doubt))} of {target}"
    listener = guest.listener
    manager = block_of(listener.section).discard_manager
    shift = listener.section.gpa - listener.section.offset
    ought = set()
    if any(entry.listener is listener for entry in manager.registry):
        ought = {page for part in manager.populated(listener.section) for page in _offsets(part)}
    in_doubt = _pages(doubt[:2] for doubt in doubts if doubt.target is listener)
    assert {page + shift for page in listener.held ^ ought} <= in_doubt, "the listener"
    return list(memory.in_doubt())


def assert_changes_refused(guest: Guest) -> None:
    memory, block = guest.memory, guest.blocks["a"]
    attributes = block.attributes
    changes: list[Callable[[], object]] = []
    if memory.poisoned:
        changes += [
            lambda: memory.convert(BASE, PAGE, SHARED),
            lambda: memory.convert(BASE, 8 * PAGE, PRIVATE),
            lambda: memory.attach(SoftIommu()),
            lambda: memory.map(RamBlock("c", FakeShared(0, PAGE), None, owns_private=False), 0),
        ]
    if block.guard.poisoned:
        changes += [
            lambda: block.discard_manager.add_source(FaultySource(guest.injector, set())),
            lambda: block.discard_manager.remove_source(guest.source),
            lambda: VirtioMem(block, PAGE),
            lambda: block.discard_manager.register_listener(
                FaultyListener(guest.injector, guest.checker, guest.section("a")),
                guest.section("a"),
            ),
        ]
        if attributes is not None:
            changes.append(lambda: attributes.state_change(0, PAGE, SHARED))
        virtio_mem = guest.virtio_mem
        if virtio_mem is not None:
            changes += [
                lambda: virtio_mem.plug(0, PAGE),
                lambda: virtio_mem.unplug(0, PAGE),
                lambda: virtio_mem.unplug_all(),
            ]
    calls = guest.checker.calls
    for change in changes:
        with pytest.raises(PoisonedError):
            change()
    assert guest.checker.calls == calls, "a refused change did something"


def judge_close(guest: Guest) -> None:
    """
    Closing works, and leaves nothing mapped but what is in doubt.

    The checker sees memory that goes too early.
    """
    for block in guest.blocks.values():
        block.close()
    _kept.clear()  # what a poisoned block leaves allocated holds the whole guest here
    assert guest.memory.sections == ()
    for target, iommu in zip(guest.targets, guest.iommus, strict=True):
        assert iommu.mappings() == [], f"{target} maps pages of a closed guest"


def _is_interrupt(error: BaseException | None) -> bool:
    return isinstance(error, KeyboardInterrupt)


def refusal_for_lack_of_room(scenario: Scenario) -> int | None:
    """
    Run *scenario* undisturbed; what the budget would have to be, if it refuses.

    Nothing must have been done then.
    """
    guest = scenario.build()
    guest.injector.arm(())
    try:
        scenario.act(guest)
    except MappingLimitError as error:
        guest.injector.disarm()
        assert guest.injector.counted(*(kind for kind in Kind if kind is not Kind.ASK)) == 0
        assert_like(guest, scenario.before)
        assert_nothing_freed(guest)
        guest.checker.verify()
        return error.needed
    guest.injector.disarm()
    return None
