"""
Everything at once, in any order, against sets of pages.

Blocks come, go, are placed, converted and plugged; sources and listeners of third parties come, go
and refuse; devices of every kind are attached and detached and do DMA. After each step every book
there is has to say the same: the model, the page states, each target's table, each mapper's
counters, what each listener holds, the VM's attributes, and the bytes in memory. A checker at the
edges looks at each single call in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from doubles import (
    PAGE,
    CoarseSource,
    Heard,
    PageSource,
    PageSourceWithRanges,
    RecordingListener,
    RefusalError,
    pages,
)
from ramblock import GuestMemory, Mapper, MappingPolicy, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.dma.vfio_user import Capabilities
from ramblock.errors import ConversionError, IommuFault, MappingLimitError, UsageError
from ramblock.hostmem import MemfdBacking, PrivateBacking, StandInPrivate
from ramblock.testing import (
    GuestChecker,
    GuestModel,
    ModelSection,
    SimulatedInPlace,
    pages_of,
)
from ramblock.testing.strategies import TargetKind, page_ranges, page_states, target_kinds
from vfio_user_server import RemoteIommu

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 8
SIZE = COUNT * PAGE
CONFIDENTIAL = ("low", "high", "hotplug")
NAMES = (*CONFIDENTIAL, "ordinary")
MOST = 3  # listeners, targets, sources: enough to be several

# Where blocks may appear: whole, in parts, side by side, twice, and one over the other.
PLACES = [
    ModelSection(block="low", offset=0, size=SIZE, gpa=0),
    ModelSection(block="low", offset=0, size=SIZE // 2, gpa=0),
    ModelSection(block="low", offset=SIZE // 2, size=SIZE // 2, gpa=SIZE // 2),
    ModelSection(block="high", offset=0, size=SIZE, gpa=SIZE),
    ModelSection(block="high", offset=2 * PAGE, size=4 * PAGE, gpa=SIZE),
    ModelSection(block="hotplug", offset=0, size=SIZE, gpa=3 * SIZE),
    # Whose borders cut blocks of a virtio-mem device, and granules of other people's sources.
    ModelSection(block="hotplug", offset=PAGE, size=5 * PAGE, gpa=3 * SIZE),
    ModelSection(block="hotplug", offset=3 * PAGE, size=2 * PAGE, gpa=3 * SIZE),
    ModelSection(block="ordinary", offset=0, size=SIZE, gpa=2 * SIZE),
    ModelSection(block="ordinary", offset=PAGE, size=2 * PAGE, gpa=5 * SIZE),
]
WHOLE = [place for place in PLACES if place.size == SIZE]
TOP = 6 * SIZE  # beyond all of them

names = st.sampled_from(NAMES)
confidential = st.sampled_from(CONFIDENTIAL)
index = st.integers(0, MOST - 1)
inside = page_ranges(SIZE)


class Attached(NamedTuple):
    kind: TargetKind
    iommu: SoftIommu | RemoteIommu
    mapper: Mapper


class Listening(NamedTuple):
    name: str
    section: RamSection
    listener: RecordingListener


@dataclass
class Refusal:
    """
    Which call, of all listeners together, is refused next: once, so that what is put back can be
    put back.
    """

    calls_until: int | None = None
    happened: bool = False

    def __call__(self, _: Heard) -> bool:
        if self.calls_until is None or self.happened:
            return False
        self.calls_until -= 1
        self.happened = self.calls_until < 0
        return self.happened


@dataclass
class Edge:
    """A block, and what is behind it that is not the library's to close."""

    block: RamBlock
    private: StandInPrivate | None
    """None for ordinary RAM, and in place."""
    in_place: SimulatedInPlace | None = None
    device: VirtioMem | None = None
    removed: VirtioMem | None = None
    """A device that was taken out, and may come back."""
    sources: dict[int, PageSource] = field(default_factory=dict)


class EverythingAgrees(RuleBasedStateMachine):
    @initialize(
        kinds=st.lists(target_kinds() | target_kinds(max_limit=2 * COUNT), max_size=2),
        empty=st.sampled_from([False] * 7 + [True]),
        plugged=st.booleans(),
        in_place=st.sets(confidential),
    )
    def start(
        self, kinds: list[TargetKind], empty: bool, plugged: bool, in_place: set[str]
    ) -> None:
        """
        Begin with a guest that runs, most of the time: what is interesting happens to a guest that
        does.
        """
        self.checker = GuestChecker()
        self.vm = self.checker.vm()
        self.memory = GuestMemory(self.vm)
        self.model = GuestModel()
        self.edges: dict[str, Edge] = {}
        self.attached: list[Attached] = []
        self.iommus: list[SoftIommu | RemoteIommu] = []
        self.listening: list[Listening] = []
        self.refusal = Refusal()
        #: By block and page, the first byte of the shared side where it is not zero; None where a
        #: page is private and was not freed, which a later conversion around it may do.
        self.bytes: dict[str, dict[int, int | None]] = {}
        self.next_byte = 1
        self.in_place = in_place
        for name in NAMES:
            self._create(name)
        if not empty:
            for place in WHOLE:
                self.map(place)
            for kind in kinds:
                self.attach(kind)
        if plugged:
            self.add_virtio_mem(2, None)
            self.plug_or_unplug("plug", (0, SIZE), None)

    def _create(self, name: str) -> None:
        self.model.add_block(name, SIZE, confidential=name in CONFIDENTIAL)
        self.bytes[name] = {}
        if name in self.in_place:
            both = SimulatedInPlace(name, SIZE, pinned_by=self.iommus)
            memory = self.checker.in_place(both)
            block = RamBlock.create(name, SIZE, private=memory)
            memory.block = block
            self.edges[name] = Edge(block, None, both)
            return
        shared = self.checker.shared(MemfdBacking(name, SIZE))
        private = StandInPrivate(name, SIZE) if name in CONFIDENTIAL else None
        watched = None if private is None else self.checker.private(private)
        block = RamBlock(name, shared, watched, owns_private=False)
        shared.block = block
        if watched is not None:
            watched.block = block
        self.edges[name] = Edge(block, private)

    def teardown(self) -> None:
        if hasattr(self, "edges"):
            self.refusal = Refusal()
            for edge in self.edges.values():
                edge.block.close()
                if edge.private is not None:
                    edge.private.close()
            assert all(attached.iommu.mappings() == [] for attached in self.attached)
            self.checker.verify()

    # -- what may go wrong -------------------------------------------------------------------------

    def _attempt(self, call: Callable[[], object], refuse_at: int | None) -> bool:
        """
        Make a call that may only fail because a listener refuses or a budget is too small.

        Tell whether it worked.
        """
        self.refusal = Refusal(refuse_at)
        try:
            call()
        except MappingLimitError as refused:
            limit, needed = refused.limit, refused.needed
            limits = [attached.mapper.limit for attached in self.attached]
            limits.append(self.new_limit)
            assert limit in limits
            assert needed > limit
            assert not self.refusal.happened, "the budget comes before anybody is told"
            return False
        except ConversionError as refused:
            cause, rolled_back = refused.__cause__, refused.rolled_back
            assert isinstance(cause, RefusalError)
            assert rolled_back
            assert self.refusal.happened
            return False
        except RefusalError:
            assert self.refusal.happened
            return False
        finally:
            happened = self.refusal.happened
            self.refusal = Refusal()
        assert not happened, "a refusal was ignored"
        return True

    new_limit: int | None = None

    @contextmanager
    def _usage_error_unless(self, allowed: bool) -> Iterator[None]:
        if allowed:
            yield
        else:
            with pytest.raises(UsageError):
                yield

    # -- blocks and sections -----------------------------------------------------------------------

    @rule(place=st.sampled_from(PLACES))
    def map(self, place: ModelSection) -> None:
        block = self.edges[place.block].block

        def collides(other: ModelSection) -> bool:
            if other.gpa < place.gpa + place.size and place.gpa < other.gpa + other.size:
                return True
            same = other.block == place.block in CONFIDENTIAL
            return (
                same
                and other.offset < place.offset + place.size
                and place.offset < other.offset + other.size
            )

        def call() -> None:
            self.memory.map(block, place.gpa, offset=place.offset, size=place.size)

        if any(collides(other) for other in self.model.sections):
            with pytest.raises(UsageError):
                call()
        elif self._attempt(call, None):
            self.model.map(place.block, place.gpa, offset=place.offset, size=place.size)

    @rule(which=st.integers(0, len(PLACES)))
    @precondition(lambda self: len(self.memory.sections) > 2)
    def unmap(self, which: int) -> None:
        placed = self.memory.sections[which % len(self.memory.sections)]
        self.memory.unmap(placed)
        self.model.unmap(placed.gpa)

    @rule(name=names)
    def close_a_block_and_make_it_anew(self, name: str) -> None:
        edge = self.edges[name]
        edge.block.close()
        if edge.private is not None:
            edge.private.close()
        self.model.sections = [other for other in self.model.sections if other.block != name]
        for listening in [each for each in self.listening if each.name == name]:
            assert listening.listener.held == set()
            self.listening.remove(listening)
        # Host addresses are given out again.
        addresses = range(edge.block.address, edge.block.address + SIZE, PAGE)
        self.checker.freed_pages.difference_update(addresses)
        self.checker.private_memory.difference_update(addresses)
        self._create(name)

    # -- states ------------------------------------------------------------------------------------

    # More rules than one, so that most steps are conversions.
    @rule(where=page_ranges(2 * SIZE), to=page_states())
    def convert_across_blocks(self, where: tuple[int, int], to: PageState) -> None:
        self._convert(where, to, None)

    @rule(where=page_ranges(SIZE, start=3 * SIZE), to=page_states())
    def convert_what_may_be_unplugged(self, where: tuple[int, int], to: PageState) -> None:
        self._convert(where, to, None)

    @rule(where=page_ranges(2 * SIZE), to=page_states(), refuse_at=st.integers(0, 4))
    def convert_and_be_refused(self, where: tuple[int, int], to: PageState, refuse_at: int) -> None:
        self._convert(where, to, refuse_at)

    @rule(where=page_ranges(TOP), to=page_states())
    def convert_anything(self, where: tuple[int, int], to: PageState) -> None:
        self._convert(where, to, None)

    @rule(
        where=page_ranges(2 * SIZE),
        name=st.sampled_from(["low", "high"]),
        number=st.integers(0, COUNT - 1),
    )
    @precondition(lambda self: self.in_place)
    def make_private_what_somebody_holds(
        self, where: tuple[int, int], name: str, number: int
    ) -> None:
        memory = self.edges[name].in_place
        touched = set(range(where[0], sum(where), PAGE))
        if memory is None or not touched <= self.model.pages():
            return
        memory.pin(number * PAGE, PAGE)
        held = (name, number * PAGE)
        if any(self.model._at(gpa) == held for gpa in touched & self.model.shared()):
            with pytest.raises((ConversionError, MappingLimitError)) as caught:
                self.memory.convert(*where, PRIVATE)
            if isinstance(caught.value, ConversionError):
                assert isinstance(caught.value.__cause__, BlockingIOError)
                assert caught.value.rolled_back
        else:
            self._convert(where, PRIVATE, None)
        memory.unpin(number * PAGE, PAGE)

    def _convert(self, where: tuple[int, int], to: PageState, refuse_at: int | None) -> None:
        touched = set(range(where[0], sum(where), PAGE))
        ordinary = {
            page
            for section in self.model.sections
            if section.block == "ordinary"
            for page in range(section.gpa, section.gpa + section.size, PAGE)
        }
        if not touched <= self.model.pages() - ordinary:
            with pytest.raises(UsageError):
                self.memory.convert(*where, to)
            return
        changing = touched & (self.model.private() if to is SHARED else self.model.shared())

        def call() -> None:
            result = self.memory.convert(*where, to)
            assert result[:3] == (*where, to)
            assert result.changed_bytes == len(changing) * PAGE
            assert result.not_freed_bytes == 0

        if self._attempt(call, refuse_at):
            self.model.convert(*where, to)
            if to is PRIVATE:
                # Only where something changed was anything freed, and there all of it that is not
                # shared any more.
                for gpa in changing:
                    name, offset = self.model._at(gpa)
                    if name not in self.in_place:
                        self.bytes[name].pop(offset // PAGE, None)

    @rule(
        name=confidential,
        where=inside,
        to=page_states(),
        refuse_at=st.none() | st.integers(0, 4),
    )
    def state_change(
        self, name: str, where: tuple[int, int], to: PageState, refuse_at: int | None
    ) -> None:
        """
        Change the states the way a VMM without ``convert`` would: with the attributes, in the right
        order. It gives its VM to nobody: a memory that has one refuses.
        """
        attributes = self.edges[name].block.attributes
        assert attributes is not None
        changing = {
            page
            for page in range(where[0], sum(where), PAGE)
            if (page in self.model.blocks[name].shared) is (to is PRIVATE)
        }
        guest_pages = [
            section.gpa + page - section.offset
            for section in self.model.sections
            if section.block == name
            for page in changing
            if section.offset <= page < section.offset + section.size
        ]
        memory = self.edges[name].block.in_place

        def set_attributes(private: bool) -> None:
            if memory is not None:
                for page in changing:
                    memory.set_attributes(page, PAGE, private)
                return
            for gpa in guest_pages:
                self.vm.set_memory_attributes(gpa, PAGE, private)

        if to is SHARED:
            set_attributes(False)
        guard = self.edges[name].block.guard
        has_vm, guard.has_vm = guard.has_vm, False
        worked = self._attempt(lambda: attributes.state_change(*where, to), refuse_at)
        guard.has_vm = has_vm
        if worked:
            self.model.state_change(name, *where, to)
            for page in changing if to is PRIVATE else ():
                if page // PAGE in self.bytes[name] and memory is None:
                    self.bytes[name][page // PAGE] = None
        if worked is (to is PRIVATE):
            set_attributes(True)

    # -- virtio-mem --------------------------------------------------------------------------------

    @rule(unit=st.sampled_from([1, 2, 4, 8]), refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: self.edges["hotplug"].device is None)
    def add_virtio_mem(self, unit: int, refuse_at: int | None) -> None:
        edge = self.edges["hotplug"]

        def call() -> None:
            edge.device = VirtioMem(edge.block, unit * PAGE)

        if self._attempt(call, refuse_at):
            self.model.add_virtio_mem("hotplug")
            self.bytes["hotplug"].clear()

    @rule(refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: self.edges["hotplug"].device is not None)
    def remove_virtio_mem(self, refuse_at: int | None) -> None:
        edge = self.edges["hotplug"]
        device = edge.device
        assert device is not None
        if self._attempt(lambda: edge.block.discard_manager.remove_source(device), refuse_at):
            edge.device = None
            edge.removed = device
            self.model.blocks["hotplug"].plugged = None

    @rule(refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: self.edges["hotplug"].removed is not None)
    @precondition(lambda self: self.edges["hotplug"].device is None)
    def virtio_mem_comes_back(self, refuse_at: int | None) -> None:
        """It keeps what was plugged; the rest, which the guest could use meanwhile, is freed."""
        edge = self.edges["hotplug"]
        device = edge.removed
        assert device is not None
        if self._attempt(lambda: edge.block.discard_manager.add_source(device), refuse_at):
            edge.device, edge.removed = device, None
            plugged = {
                page
                for offset, size in device.ranges(0, SIZE)
                for page in range(offset, offset + size, PAGE)
            }
            self.model.blocks["hotplug"].plugged = plugged
            for page in set(range(COUNT)) - {page // PAGE for page in plugged}:
                self.bytes["hotplug"].pop(page, None)

    @rule(
        verb=st.sampled_from(["plug", "unplug"]),
        where=inside,
        refuse_at=st.none() | st.integers(0, 4),
    )
    @precondition(lambda self: self.edges["hotplug"].device is not None)
    def plug_or_unplug(self, verb: str, where: tuple[int, int], refuse_at: int | None) -> None:
        device = self.edges["hotplug"].device
        assert device is not None
        unit = device.granularity
        start, end = where[0] // unit * unit, -(-sum(where) // unit) * unit
        where = start, end - start
        plugged = self.model.blocks["hotplug"].plugged
        assert plugged is not None
        touched = set(range(where[0], sum(where), PAGE))
        if touched & plugged if verb == "plug" else touched - plugged:
            with pytest.raises(UsageError):
                getattr(device, verb)(*where)
        elif self._attempt(lambda: getattr(device, verb)(*where), refuse_at):
            getattr(self.model, verb)("hotplug", *where)
            if verb == "unplug":
                for page in touched:
                    self.bytes["hotplug"].pop(page // PAGE, None)

    @rule(refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: self.edges["hotplug"].device is not None)
    def unplug_all(self, refuse_at: int | None) -> None:
        device = self.edges["hotplug"].device
        assert device is not None
        plugged = self.model.blocks["hotplug"].plugged
        assert plugged is not None
        if self._attempt(device.unplug_all, refuse_at):
            if plugged:
                self.bytes["hotplug"].clear()
            plugged.clear()

    # -- other people's sources --------------------------------------------------------------------

    @rule(
        name=names,
        key=index,
        kind=st.sampled_from([PageSource, PageSourceWithRanges, CoarseSource]),
        granule=st.sampled_from([1, 2, 4, 8]),
        withheld=st.sets(st.integers(0, COUNT - 1), max_size=COUNT // 2),
        refuse_at=st.none() | st.integers(0, 4),
    )
    def add_source(
        self,
        name: str,
        key: int,
        kind: type[PageSource],
        granule: int,
        withheld: set[int],
        refuse_at: int | None,
    ) -> None:
        edge = self.edges[name]
        if key in edge.sources:
            return
        withheld = {
            page + more
            for page in (number // granule * granule for number in withheld)
            for more in range(granule)
        }
        source = kind(set(range(COUNT)) - withheld, granularity=granule * PAGE)
        if self._attempt(lambda: edge.block.discard_manager.add_source(source), refuse_at):
            edge.sources[key] = source
            self._tell_model(name, key)

    def _tell_model(self, name: str, key: int) -> None:
        populated = self.edges[name].sources[key].populated
        self.model.blocks[name].sources[key] = {page * PAGE for page in populated}

    def _some_source(self, which: int) -> tuple[str, int, PageSource]:
        there = [
            (name, key, source)
            for name, edge in self.edges.items()
            for key, source in edge.sources.items()
        ]
        return there[which % len(there)]

    @rule(which=st.integers(0, 20), refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: any(edge.sources for edge in self.edges.values()))
    def remove_source(self, which: int, refuse_at: int | None) -> None:
        name, key, source = self._some_source(which)
        edge = self.edges[name]
        if self._attempt(lambda: edge.block.discard_manager.remove_source(source), refuse_at):
            del edge.sources[key], self.model.blocks[name].sources[key]

    @rule(which=st.integers(0, 20), where=inside, refuse_at=st.none() | st.integers(0, 4))
    @precondition(lambda self: any(edge.sources for edge in self.edges.values()))
    def a_source_changes(self, which: int, where: tuple[int, int], refuse_at: int | None) -> None:
        name, key, source = self._some_source(which)
        # A source says what it changed, and only that: as much of the range as is like its first
        # page.
        unit = source.granularity // PAGE
        first = where[0] // PAGE // unit * unit
        populates = first not in source.populated
        end = first
        while end * PAGE < sum(where) and (end in source.populated) is not populates:
            end += unit
        before = source.populated.copy()
        source.populated ^= set(range(first, end))
        manager = self.edges[name].block.discard_manager
        notify = manager.notify_populate if populates else manager.notify_discard
        if self._attempt(lambda: notify(source, first * PAGE, (end - first) * PAGE), refuse_at):
            self._tell_model(name, key)
        else:
            source.populated = before

    # -- listeners ---------------------------------------------------------------------------------

    @rule(name=names, where=inside, sparse=st.booleans(), refuse_at=st.none() | st.integers(0, 2))
    @precondition(lambda self: len(self.listening) < MOST)
    def register(
        self, name: str, where: tuple[int, int], sparse: bool, refuse_at: int | None
    ) -> None:
        block = self.edges[name].block
        listener = RecordingListener(name, sparse=sparse)
        listener.refuse = lambda call: self.refusal(call)
        section = RamSection(block, *where)
        if self._attempt(
            lambda: block.discard_manager.register_listener(listener, section), refuse_at
        ):
            self.listening.append(Listening(name, section, listener))
        else:
            assert (listener.held, listener.wrong) == (set(), [])

    @rule(which=index, refuse_at=st.none() | st.integers(0, 2))
    @precondition(lambda self: self.listening)
    def unregister(self, which: int, refuse_at: int | None) -> None:
        listening = self.listening[which % len(self.listening)]
        manager = self.edges[listening.name].block.discard_manager
        if self._attempt(lambda: manager.unregister_listener(listening.listener), refuse_at):
            self.listening.remove(listening)
            assert (listening.listener.held, listening.listener.wrong) == (set(), [])

    # -- a reboot ----------------------------------------------------------------------------------

    @rule(refuse_at=st.none() | st.integers(0, 4), new_vm=st.booleans(), new_sides=st.booleans())
    def reset(self, refuse_at: int | None, new_vm: bool, new_sides: bool) -> None:
        """Of the old guest's confidential memory nothing is left, on either side."""
        private: dict[RamBlock, PrivateBacking] = {}
        made: dict[str, StandInPrivate] = {}
        placed = {section.block for section in self.model.sections}
        for name in sorted(placed & set(CONFIDENTIAL) - self.in_place) if new_sides else ():
            edge = self.edges[name]
            assert edge.private is not None
            edge.private.write(0, b"old")
            made[name] = StandInPrivate(name, SIZE)
            watched = self.checker.private(made[name])
            watched.block = edge.block
            private[edge.block] = watched
        vm = self.checker.vm() if new_vm else None
        self.checker.resetting = True
        worked = self._attempt(lambda: self.memory.reset(vm, private), refuse_at)
        self.checker.resetting = False
        if not worked:
            for backing in made.values():
                backing.close()
            return
        self.vm = self.vm if vm is None else vm
        for name, backing in made.items():
            edge = self.edges[name]
            assert edge.private is not None
            assert edge.private.allocated_bytes() == 0
            edge.private.close()
            edge.private = backing
        for name in placed:
            if name in CONFIDENTIAL or self.model.blocks[name].plugged is not None:
                self.bytes[name].clear()
            if name in CONFIDENTIAL:
                self.model.blocks[name].shared.clear()
            if self.model.blocks[name].plugged is not None:
                self.model.blocks[name].plugged = set()

    # -- devices -----------------------------------------------------------------------------------

    def make(self, kind: TargetKind) -> SoftIommu | RemoteIommu:
        return kind.make()

    @rule(kind=target_kinds() | target_kinds(max_limit=2 * COUNT))
    @precondition(lambda self: len(self.attached) < MOST)
    def attach(self, kind: TargetKind) -> None:
        iommu = self.make(kind)
        self.iommus.append(iommu)
        target = self.checker.target(iommu)
        limits = [limit for limit in (kind.target_limit, kind.budget) if limit is not None]
        self.new_limit = min(limits, default=None)

        def call() -> None:
            mapper = self.memory.attach(target, kind.policy, max_mappings=kind.budget)
            self.attached.append(Attached(kind, iommu, mapper))

        if not self._attempt(call, None):
            assert iommu.mappings() == []
        self.new_limit = None

    @rule(which=index)
    @precondition(lambda self: self.attached)
    def detach(self, which: int) -> None:
        attached = self.attached.pop(which % len(self.attached))
        self.memory.detach(attached.mapper)
        assert attached.iommu.mappings() == []
        assert (attached.mapper.entries, attached.mapper.mapped_bytes) == (0, 0)

    @rule(which=index, where=page_ranges(TOP, granularity=PAGE // 2))
    @precondition(lambda self: self.attached)
    def dma(self, which: int, where: tuple[int, int]) -> None:
        """A device writes, and reads it back; or it faults, and not one byte has changed."""
        iommu = self.attached[which % len(self.attached)].iommu
        touched = {at // PAGE * PAGE for at in range(where[0], sum(where), PAGE // 2)}
        if touched <= self.model.populated():
            data = bytes([self.next_byte]) * where[1]
            iommu.write(where[0], data)
            assert iommu.read(*where) == data
            for gpa in touched:
                name, offset = self.model._at(gpa)
                if where[0] <= gpa:  # its first byte was written
                    self.bytes[name][offset // PAGE] = self.next_byte
            self.next_byte = self.next_byte % 255 + 1
        else:
            with pytest.raises(IommuFault):
                iommu.write(where[0], b"x" * where[1])

    # -- what has to be true after each step -------------------------------------------------------

    @invariant()
    def every_target_maps_what_is_populated(self) -> None:
        populated = self.model.populated()
        for kind, iommu, mapper in self.attached:
            entries = iommu.mappings()
            assert pages_of(entries) == populated
            assert mapper.entries == len(entries)
            assert mapper.mapped_bytes == len(populated) * PAGE
            if mapper.limit is not None:
                assert len(entries) <= mapper.limit
            if mapper.policy is MappingPolicy.PAGE:
                assert {entry.size for entry in entries} <= {PAGE}
            assert (mapper.policy is MappingPolicy.RUN) == (
                kind.cut and kind.policy is not MappingPolicy.PAGE
            )
            for entry in entries:
                name, offset = self.model._at(entry.iova)
                assert entry.memory.address == self.edges[name].block.address + offset

    @invariant()
    def every_listener_holds_what_is_populated(self) -> None:
        for name, section, listener in self.listening:
            populated = {page // PAGE for page in self.model.populated_in(name)}
            assert listener.held == populated & pages(section.offset, section.size)
            assert listener.wrong == []

    @invariant()
    def the_states_are_those_of_the_model(self) -> None:
        for state, expected in (
            (SHARED, self.model.shared()),
            (PRIVATE, self.model.private()),
        ):
            found = list(self.memory.ranges(state))
            assert {
                page for gpa, size in found for page in range(gpa, gpa + size, PAGE)
            } == expected
            ends = {gpa + size for gpa, size in found}
            assert not ends & {gpa for gpa, _ in found}, "runs that touch are one run"
            assert found == sorted(found)
            assert all(self.memory.state(page) is state for page in expected)
        for name in CONFIDENTIAL:
            attributes = self.edges[name].block.attributes
            assert attributes is not None
            shared = self.model.blocks[name].shared
            assert attributes.shared_bytes == len(shared) * PAGE
            assert {
                page
                for offset, size in attributes.ranges(SHARED)
                for page in range(offset, offset + size, PAGE)
            } == shared
        device = self.edges["hotplug"].device
        if device is not None:
            assert device.plugged_size == len(self.model.blocks["hotplug"].plugged or ()) * PAGE

    @invariant()
    def the_manager_joins_the_sources(self) -> None:
        for name, edge in self.edges.items():
            whole = RamSection(edge.block, 0, SIZE)
            populated = {
                page
                for part in edge.block.discard_manager.populated(whole)
                for page in range(part.offset, part.end, PAGE)
            }
            assert populated == self.model.populated_in(name)
            discarded = {
                page
                for part in edge.block.discard_manager.discarded(whole)
                for page in range(part.offset, part.end, PAGE)
            }
            assert discarded == set(range(0, SIZE, PAGE)) - populated

    @invariant()
    def the_vm_knows_the_same_states(self) -> None:
        in_place = {
            section.gpa + page - section.offset
            for section in self.memory.sections
            if (memory := self.edges[section.block.name].in_place) is not None
            for offset, size in memory.private_ranges()
            for page in range(offset, offset + size, PAGE)
            if section.offset <= page < section.end
        }
        assert self.checker.private_pages | in_place == self.model.private()
        assert not self.checker.private_pages & in_place

    @invariant()
    def memory_holds_what_was_written_and_zeros_where_it_was_freed(self) -> None:
        for name, edge in self.edges.items():
            memory = edge.in_place
            content = (edge.block.read if memory is None else memory.read_as_guest)(0, SIZE)
            for page in range(COUNT):
                expected = self.bytes[name].get(page, 0)
                assert expected is None or content[page * PAGE] == expected
            assert edge.block.not_freed_bytes == 0

    @invariant()
    def nothing_went_wrong_in_between(self) -> None:
        self.checker.verify()
        assert not self.memory.poisoned
        assert self.memory.in_doubt() == []
        assert [(each.gpa, each.size) for each in self.memory.sections] == sorted(
            (section.gpa, section.size) for section in self.model.sections
        )


# Many rules: it takes more examples than usual until each has met each other.
EverythingAgrees.TestCase.settings = settings(max_examples=3 * settings().max_examples)
TestEverythingAgrees = EverythingAgrees.TestCase


class EverythingAgreesOverASocket(EverythingAgrees):
    """The same where targets that want whole mappings back are vfio-user servers."""

    def make(self, kind: TargetKind) -> SoftIommu | RemoteIommu:
        if not kind.exact:
            return kind.make()
        limit = Capabilities().max_dma_maps if kind.target_limit is None else kind.target_limit
        return RemoteIommu(capabilities=Capabilities(max_dma_maps=limit, pgsizes=kind.page_size))

    def teardown(self) -> None:
        super().teardown()
        for iommu in getattr(self, "iommus", []):
            iommu.close()


TestEverythingAgreesOverASocket = EverythingAgreesOverASocket.TestCase
