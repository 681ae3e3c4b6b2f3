# SPDX-License-Identifier: Apache-2.0
"""
The meaning of QEMU's trace events: one translation for the text log and the binary format.

Two of them are written *before* the thing they name is done, and tell no result:
``kvm_convert_memory`` and the vfio-user ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import TypeVar

from ramblock.trace.events import (
    Attach,
    Attributes,
    Block,
    Conversion,
    Detach,
    DeviceMemory,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Region,
    Reset,
    Source,
    StateChange,
    Unmap,
    Viommu,
)
from ramblock.trace.readers.qemu_table import Reading, Value

__all__ = ["STATES", "VFIO_USER", "At", "QemuMeaning", "UnreadableError", "end_of"]

_ACK = 0  # VIRTIO_MEM_RESP_ACK, linux/virtio_mem.h
WRITABLE = 2  # VFIO_USER_DMA_REGION_WRITE; bit 0 is read
VFIO_USER = "vfio-user"
# system/ram-block-attributes.c: populated is shared. Only the state before can be a mixture. QEMU
# 11.1.3 prints these words (tests/qemu/test_steps.py holds them against the program).
STATES = {b"populated": False, b"discarded": True}
MIXTURE = b"mixture"
CONVERSIONS = {b"shared_to_private": True, b"private_to_shared": False}
_MOST = 1 << 64
#: Slots of KVM are 32,764 at most on x86 (KVM_CAP_NR_MEMSLOTS).
_MOST_SLOTS = 1 << 16
_NEEDS_BLOCK = (
    "virtio-mem requests count in blocks whose size is not in the trace, or not from its beginning:"
    " what was plugged is not known (--virtio-mem-block)"
)


class UnreadableError(Exception):
    """An event of this name, with a text that cannot be what its writer meant."""


#: Where an event was read: time, source, line, and the thread that wrote it. A tuple without names,
#: since it is made for every event.
At = tuple[int | None, Source, int, str | None]


_F = TypeVar("_F", bound=Callable[..., None])
_MEANINGS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {}


def _means(names: str, fields: str = "") -> Callable[[_F], _F]:
    """Say what some events mean, by the fields that matter; one that is absent is None."""

    def decorate(function: _F) -> _F:
        for name in names.split():
            _MEANINGS[name] = function, tuple(fields.split())
        return function

    return decorate


def end_of(start: int, size: int) -> int:
    """
    Return the end of a range.

    :raises UnreadableError: It is beyond 64 bits.
    """
    end = start + size
    if not start <= end <= _MOST:
        raise UnreadableError
    return end


class QemuMeaning:
    """
    The translation for one guest, and what it has to remember between events.

    :param virtio_mem_block_size: Bytes; None: plug requests stay unknown.
    :param needs: Gets what would tell more, by a word for it.
    """

    def __init__(self, virtio_mem_block_size: int | None, needs: dict[str, str]) -> None:
        self._block_size = virtio_mem_block_size
        self._needs = needs
        self._request: tuple[int, int, bool] | None = None
        #: A request to give back, from where and how many blocks, of a size that is not known.
        self._unsized: tuple[int, int] | None = None
        self._plugged_from: int | None = None
        self._plugged_to = 0
        self._slots: dict[tuple[int, int], Block] = {}
        self._proposed = False
        # The newest of each: QEMU's messages about failures do not name theirs.
        self.map: Map | None = None
        self.unmap: Unmap | None = None
        self.discard: Discard | None = None
        self.conversion: Conversion | None = None

    def translate(
        self, name: str, form: Reading, values: tuple[Value, ...], at: At, found: list[Event]
    ) -> None:
        """
        Append what one event means; nothing, for many.

        :raises UnreadableError: A word or a number of it is none of QEMU's. Taking it for one of
            them could turn a finding into its opposite.
        """
        function, pick = _picked(name, form)
        function(self, at, found, *pick(values))

    @_means("kvm_convert_memory", "start size msg")
    def _convert_memory(
        self, at: At, found: list[Event], start: int, size: int, word: bytes
    ) -> None:
        private = CONVERSIONS.get(word)
        if private is None:
            raise UnreadableError
        # accel/kvm/kvm-all.c, kvm_convert_memory(): traced at its entry; the attribute is the first
        # thing that it changes.
        end = end_of(start, size)
        time, source, line, thread = at
        self.conversion = Conversion(time, source, line, start, end, private, thread)
        found.append(self.conversion)
        found.append(Attributes(time, source, line, start, end, private, thread))

    @_means(
        "kvm_set_user_memory",
        "as slot guest_phys_addr memory_size userspace_addr fd fd_offset ret",
    )
    def _set_user_memory(
        self,
        at: At,
        found: list[Event],
        space: int | None,
        slot: int,
        gpa: int,
        size: int,
        host: int,
        guest_memfd: int | None,
        offset: int | None,
        result: int,
    ) -> None:
        end = end_of(gpa, size)
        if space is None:  # 7.2 has both in one number
            space, slot = slot >> 16, slot & 0xFFFF
        if result or space:
            return  # another address space (SMM) has the same memory once more
        time, source, line, _ = at
        before = self._slots.pop((space, slot), None)
        if before is not None:
            found.append(Layout(time, source, line, (before,), removed=True))
        if not size:
            return
        has_private = guest_memfd is not None and guest_memfd >= 0
        block = Block(
            name=f"slot {slot}",
            start=gpa,
            end=end,
            # To 10.1, a slot without a guest_memfd got an offset as well, which means nothing.
            offset=(offset or 0) if has_private else 0,
            # QEMU to 9.0 does not print it, whatever the guest is.
            confidential=None if guest_memfd is None else has_private,
            host=host,
            guest_memfd=guest_memfd if has_private else None,
        )
        if len(self._slots) < _MOST_SLOTS:
            self._slots[space, slot] = block
        found.append(Layout(time, source, line, (block,)))

    # A new VM: SEV's is traced before its slots, at the first start as well; the other two at each
    # reset of any confidential guest, before and behind its slots (accel/kvm/kvm-all.c,
    # kvm_reset_vmfd(); target/i386/kvm).
    @_means("kvm_sev_init kvm_arch_on_vmfd_change tdx_handle_reset")
    def _reset(self, at: At, found: list[Event]) -> None:
        found.append(Reset(*at[:3]))

    @_means("ram_block_attributes_state_change", "offset size from to")
    def _state_change(
        self, at: At, found: list[Event], offset: int, size: int, before: bytes, after: bytes
    ) -> None:
        private = STATES.get(after)
        if private is None or (before not in STATES and before != MIXTURE):
            raise UnreadableError
        found.append(StateChange(*at[:3], None, offset, end_of(offset, size), private))

    # The private side is given back without an event (system/physmem.c,
    # ram_block_discard_guest_memfd_range()).
    @_means("ram_block_discard_range ram_block_discard_shared_range", "hva length ret")
    def _discard(self, at: At, found: list[Event], host: int, size: int, result: int) -> None:
        time, source, line, _ = at
        end = end_of(host, size)
        if self._unsized is not None:
            self._learn_block_size(at, found, size)
        self.discard = Discard(time, source, line, host, end, host=host, done=result == 0)
        found.append(self.discard)

    def _learn_block_size(self, at: At, found: list[Event], size: int) -> None:
        """Take the block size from the memory that is given back for a request of so many."""
        assert self._unsized is not None
        start, blocks = self._unsized
        self._unsized = None
        block, rest = divmod(size, blocks) if blocks > 0 else (0, 1)
        if not rest and block and not block & (block - 1):
            self._block_size = block
            self._ask(at, found, start, blocks, plugged=False)

    @_means(
        "iommufd_backend_map_dma iommufd_backend_map_file_dma",
        "iommufd ioas iova size vaddr readonly ret",
    )
    def _map_dma(
        self,
        at: At,
        found: list[Event],
        fd: int,
        ioas: int,
        iova: int,
        size: int,
        host: int | None,
        readonly: int,
        result: int,
    ) -> None:
        end = end_of(iova, size)
        time, source, line, _ = at
        self.map = Map(
            time, source, line, _ioas(fd, ioas), iova, end, not readonly, result == 0, None, host
        )
        found.append(self.map)

    @_means("iommufd_backend_unmap_dma", "iommufd ioas iova size ret")
    def _unmap_dma(
        self, at: At, found: list[Event], fd: int, ioas: int, iova: int, size: int, result: int
    ) -> None:
        end = end_of(iova, size)
        # A native IOMMU_IOAS_UNMAP that succeeds has removed all that was there, in whole mappings.
        self.unmap = Unmap(*at[:3], _ioas(fd, ioas), iova, end, None, result == 0)
        found.append(self.unmap)

    @_means("iommufd_backend_unmap_dma_non_exist", "iommufd ioas iova size")
    def _unmap_dma_non_exist(
        self, at: At, found: list[Event], fd: int, ioas: int, iova: int, size: int
    ) -> None:
        # backends/iommufd.c: written in place of the other when the kernel says ENOENT, which QEMU
        # takes for success. The kernel says it too when the range cuts a mapping in two, and that
        # mapping stays (iopt_unmap_iova_range).
        self.unmap = Unmap(*at[:3], _ioas(fd, ioas), iova, end_of(iova, size), 0)
        found.append(self.unmap)

    @_means("iommufd_backend_alloc_ioas", "iommufd ioas ret")
    def _alloc_ioas(
        self, at: At, found: list[Event], fd: int, ioas: int, result: int | None
    ) -> None:
        if not result:
            found.append(Attach(*at[:3], _ioas(fd, ioas)))

    @_means("iommufd_backend_free_id", "iommufd id ret")
    def _free_id(self, at: At, found: list[Event], fd: int, ioas: int, result: int) -> None:
        if not result:
            found.append(Detach(*at[:3], _ioas(fd, ioas)))

    @_means("vfio_user_version")
    def _version(self, at: At, found: list[Event]) -> None:
        # hw/vfio-user/proxy.c, vfio_user_validate_version(): the proposal, then the server's
        # answer once it is accepted. No other device can come between.
        self._proposed = not self._proposed
        if not self._proposed:
            found.append(Attach(*at[:3], VFIO_USER))

    @_means("vfio_user_dma_map", "iova size flags")
    def _vfio_user_map(self, at: At, found: list[Event], iova: int, size: int, flags: int) -> None:
        end = end_of(iova, size)
        self.map = Map(*at[:3], VFIO_USER, iova, end, bool(flags & WRITABLE))
        found.append(self.map)

    @_means("vfio_user_dma_unmap", "iova size")
    def _vfio_user_unmap(self, at: At, found: list[Event], iova: int, size: int) -> None:
        self.unmap = Unmap(*at[:3], VFIO_USER, iova, end_of(iova, size))
        found.append(self.unmap)

    @_means("vfio_listener_region_add_ram", "iova_start iova_end vaddr")
    def _region_add(self, at: At, found: list[Event], start: int, last: int, host: int) -> None:
        found.append(Region(*at[:3], start, _behind(start, last), added=True, host=host))

    @_means("vfio_listener_region_del", "start end")
    def _region_del(self, at: At, found: list[Event], start: int, last: int) -> None:
        found.append(Region(*at[:3], start, _behind(start, last), added=False))

    @_means("vfio_region_dmabuf", "size")
    def _device_memory(self, at: At, found: list[Event], size: int) -> None:
        found.append(DeviceMemory(*at[:3], size))

    @_means("vfio_listener_region_add_iommu vfio_iommu_map_notify")
    def _viommu(self, at: At, found: list[Event]) -> None:
        found.append(Viommu(*at[:3]))

    # virtio-mem (hw/virtio/virtio-mem.c): the request is traced when it comes, the response when
    # everything is done or refused.

    @_means("virtio_mem_plug_request", "addr nb_blocks")
    def _plug_request(self, at: At, found: list[Event], start: int, blocks: int) -> None:
        self._ask(at, found, start, blocks, plugged=True)

    @_means("virtio_mem_unplug_request", "addr nb_blocks")
    def _unplug_request(self, at: At, found: list[Event], start: int, blocks: int) -> None:
        self._ask(at, found, start, blocks, plugged=False)

    def _ask(self, at: At, found: list[Event], start: int, blocks: int, *, plugged: bool) -> None:
        if self._block_size is None:
            self._needs["virtio-mem"] = _NEEDS_BLOCK
            # How much is not known; that the block is virtio-mem's is.
            self._unsized = None if plugged else (start, blocks)
            found.append(PlugRequest(*at[:3], start, start, plugged))
            return
        end = end_of(start, blocks * self._block_size)
        if end == start:
            return
        self._request = start, end, plugged
        found.append(PlugRequest(*at[:3], start, end, plugged))

    @_means("virtio_mem_send_response", "type")
    def _response(self, at: At, found: list[Event], kind: int) -> None:
        request, self._request = self._request, None
        if request is None:
            return
        start, end, plugged = request
        if kind == _ACK and plugged:
            first = self._plugged_from
            self._plugged_from = start if first is None else min(first, start)
            self._plugged_to = max(self._plugged_to, end)
        found.append(Plug(*at[:3], start, end, plugged, kind == _ACK))

    @_means("virtio_mem_unplugged_all")
    def _unplugged_all(self, at: At, found: list[Event]) -> None:
        # Where the region begins is not in the trace: what was ever plugged is in between.
        if self._plugged_from is not None:
            found.append(Plug(*at[:3], self._plugged_from, self._plugged_to, plugged=False))


@lru_cache(256)
def _picked(
    name: str, form: Reading
) -> tuple[Callable[..., None], Callable[[tuple[Value, ...]], Sequence[Value | None]]]:
    """Return an event's meaning, and what takes its fields out of those of a form."""
    function, fields = _MEANINGS[name]
    places = [form.fields.index(field) if field in form.fields else None for field in fields]
    if len(places) > 1 and None not in places:
        return function, itemgetter(*places)
    return function, lambda values: [None if place is None else values[place] for place in places]


@lru_cache(256)
def _ioas(fd: int, ioas: int) -> str:
    return f"iommufd={fd} ioas={ioas}"


def _behind(start: int, last: int) -> int:
    """Return the end of a range whose last byte is told."""
    if last < start:
        raise UnreadableError
    return last + 1
