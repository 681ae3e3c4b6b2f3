# SPDX-License-Identifier: Apache-2.0
"""
The meaning of QEMU's trace events: one translation for the text log and the binary format.

Two of them are written *before* the thing they name is done, and tell no result:
``kvm_convert_memory`` and the vfio-user ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ramblock.errors import TraceError
from ramblock.trace.events import (
    Attach,
    Attributes,
    Block,
    Conversion,
    Detach,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Source,
    StateChange,
    Unmap,
)
from ramblock.trace.reader import trace_error

__all__ = ["QemuEvents"]

_ACK = 0  # VIRTIO_MEM_RESP_ACK, linux/virtio_mem.h
_WRITABLE = 2  # VFIO_USER_DMA_REGION_WRITE; bit 0 is read
_VFIO_USER = "vfio-user"
# system/ram-block-attributes.c: populated is shared. Only the state before can be a mixture. QEMU
# 11.1.3 prints these words (tests/qemu/test_steps.py holds them against the program).
_STATES = {b"populated": False, b"discarded": True}
_MIXTURE = b"mixture"
_NEEDS_BLOCK = (
    "virtio-mem requests count in blocks whose size is not in the trace: what was plugged is not"
    " known (--virtio-mem-block)"
)


class QemuEvents:
    """
    The translation, and what it has to remember between events.

    :param virtio_mem_block_size: Bytes; None: plug requests stay unknown.
    """

    def __init__(self, source: Source, virtio_mem_block_size: int | None) -> None:
        self._source = source
        self._block_size = virtio_mem_block_size
        self._request: tuple[int, int, bool] | None = None
        self._plugged_from: int | None = None
        self._plugged_to = 0
        self._slots: dict[tuple[int, int], Block] = {}
        #: Target of the newest unmap: QEMU's messages about failures do not name theirs.
        self.last_target = _VFIO_USER
        #: What would tell more, by a word for it.
        self.needs: dict[str, str] = {}
        self._makers: dict[str, Callable[..., list[Event]]] = {
            "kvm_convert_memory": self._convert_memory,
            "kvm_set_user_memory": self._set_user_memory,
            "ram_block_attributes_state_change": self._state_change,
            "ram_block_discard_range": self._discard,
            "ram_block_discard_shared_range": self._discard,
            "ram_block_discard_guest_memfd_range": self._discard_private,
            "iommufd_backend_map_dma": self._map_dma,
            "iommufd_backend_map_file_dma": self._map_file_dma,
            "iommufd_backend_unmap_dma": self._unmap_dma,
            "iommufd_backend_unmap_dma_non_exist": self._unmap_dma_non_exist,
            "iommufd_backend_alloc_ioas": self._alloc_ioas,
            "iommufd_backend_free_id": self._free_id,
            "vfio_user_dma_map": self._vfio_user_map,
            "vfio_user_dma_unmap": self._vfio_user_unmap,
            "virtio_mem_plug_request": self._plug_request,
            "virtio_mem_unplug_request": self._unplug_request,
            "virtio_mem_send_response": self._response,
            "virtio_mem_unplugged_all": self._unplugged_all,
        }

    def translate(
        self, name: str, time: int | None, line: int, values: tuple[Any, ...]
    ) -> list[Event]:
        """
        Say what one event means; nothing, for many.

        :raises TraceError: A word of it is none of QEMU's. Taking it for one of them could turn a
            finding into its opposite.
        """
        make = self._makers.get(name)
        return [] if make is None else make(time, line, *values)

    def _convert_memory(
        self, time: int | None, line: int, start: int, size: int, what: bytes
    ) -> list[Event]:
        # accel/kvm/kvm-all.c, kvm_convert_memory(): traced at its entry; the attribute is the first
        # thing that it changes.
        private = what == b"shared_to_private"
        end = start + size
        return [
            Conversion(time, self._source, line, start, end, private),
            Attributes(time, self._source, line, start, end, private),
        ]

    def _set_user_memory(
        self,
        time: int | None,
        line: int,
        space: int,
        slot: int,
        _flags: int,
        gpa: int,
        size: int,
        host: int,
        guest_memfd: int,
        offset: int,
        result: int,
    ) -> list[Event]:
        if result or space:
            return []  # another address space (SMM) has the same memory once more
        before = self._slots.pop((space, slot), None)
        events: list[Event] = []
        if before is not None:
            events.append(Layout(time, self._source, line, (before,), removed=True))
        if size:
            block = Block(
                name=f"slot {slot}",
                start=gpa,
                end=gpa + size,
                offset=offset,
                confidential=guest_memfd >= 0,
                host=host,
            )
            self._slots[space, slot] = block
            events.append(Layout(time, self._source, line, (block,)))
        return events

    def _state_change(
        self, time: int | None, line: int, offset: int, size: int, before: bytes, after: bytes
    ) -> list[Event]:
        if before not in _STATES and before != _MIXTURE:
            raise self._unknown_word(line, before, "discarded, populated or mixture")
        private = _STATES.get(after)
        if private is None:
            raise self._unknown_word(line, after, "discarded or populated")
        return [StateChange(time, self._source, line, None, offset, offset + size, private)]

    def _unknown_word(self, line: int, word: bytes, expected: str) -> TraceError:
        text = word.decode(errors="backslashreplace")
        return trace_error(
            self._source,
            line,
            f"ram_block_attributes_state_change: unknown state {text!r}, expected {expected}",
        )

    def _discard(
        self,
        time: int | None,
        line: int,
        _name: bytes,
        host: int,
        size: int,
        _madvise: int,
        _fallocate: int,
        result: int,
    ) -> list[Event]:
        return [Discard(time, self._source, line, host, host + size, host=host, done=result == 0)]

    def _discard_private(
        self, time: int | None, line: int, _name: bytes, host: int, size: int, *results: int
    ) -> list[Event]:
        done = results[-1] == 0
        return [
            Discard(time, self._source, line, host, host + size, shared=False, host=host, done=done)
        ]

    def _map_dma(
        self,
        time: int | None,
        line: int,
        fd: int,
        ioas: int,
        iova: int,
        size: int,
        host: int,
        readonly: int,
        result: int,
    ) -> list[Event]:
        return [
            Map(
                time,
                self._source,
                line,
                _ioas(fd, ioas),
                iova,
                iova + size,
                writable=not readonly,
                done=result == 0,
                host=host,
            )
        ]

    def _map_file_dma(
        self,
        time: int | None,
        line: int,
        fd: int,
        ioas: int,
        iova: int,
        size: int,
        _file: int,
        _start: int,
        readonly: int,
        result: int,
    ) -> list[Event]:
        return [
            Map(
                time,
                self._source,
                line,
                _ioas(fd, ioas),
                iova,
                iova + size,
                writable=not readonly,
                done=result == 0,
            )
        ]

    def _unmap_dma(
        self, time: int | None, line: int, fd: int, ioas: int, iova: int, size: int, result: int
    ) -> list[Event]:
        self.last_target = target = _ioas(fd, ioas)
        # A native IOMMU_IOAS_UNMAP that succeeds has removed all that was there, in whole mappings.
        return [Unmap(time, self._source, line, target, iova, iova + size, done=result == 0)]

    def _unmap_dma_non_exist(
        self, time: int | None, line: int, fd: int, ioas: int, iova: int, size: int, _result: int
    ) -> list[Event]:
        # backends/iommufd.c: written in place of the other when the kernel says ENOENT, which QEMU
        # takes for success. The kernel says it
        # too when the range cuts a mapping in two, and that mapping stays (iopt_unmap_iova_range).
        self.last_target = target = _ioas(fd, ioas)
        return [Unmap(time, self._source, line, target, iova, iova + size, unmapped=0)]

    def _alloc_ioas(self, time: int | None, line: int, fd: int, ioas: int) -> list[Event]:
        return [Attach(time, self._source, line, _ioas(fd, ioas))]

    def _free_id(self, time: int | None, line: int, fd: int, ioas: int, result: int) -> list[Event]:
        return [] if result else [Detach(time, self._source, line, _ioas(fd, ioas))]

    def _vfio_user_map(
        self, time: int | None, line: int, iova: int, size: int, _off: int, flags: int, _async: int
    ) -> list[Event]:
        return [
            Map(
                time,
                self._source,
                line,
                _VFIO_USER,
                iova,
                iova + size,
                writable=bool(flags & _WRITABLE),
            )
        ]

    def _vfio_user_unmap(
        self, time: int | None, line: int, iova: int, size: int, _flags: int, _async: int
    ) -> list[Event]:
        self.last_target = _VFIO_USER
        return [Unmap(time, self._source, line, _VFIO_USER, iova, iova + size)]

    # virtio-mem (hw/virtio/virtio-mem.c): the request is traced when it comes, the response when
    # everything is done or refused.

    def _plug_request(self, time: int | None, line: int, start: int, blocks: int) -> list[Event]:
        return self._ask(time, line, start, blocks, plugged=True)

    def _unplug_request(self, time: int | None, line: int, start: int, blocks: int) -> list[Event]:
        return self._ask(time, line, start, blocks, plugged=False)

    def _ask(
        self, time: int | None, line: int, start: int, blocks: int, *, plugged: bool
    ) -> list[Event]:
        if self._block_size is None:
            self.needs["virtio-mem"] = _NEEDS_BLOCK
            return []
        end = start + blocks * self._block_size
        if end <= start:
            return []
        self._request = start, end, plugged
        return [PlugRequest(time, self._source, line, start, end, plugged)]

    def _response(self, time: int | None, line: int, kind: int) -> list[Event]:
        request, self._request = self._request, None
        if request is None:
            return []
        start, end, plugged = request
        if kind != _ACK:
            return [Plug(time, self._source, line, start, end, plugged, done=False)]
        if plugged:
            first = self._plugged_from
            self._plugged_from = start if first is None else min(first, start)
            self._plugged_to = max(self._plugged_to, end)
        return [Plug(time, self._source, line, start, end, plugged)]

    def _unplugged_all(self, time: int | None, line: int) -> list[Event]:
        # Where the region begins is not in the trace: what was ever plugged is in between.
        if self._plugged_from is None:
            return []
        return [Plug(time, self._source, line, self._plugged_from, self._plugged_to, plugged=False)]


def _ioas(fd: int, ioas: int) -> str:
    return f"iommufd={fd} ioas={ioas}"
