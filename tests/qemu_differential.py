"""
The same random requests to QEMU, to two devices of a GuestMemory (one mapping per page, one per
run), and to two sets of pages.

After each request all four have to agree on the pages that a device reaches, and the calls have to
be those that the sets predict. QEMU is wrong in places; each is a name in ``EXPLAINED``, with a
count. There its pages are what the name says, ours are right, and QEMU is then brought back by
requests that it carries out well.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from lab.qemu_double import (
    KIB,
    MIB,
    Answer,
    ConfidentialGuest,
    Double,
    GuestOptions,
    GuestStopped,
    VirtioMemDriver,
)
from qemu_heard import Call, Heard, Request, Theirs, pages_of, runs_of
from qemu_twin import PLUGGABLE, Twin
from ramblock import Mapper, MappingPolicy
from ramblock.dma import SoftIommu
from ramblock.errors import ConversionError, UsageError
from ramblock.testing import FaultyTarget
from ramblock.units import PAGE_SIZE

__all__ = ["EXPLAINED", "Differential"]

EXPLAINED = {
    "reset": "the mappings of the guest before stay",
    "two regions": "the mappings of the first region change, and no others",
    "two blocks": "a range over two RAM blocks stops the guest",
    "past the end": "a range past the end of its RAM block stops the guest",
    "hole to private": "a hole made private stops the guest",
    "refused map": "the guest is stopped, and the conversion undone by half",
}
"""Where QEMU's end of a request is not ours, by name."""

_QUEUE = 40 * MIB
_ROM, _ROM_END = 0xC0000, 0xE0000
_CHECK_WINDOWS = 100  # requests between two looks at the probe's own table


class Differential:
    """
    One machine of QEMU's and its twin; started anew where QEMU has stopped the guest.

    :ivar counts: What was asked for, by kind, and the calls of each.
    :ivar explained: How often QEMU's end was another one, by name.
    """

    def __init__(self, double: Double, options: GuestOptions, seed: int) -> None:
        self._double = double
        self._options = options
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.explained: Counter[str] = Counter()
        self._history: list[str] = []
        self._stack = ExitStack()
        self._start()

    # -- the machine ------------------------------------------------------------------------------

    def _start(self) -> None:
        self._stack.close()
        self.counts["guests"] += 1
        self._theirs = [self._new_device()]
        self._guest: ConfidentialGuest = self._double.guest(self._options, self._theirs[0].device)
        self._stack.callback(self._guest.end)
        self._twin = self._stack.enter_context(Twin(self._guest))
        self._regions = self._twin.regions
        self._faulty: list[FaultyTarget] = []
        self._page = self._twin.attach(MappingPolicy.PAGE, self._fault)
        self._run = self._twin.attach(MappingPolicy.RUN, self._fault)
        self._later: Mapper | None = None
        # The naive model: what is shared, and what is plugged.
        self._shared: set[int] = set()
        self._plugged = {
            page
            for region in self._regions
            if region.name != PLUGGABLE
            for page in pages_of(region.start, region.end - region.start)
        }
        self._start_driver()

    def _start_driver(self) -> None:
        self._driver: VirtioMemDriver | None = None
        if self._twin.virtio_mem is not None:
            self._driver = VirtioMemDriver(self._guest, _QUEUE)
            self._driver.request_size(self._options.virtio_mem)
            self._twin.convert(_QUEUE, PAGE_SIZE, private=False)
            self._shared |= pages_of(_QUEUE, PAGE_SIZE)
        self._take()

    def _new_device(self) -> Theirs:
        heard = Heard()
        return Theirs(self._double.vfio_user_device(heard), heard)

    def _fault(self, iommu: SoftIommu) -> FaultyTarget:
        faulty = FaultyTarget(iommu)
        self._faulty.append(faulty)
        return faulty

    def close(self) -> None:
        """End the guest."""
        self._stack.close()

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> None:
        """Ask for one thing; compare."""
        kind = self._random.random()
        if kind < 0.004 and self._options.resets:
            self._reset()
        elif kind < 0.010:
            self._plug_or_unplug_device()
        elif kind < 0.016:
            self._refused_map()
        elif kind < 0.12 and self._driver is not None:
            self._plug_or_unplug_memory(self._driver)
        else:
            self._convert(self._request())
        self._history = self._history[-10:]

    def _request(self) -> Request:
        rng = self._random
        # Each page that is mapped costs a message, so most requests are small.
        most_pages = rng.choices((1, 16, 64, 300), (30, 50, 15, 5))[0]
        size = rng.randrange(1, most_pages + 1) * PAGE_SIZE if rng.random() < 0.97 else 2 * MIB
        # Few places, so that requests meet again.
        windows = [(1 * MIB, 2 * MIB), (4 * MIB, 2 * MIB), (8 * MIB, 2 * MIB)]
        windows.append((0xA0000, 0x50000))  # around pc.rom
        windows += [(start, 2 * MIB) for start in self._borders()]
        start, length = rng.choice(windows)
        gpa = start + rng.randrange(0, length // PAGE_SIZE) * PAGE_SIZE
        if rng.random() < 0.004:
            gpa = self._options.memory - size // 2 // PAGE_SIZE * PAGE_SIZE  # past the end
        elif rng.random() < 0.004:
            gpa = 1 << 30  # nothing is there
        if start == 0xA0000:
            size = min(size, 0x20000)
            # Out of pc.rom over its end the guest is stopped: now and then is enough.
            if _ROM <= gpa < _ROM_END < gpa + size and rng.random() < 0.8:
                gpa -= _ROM_END - _ROM
        return Request(gpa, size, rng.random() < 0.5)

    def _borders(self) -> Iterator[int]:
        if self._options.nodes:
            # Mostly on one side of it: over it the guest is stopped.
            border = self._options.nodes[0]
            yield border - 4 * MIB
            yield border
            if self._random.random() < 0.05:
                yield border - MIB
        for region in self._regions:
            if region.name == PLUGGABLE:
                yield region.start
                yield region.start + 4 * MIB

    def _convert(self, request: Request) -> None:
        self._history.append(str(request))
        self.counts["conversions"] += 1
        parts = list(self._parts(request))
        name = self._name_of_wrong_end(request, parts)
        if name in (None, "two regions"):
            self._convert_both(request, parts, name)
            return
        assert name is not None
        with pytest.raises(GuestStopped):
            self._guest.convert(request.gpa, request.size, private=request.private)
        self.explained[name] += 1
        if sum(part.size for part in parts) == request.size:
            self._convert_ours(request)
            self._update(request)
        else:
            with pytest.raises(UsageError):
                self._convert_ours(request)
        self._check_ours()
        self._start()

    def _parts(self, request: Request) -> Iterator[Request]:
        """Cut a request at the borders of regions; holes are left out."""
        for region in self._regions:
            start = max(region.start, request.gpa)
            end = min(region.end, request.gpa + request.size)
            if start < end:
                yield Request(start, end - start, request.private)

    def _name_of_wrong_end(self, request: Request, parts: Sequence[Request]) -> str | None:
        if not parts or parts[0].gpa != request.gpa:
            # The first page is nowhere: to shared is answered with success.
            return "hole to private" if request.private else None
        first = next(r for r in self._regions if r.start <= request.gpa < r.end)
        offset = first.offset + request.gpa - first.start
        whole = sum(part.size for part in parts) == request.size
        if offset + request.size > self._twin.blocks[first.name].size:
            return "two blocks" if whole else "past the end"
        return "two regions" if len(parts) > 1 else None

    def _convert_both(self, request: Request, parts: Sequence[Request], name: str | None) -> None:
        before = set(self._shared)
        assert self._guest.convert(request.gpa, request.size, private=request.private) == 0
        if not parts:
            with pytest.raises(UsageError):
                self._convert_ours(request)
            self._check(set(), "a hole to shared is answered and nothing else")
            return
        self._convert_ours(request)
        self._update(request)
        if name is None:
            self._check_calls(request, before)
            self._check(set(), str(request))
            return
        first = next(r for r in self._regions if r.start <= request.gpa < r.end)
        others = {
            page
            for part in parts
            for page in part.pages
            if not any(
                region.name == first.name and region.start <= page * PAGE_SIZE < region.end
                for region in self._regions
            )
        }
        wrong = {page for page in others if (page in before) is not (page in self._shared)}
        self._check(wrong, str(request))
        self.explained[name] += bool(wrong)
        for part in parts:
            assert self._guest.convert(part.gpa, part.size, private=part.private) == 0
        self._check(set(), f"{request} in its parts")

    def _convert_ours(self, request: Request) -> None:
        for device in (self._page, self._run):
            device.target.calls.clear()
        self._twin.convert(request.gpa, request.size, private=request.private)

    def _update(self, request: Request) -> None:
        if request.private:
            self._shared -= request.pages
        else:
            self._shared |= request.pages

    def _check_calls(self, request: Request, before: set[int]) -> None:
        """Hold all calls against what the sets predict: QEMU's, and ours for each policy."""
        theirs = self._take()
        page, run = self._page.target.calls, self._run.target.calls
        self.counts["calls of QEMU"] += len(theirs)
        self.counts["calls with PAGE"] += len(page)
        self.counts["calls with RUN"] += len(run)
        changed = request.pages & (before ^ self._shared)
        reached = changed & self._plugged
        verb = "unmap" if request.private else "map"
        singles = [(verb, n * PAGE_SIZE, PAGE_SIZE) for n in sorted(reached)]
        runs = [(verb, start, size) for start, size in runs_of(reached)]
        if request.private:
            # One unmap may also cover pages that are not mapped (``sparse_discard``).
            assert max(len(run), len(page)) <= len(runs), self._text(request)
        else:
            assert run == runs, self._text(request)
            assert page == singles, self._text(request)
        if not request.pages <= self._plugged:
            return  # QEMU's steps over plugged and unplugged blocks are not in the table
        whole = request.private and changed == request.pages
        assert theirs == (runs if whole else singles), self._text(request)
        self.counts["call lists of QEMU checked"] += 1
        if theirs != page:
            self.counts["a mixture to private: QEMU unmaps by the page, ours by the run"] += 1

    def _reset(self) -> None:
        self._history.append("reset")
        self.counts["resets"] += 1
        expected = self._shared & self._plugged
        kept = {page for page in expected if not self._is_pluggable(page)}
        while len(self._theirs) > 1:
            self._plug_or_unplug_device()
        self._guest.reset()
        self._twin.reset()
        self._shared.clear()
        self._plugged -= {page for page in self._plugged if self._is_pluggable(page)}
        self._check(kept, "reset")
        self.explained["reset"] += bool(kept)
        # QEMU takes the pages for shared still; a conversion to private is carried out.
        for region in self._regions:
            pages = {p for p in kept if region.start <= p * PAGE_SIZE < region.end}
            for start, size in runs_of(pages):
                self._guest.convert(start, size, private=True)
            if region.name == PLUGGABLE:
                self._guest.convert(region.start, region.end - region.start, private=True)
        self._check(set(), "reset, with all made private by hand")
        self._start_driver()
        self._check(set(), "the driver after a reset")

    def _is_pluggable(self, page: int) -> bool:
        return any(
            region.name == PLUGGABLE and region.start <= page * PAGE_SIZE < region.end
            for region in self._regions
        )

    def _plug_or_unplug_device(self) -> None:
        if len(self._theirs) > 1:
            self._history.append("unplug of the device")
            self.counts["devices unplugged"] += 1
            self._guest.unplug("later")
            gone = self._theirs.pop()
            gone.device.probe.wait_for(lambda: gone.device.probe.client is None)
            assert not gone.device.pages()
            assert self._later is not None
            self._twin.memory.detach(self._later)
            self._later = None
        else:
            self._history.append("plug of a device")
            self.counts["devices plugged"] += 1
            later = self._new_device()
            self._guest.plug(later.device, "later")
            self._theirs.append(later)
            self._later = self._twin.attach(MappingPolicy.AUTO).mapper
        self._check(set(), "a device")

    def _plug_or_unplug_memory(self, driver: VirtioMemDriver) -> None:
        virtio_mem = self._twin.virtio_mem
        assert virtio_mem is not None
        block = self._options.virtio_mem_block
        count = self._random.randrange(1, 3)
        number = self._random.randrange(0, self._options.virtio_mem // block - count + 1)
        base = next(region.start for region in self._regions if region.name == PLUGGABLE)
        pages = pages_of(base + number * block, count * block)
        plug = self._random.random() < 0.6
        self._history.append(f"{'plug' if plug else 'unplug'} of {count} blocks from {number}")
        answer = (driver.plug if plug else driver.unplug)(base + number * block, count)
        ours = virtio_mem.plug if plug else virtio_mem.unplug
        # All of it has to be in the other state.
        if pages & self._plugged == (set() if plug else pages):
            assert answer is Answer.ACK
            ours(number * block, count * block)
            self._plugged = self._plugged | pages if plug else self._plugged - pages
            self.counts["blocks plugged" if plug else "blocks unplugged"] += count
        else:
            more = count * block if plug else 0
            full = virtio_mem.plugged_size + more > self._options.virtio_mem
            assert answer is (Answer.NACK if full else Answer.ERROR)
            with pytest.raises(UsageError):
                ours(number * block, count * block)
            self.counts["virtio-mem requests refused by both"] += 1
        self._check(set(), "virtio-mem")

    def _refused_map(self) -> None:
        request = Request(16 * MIB, self._random.randrange(2, 40) * 4 * KIB, private=False)
        if self._random.random() < 0.5:
            self._convert(Request(request.gpa + 4 * KIB, 4 * KIB, private=False))
        missing = sorted((request.pages - self._shared) & self._plugged)
        if not missing:
            return
        taken = self._random.randrange(len(missing))
        self._history.append(f"{request}, whose map {taken + 1} is refused")
        expected = self._shared & self._plugged
        self._theirs[0].device.refuse_maps_after(taken)
        with pytest.raises(GuestStopped):
            self._guest.convert(request.gpa, request.size, private=False)
        self.explained["refused map"] += 1
        left = self._theirs[0].heard.pages - expected
        # QEMU undoes all, or all but those before the one that was refused.
        assert left in (set(), set(missing[:taken])), self._text("refused map")
        self.counts["of the refused maps: mappings left behind"] += bool(left)
        for faulty, at in zip(self._faulty, (taken, 0), strict=True):
            faulty.fail_map = [faulty.map_calls + at + 1]
            with pytest.raises(ConversionError) as caught:
                self._convert_ours(request)
            assert caught.value.rolled_back
            faulty.fail_map = ()
            self._check_ours()
        self._start()

    # -- comparison -------------------------------------------------------------------------------

    def _take(self) -> list[Call]:
        calls = [theirs.heard.take() for theirs in self._theirs]
        # Each device is told the same.
        assert all(other == calls[0] for other in calls[1:]), self._text("two devices")
        return calls[0]

    def _check(self, wrong: set[int], where: object) -> None:
        """Compare all; *wrong* are the pages about which QEMU is known to be wrong."""
        self.counts["comparisons"] += 1
        expected = self._shared & self._plugged
        for theirs in self._theirs:
            differing = theirs.heard.pages ^ expected
            assert differing == wrong, (
                f"{self._text(where)}\nonly QEMU: {_some(theirs.heard.pages - expected)}\n"
                f"only the model: {_some(expected - theirs.heard.pages)}\n"
                f"known to be wrong: {_some(wrong)}"
            )
            theirs.heard.take()
            if self.counts["comparisons"] % _CHECK_WINDOWS == 0:
                assert theirs.device.pages() == theirs.heard.pages, self._text(where)
        self._check_ours()

    def _check_ours(self) -> None:
        expected = self._shared & self._plugged
        for device in (self._page, self._run):
            assert device.pages() == expected, self._text(device.mapper)
        if self._later is not None:
            assert self._later.mapped_bytes == len(expected) * PAGE_SIZE
        assert not self._twin.memory.poisoned

    def _text(self, where: object) -> str:
        return f"{where}, after\n  " + "\n  ".join(self._history)

    def summary(self) -> list[str]:
        """Say what was compared, and what was explained, one line each."""
        lines = [f"{count:>9,} {name}" for name, count in sorted(self.counts.items())]
        explained = [
            f"{count:>9,} explained, {name}: {EXPLAINED[name]}"
            for name, count in sorted(self.explained.items())
        ]
        return [*lines, *explained]


def _some(pages: set[int]) -> str:
    ranges = [f"[{start:#x}, {start + size:#x})" for start, size in runs_of(pages)]
    return ", ".join(ranges[:5]) + (" ..." if len(ranges) > 5 else "") or "none"
