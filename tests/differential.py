"""
Long random runs of the core against a model of pages, written from QEMU's rules.

The rules (QEMU 11.1: system/ram-block-attributes.c, system/ram-discard-manager.c,
hw/virtio/virtio-mem.c, hw/vfio/listener.c): a page of a confidential block starts private; private
is discarded, shared is populated; a page is populated where every source of its block says so;
virtio-mem says so of plugged device blocks; a listener holds the populated pages of its section,
and
of no other; a VFIO device maps at the guest address the populated pages of each section, one
mapping
for each page. Where QEMU is known to be wrong (a range over two regions, a map that fails, a reset)
the model says what is right: all or nothing, and nothing of the old guest.

It shares no code with the core: sets of page numbers, nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from doubles import PAGE, CoarseSource, PageSource, RecordingListener, RefusalError
from ramblock import GuestMemory, Mapper, MappingPolicy, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import ConversionError, DmaError, MappingLimitError, UsageError
from ramblock.testing import FaultyTarget

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 32


@dataclass
class Pages:
    """One block, as QEMU's rules have it."""

    confidential: bool
    shared: set[int] = field(default_factory=set)
    plugged: set[int] | None = None
    others: dict[int, set[int]] = field(default_factory=dict)
    """Populated pages of other people's sources."""

    def populated(self) -> set[int]:
        pages = set(self.shared) if self.confidential else set(range(COUNT))
        if self.plugged is not None:
            pages &= self.plugged
        for populated in self.others.values():
            pages &= populated
        return pages


@dataclass
class Place:
    block: int
    first: int
    count: int
    gpa: int  # in pages

    def guest_pages(self, pages: set[int]) -> set[int]:
        return {
            page - self.first + self.gpa
            for page in pages
            if self.first <= page < self.first + self.count
        }


@dataclass
class Device:
    iommu: SoftIommu
    target: FaultyTarget
    policy: MappingPolicy
    mapper: Mapper


class Differential:
    """
    A guest and its model; :meth:`step` does one random operation to both.

    :param seed: Of all that is random.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.memory = GuestMemory()
        self.pages = [Pages(True), Pages(True), Pages(True), Pages(False)]
        self.blocks = [
            RamBlock.create(
                f"block{number}", COUNT * PAGE, private="stand-in" if entry.confidential else None
            )
            for number, entry in enumerate(self.pages)
        ]
        self.places: list[Place] = []
        self.sections: list[RamSection] = []
        self.devices: list[Device] = []
        self.virtio: dict[int, VirtioMem] = {}
        self.removed: dict[int, VirtioMem] = {}
        self.sources: dict[tuple[int, int], PageSource] = {}
        self.listeners: list[tuple[int, RamSection, RecordingListener]] = []
        self.key = 0
        for _ in range(3):
            self.map()
            self.attach()

    def close(self) -> None:
        for block in self.blocks:
            block.close()

    # -- one operation -----------------------------------------------------------------------------

    def step(self) -> None:
        operations: list[tuple[int, Callable[[], object]]] = [
            (30, self.convert),
            (4, self.state_change),
            (4, self.map),
            (2, self.unmap),
            (2, self.attach),
            (1, self.detach),
            (2, self.add_virtio_mem),
            (8, self.plug_or_unplug),
            (1, self.unplug_all),
            (1, self.remove_virtio_mem),
            (3, self.add_source),
            (2, self.remove_source),
            (6, self.change_source),
            (3, self.listen),
            (2, self.stop_listening),
            (1, self.reset),
        ]
        weights = [weight for weight, _ in operations]
        _, operation = self.random.choices(operations, weights)[0]
        operation()
        self.check()

    def attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Make a call that one of the edges may refuse; whether it was done."""
        refusing = self.random.random() < 0.15
        if refusing:
            self._refuse_one()
        try:
            call()
        except (ConversionError, DmaError, RefusalError, MappingLimitError) as error:
            if self.memory.poisoned:
                raise
            self.done[f"{name}: {type(error).__name__}"] += 1
            return False
        finally:
            self._refuse_nothing()
        self.done[name] += 1
        return True

    def _refuse_one(self) -> None:
        number = self.random.randrange(1, 6)
        if self.devices and self.random.random() < 0.6:
            target = self.random.choice(self.devices).target
            # A failure of the undo poisons, which is another test's business: each fails once.
            if self.random.random() < 0.5:
                target.fail_map = (target.map_calls + number,)
            else:
                target.fail_unmap = (target.unmap_calls + number,)
        elif self.listeners:
            _, _, listener = self.random.choice(self.listeners)
            left = [number]

            def refuse(_: object) -> bool:
                left[0] -= 1
                return left[0] == 0

            listener.refuse = refuse

    def _refuse_nothing(self) -> None:
        for device in self.devices:
            device.target.fail_map = device.target.fail_unmap = ()
        for _, _, listener in self.listeners:
            listener.refuse_nothing()

    def _range(self, limit: int = COUNT) -> tuple[int, int]:
        first = self.random.randrange(limit)
        return first, self.random.randrange(
            1, min(limit - first, self.random.choice((2, 6, limit))) + 1
        )

    # -- states ------------------------------------------------------------------------------------

    def convert(self) -> None:
        if not self.places:
            return
        place = self.random.choice(self.places)
        first, count = self._range(place.count + (4 if self.random.random() < 0.2 else 0))
        gpa = place.gpa + first
        to = self.random.choice((SHARED, PRIVATE))
        touched = range(gpa, gpa + count)
        where = {
            page: (other.block, page - other.gpa + other.first)
            for other in self.places
            for page in touched
            if other.gpa <= page < other.gpa + other.count
        }
        allowed = len(where) == count and all(
            self.pages[block].confidential for block, _ in where.values()
        )
        if not allowed:
            try:
                self.memory.convert(gpa * PAGE, count * PAGE, to)
            except UsageError:
                self.done["convert: UsageError"] += 1
                return
            raise AssertionError(f"converted {gpa:#x}+{count}, where it cannot")
        changed = [
            (block, page)
            for block, page in where.values()
            if (page in self.pages[block].shared) is not (to is SHARED)
        ]
        told: list[int] = []

        def call() -> None:
            told.append(self.memory.convert(gpa * PAGE, count * PAGE, to).changed_bytes)

        if self.attempt(f"convert to {to.value}", call):
            assert told == [len(changed) * PAGE]
            for block, page in changed:
                self._set(block, {page}, to)

    def _set(self, block: int, pages: set[int], to: PageState) -> None:
        if to is SHARED:
            self.pages[block].shared |= pages
        else:
            self.pages[block].shared -= pages

    def state_change(self) -> None:
        number = self.random.randrange(3)
        attributes = self.blocks[number].attributes
        assert attributes is not None
        first, count = self._range()
        to = self.random.choice((SHARED, PRIVATE))
        if self.attempt(
            "state_change", lambda: attributes.state_change(first * PAGE, count * PAGE, to)
        ):
            self._set(number, set(range(first, first + count)), to)

    # -- places ------------------------------------------------------------------------------------

    def map(self) -> None:
        number = self.random.randrange(len(self.blocks))
        first, count = self._range()
        gpa = self.random.randrange(6 * COUNT)
        block = self.blocks[number]

        def collides(other: Place) -> bool:
            if other.gpa < gpa + count and gpa < other.gpa + other.count:
                return True
            same = other.block == number and self.pages[number].confidential
            return same and other.first < first + count and first < other.first + other.count

        if len(self.places) > 7 or any(collides(other) for other in self.places):
            return
        sections: list[RamSection] = []
        if self.attempt(
            "map",
            lambda: sections.append(
                self.memory.map(block, gpa * PAGE, offset=first * PAGE, size=count * PAGE)
            ),
        ):
            self.places.append(Place(number, first, count, gpa))
            self.sections.append(sections[0])

    def unmap(self) -> None:
        if len(self.places) > 2:
            index = self.random.randrange(len(self.places))
            if self.attempt("unmap", lambda: self.memory.unmap(self.sections[index])):
                del self.places[index], self.sections[index]

    # -- devices -----------------------------------------------------------------------------------

    def attach(self) -> None:
        if len(self.devices) >= 4:
            return
        kind = self.random.choice(("cut", "page", "exact", "limited"))
        limit = self.random.randrange(4, 3 * COUNT) if kind == "limited" else None
        iommu = SoftIommu(cut=kind in {"cut", "limited"}, exact=kind == "exact")
        target = FaultyTarget(iommu)
        policy = MappingPolicy.PAGE if kind == "page" else MappingPolicy.AUTO
        mappers: list[Mapper] = []
        if self.attempt(
            f"attach {kind}",
            lambda: mappers.append(self.memory.attach(target, policy, max_mappings=limit)),
        ):
            self.devices.append(Device(iommu, target, policy, mappers[0]))
        else:
            assert iommu.mappings() == []

    def detach(self) -> None:
        if self.devices:
            device = self.random.choice(self.devices)
            if self.attempt("detach", lambda: self.memory.detach(device.mapper)):
                self.devices.remove(device)
                assert device.iommu.mappings() == []

    # -- virtio-mem --------------------------------------------------------------------------------

    def add_virtio_mem(self) -> None:
        number = self.random.randrange(len(self.blocks))
        if number in self.virtio:
            return
        block = self.blocks[number]
        back = self.removed.get(number)
        if back is not None and self.random.random() < 0.5:
            device = back
            if self.attempt("virtio-mem back", lambda: block.discard_manager.add_source(device)):
                self.virtio[number] = self.removed.pop(number)
                self.pages[number].plugged = {
                    page
                    for offset, size in device.ranges(0, block.size)
                    for page in range(offset // PAGE, (offset + size) // PAGE)
                }
            return
        unit = self.random.choice((1, 2, 4, 8))
        made: list[VirtioMem] = []
        if self.attempt("virtio-mem", lambda: made.append(VirtioMem(block, unit * PAGE))):
            self.virtio[number] = made[0]
            self.pages[number].plugged = set()

    def plug_or_unplug(self) -> None:
        if not self.virtio:
            return
        number, device = self.random.choice(list(self.virtio.items()))
        plugged = self.pages[number].plugged
        assert plugged is not None
        unit = device.granularity // PAGE
        first, count = (part * unit for part in self._range(COUNT // unit))
        pages = set(range(first, first + count))
        verb = self.random.choice(("plug", "unplug"))
        call = getattr(device, verb)
        if pages & plugged if verb == "plug" else pages - plugged:
            with suppress(UsageError):
                call(first * PAGE, count * PAGE)
                raise AssertionError(f"{verb} of {pages}, where it cannot")
            self.done[f"{verb}: UsageError"] += 1
        elif self.attempt(verb, lambda: call(first * PAGE, count * PAGE)):
            plugged ^= pages

    def unplug_all(self) -> None:
        if self.virtio:
            number, device = self.random.choice(list(self.virtio.items()))
            if self.attempt("unplug_all", device.unplug_all):
                self.pages[number].plugged = set()

    def remove_virtio_mem(self) -> None:
        if self.virtio:
            number, device = self.random.choice(list(self.virtio.items()))
            manager = self.blocks[number].discard_manager
            if self.attempt("virtio-mem removed", lambda: manager.remove_source(device)):
                self.removed[number] = self.virtio.pop(number)
                self.pages[number].plugged = None

    # -- other people's ----------------------------------------------------------------------------

    def add_source(self) -> None:
        if len(self.sources) > 3:
            return
        number = self.random.randrange(len(self.blocks))
        unit = self.random.choice((1, 2, 4, 8))
        pages = {
            page
            for granule in range(COUNT // unit)
            if self.random.random() < 0.7
            for page in range(granule * unit, (granule + 1) * unit)
        }
        kind = self.random.choice((PageSource, CoarseSource))
        source = kind(pages, granularity=unit * PAGE)
        manager = self.blocks[number].discard_manager
        if self.attempt("add_source", lambda: manager.add_source(source)):
            self.key += 1
            self.sources[number, self.key] = source
            self.pages[number].others[self.key] = set(pages)

    def remove_source(self) -> None:
        if self.sources:
            number, key = self.random.choice(list(self.sources))
            manager = self.blocks[number].discard_manager
            source = self.sources[number, key]
            if self.attempt("remove_source", lambda: manager.remove_source(source)):
                del self.sources[number, key], self.pages[number].others[key]

    def change_source(self) -> None:
        if not self.sources:
            return
        number, key = self.random.choice(list(self.sources))
        source = self.sources[number, key]
        unit = source.granularity // PAGE
        first = self.random.randrange(COUNT // unit) * unit
        populates = first not in source.populated
        end = first + unit
        while (
            end < COUNT
            and (end in source.populated) is not populates
            and self.random.random() < 0.7
        ):
            end += unit
        before = set(source.populated)
        source.populated ^= set(range(first, end))
        manager = self.blocks[number].discard_manager
        notify = manager.notify_populate if populates else manager.notify_discard
        if self.attempt(
            "a source changes", lambda: notify(source, first * PAGE, (end - first) * PAGE)
        ):
            self.pages[number].others[key] = set(source.populated)
        else:
            source.populated = before

    def listen(self) -> None:
        if len(self.listeners) > 4:
            return
        number = self.random.randrange(len(self.blocks))
        first, count = self._range()
        section = RamSection(self.blocks[number], first * PAGE, count * PAGE, 1 << 40)
        listener = RecordingListener(sparse=self.random.random() < 0.3)
        manager = self.blocks[number].discard_manager
        self.listeners.append((number, section, listener))
        if not self.attempt(
            "register_listener", lambda: manager.register_listener(listener, section)
        ):
            self.listeners.pop()
            assert listener.held == set()

    def stop_listening(self) -> None:
        if self.listeners:
            index = self.random.randrange(len(self.listeners))
            number, _, listener = self.listeners[index]
            manager = self.blocks[number].discard_manager
            if self.attempt("unregister_listener", lambda: manager.unregister_listener(listener)):
                del self.listeners[index]
                assert listener.held == set()

    def reset(self) -> None:
        if self.attempt("reset", self.memory.reset):
            for number in {place.block for place in self.places}:
                self.pages[number].shared.clear()
                if self.pages[number].plugged is not None:
                    self.pages[number].plugged = set()

    # -- the comparison ----------------------------------------------------------------------------

    def check(self) -> None:
        populated = [entry.populated() for entry in self.pages]
        expected = {
            page for place in self.places for page in place.guest_pages(populated[place.block])
        }
        for device in self.devices:
            entries = device.iommu.mappings()
            mapped = {
                page
                for entry in entries
                for page in range(entry.iova // PAGE, (entry.iova + entry.size) // PAGE)
            }
            assert mapped == expected, sorted(mapped ^ expected)
            assert device.mapper.entries == len(entries)
            if device.mapper.policy is MappingPolicy.PAGE:
                assert len(entries) == len(expected)
        for number, section, listener in self.listeners:
            first, end = section.offset // PAGE, section.end // PAGE
            held = {page for page in populated[number] if first <= page < end}
            assert listener.held == held
            assert listener.wrong == []
            for heard in listener.sections:
                assert section.offset <= heard.offset < heard.end <= section.end
                assert heard.gpa == section.gpa + heard.offset - section.offset
            listener.sections.clear()
        for number, entry in enumerate(self.pages):
            attributes = self.blocks[number].attributes
            if attributes is not None:
                shared = {
                    page
                    for offset, size in attributes.ranges(SHARED)
                    for page in range(offset // PAGE, (offset + size) // PAGE)
                }
                assert shared == entry.shared
                assert attributes.shared_bytes == len(shared) * PAGE
        assert not self.memory.poisoned
