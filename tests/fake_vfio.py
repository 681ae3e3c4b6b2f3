"""
A kernel's VFIO and iommufd in a few lines, in the place of ``ramblock.uapi.ioctl.call``.

What it refuses, and how far it gets before, is what Linux 7.3 does:
drivers/vfio/vfio_iommu_type1.c, drivers/iommu/iommufd/ ioas.c, io_pagetable.c and vfio_compat.c.
Device files are stood in for by /dev/null.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ramblock.uapi import iommufd as i
from ramblock.uapi import vfio as v

__all__ = ["BAR_SIZE", "Areas", "FakeKernel", "make_device"]

PAGE = 4096
BAR_SIZE = 0x4_0000
_IOVA_END = 1 << 48
_MSI = (0xFEE0_0000, 0xFEF0_0000)


def make_device(file: Path, vendor: int, device: int) -> Path:
    """A file in the role of a device: BAR 0 is plain memory, and config space has the IDs."""
    config = vendor.to_bytes(2, "little") + device.to_bytes(2, "little")
    file.write_bytes(bytes(BAR_SIZE) + config + bytes(252))
    return file


class Areas:
    """Disjoint mappings by their first address, as (size, where it comes from, writable)."""

    def __init__(self) -> None:
        self.by_iova: dict[int, tuple[int, str, bool]] = {}
        #: Areas that no unmap gets rid of.
        self.locked: set[int] = set()

    def touching(self, start: int, size: int) -> list[int]:
        return sorted(
            iova
            for iova, area in self.by_iova.items()
            if iova < start + size and start < iova + area[0]
        )

    def add(self, iova: int, size: int, origin: str, writable: bool) -> None:
        if not size or (iova | size) % PAGE or iova + size > _IOVA_END:
            raise OSError(errno.EINVAL, "")
        if iova < _MSI[1] and _MSI[0] < iova + size:
            raise OSError(errno.EINVAL, "")
        if self.touching(iova, size):
            raise OSError(errno.EEXIST, "")
        self.by_iova[iova] = (size, origin, writable)

    def cut(self, at: int) -> None:
        """Let no area reach over *at*."""
        for start in self.touching(at - 1, 2):
            size, origin, writable = self.by_iova[start]
            if start < at < start + size:
                self.by_iova[start] = (at - start, origin, writable)
                self.by_iova[at] = (start + size - at, origin, writable)


class FakeKernel:
    """
    :ivar areas: What is mapped, by IOAS; 0 is a type1 container.
    :ivar calls: Names of the calls, oldest first.
    :ivar refuse: Errno for a call of that name, before it does anything.
    :ivar answers: What a call of that name returns, without doing anything.
    :ivar fail_at: 1-based number of the call that fails with EIO, before it does anything.
    """

    def __init__(self) -> None:
        self.areas: dict[int, Areas] = {}
        self.groups_in_container: set[int] = set()
        self.calls: list[str] = []
        self.refuse: dict[str, int] = {}
        self.answers: dict[str, int] = {}
        self.fail_at: int | None = None
        self.limit = 65535
        self.viable = True
        self.cuts = True
        self.write_back_fails = False
        #: What a device's descriptor leads to; see :func:`make_device`.
        self.device_file = Path(os.devnull)
        self.device_flags = 3
        self.attached: int | None = None
        self._small_pages: set[int] = set()
        self.iova_alignment = 1
        self._compat: int | None = None
        self._next = 1
        self._handlers: dict[int, Callable[[int, Any], int | None]] = {}
        for name in dir(self):
            if name.isupper():
                number = getattr(v, name, None) or getattr(i, name)
                self._handlers[number] = getattr(self, name)

    def reaches(self, ioas: int, iova: int) -> bool:
        """Whether a device behind an IOAS, or a container (0), can write there."""
        areas = self.areas.get(ioas, Areas()).by_iova
        return any(at <= iova < at + size and writable for at, (size, _, writable) in areas.items())

    def call(self, fd: int, request: int, argument: Any = 0) -> int:
        os.fstat(fd)  # EBADF
        handler = self._handlers[request]
        name = handler.__name__
        self.calls.append(name)
        if name in self.refuse:
            raise OSError(self.refuse[name], "")
        if self.fail_at == len(self.calls):
            raise OSError(errno.EIO, "")
        if name in self.answers:
            return self.answers[name]
        return handler(fd, argument) or 0

    # -- groups and containers ---------------------------------------------------------------------

    def VFIO_GET_API_VERSION(self, fd: int, argument: Any) -> int:
        return 0

    def VFIO_CHECK_EXTENSION(self, fd: int, argument: int) -> int:
        return int(argument in (3, 9))

    def VFIO_GROUP_GET_STATUS(self, fd: int, argument: v.GroupStatus) -> None:
        argument.flags = int(self.viable)

    def VFIO_GROUP_SET_CONTAINER(self, fd: int, argument: Any) -> None:
        os.fstat(ctypes.c_int32.from_buffer(argument).value)
        self.groups_in_container.add(fd)

    def VFIO_GROUP_UNSET_CONTAINER(self, fd: int, argument: Any) -> None:
        self.groups_in_container.remove(fd)
        if not self.groups_in_container:
            self.areas.pop(0, None)

    def VFIO_SET_IOMMU(self, fd: int, argument: int) -> None:
        if not self.groups_in_container:
            raise OSError(errno.EINVAL, "")
        self.areas[0] = Areas()

    # -- devices -----------------------------------------------------------------------------------

    def VFIO_GROUP_GET_DEVICE_FD(self, fd: int, argument: Any) -> int:
        return os.open(self.device_file, os.O_RDWR | os.O_CLOEXEC)

    def VFIO_DEVICE_BIND_IOMMUFD(self, fd: int, argument: v.DeviceBindIommufd) -> None:
        os.fstat(argument.iommufd)

    def VFIO_DEVICE_ATTACH_IOMMUFD_PT(self, fd: int, argument: v.DeviceAttachIommufd) -> None:
        assert argument.pt_id in self.areas
        if self.attached is not None:
            raise OSError(errno.EBUSY, "")
        self.attached = argument.pt_id

    def VFIO_DEVICE_DETACH_IOMMUFD_PT(self, fd: int, argument: v.DeviceDetachIommufd) -> None:
        self.attached = None

    def VFIO_DEVICE_GET_INFO(self, fd: int, argument: v.DeviceInfo) -> None:
        argument.flags, argument.num_regions = self.device_flags, 9

    def VFIO_DEVICE_GET_REGION_INFO(self, fd: int, argument: Any) -> None:
        info = v.RegionInfo.from_buffer(argument)
        if info.index > 8:
            raise OSError(errno.EINVAL, "")
        # BAR 0 and config space, one behind the other; of BAR 2 nothing can be mapped into the
        # process.
        layout = {0: (BAR_SIZE, 0, 7), 2: (PAGE, 0, 3), 7: (256, BAR_SIZE, 3)}
        info.size, info.offset, info.flags = layout.get(info.index, (0, 0, 0))

    def VFIO_DEVICE_RESET(self, fd: int, argument: int) -> None: ...

    def VFIO_IOMMU_GET_INFO(self, fd: int, argument: Any) -> None:
        info = v.Type1Info.from_buffer(argument)
        head = ctypes.sizeof(v.Type1Info)
        size = head + 16 + 16 + 2 * 16
        info.flags, info.iova_pgsizes = 3, 0x4020_1000
        asked, info.argsz = info.argsz, size
        if asked < size:
            return
        info.cap_offset = head
        v.DmaAvailCapability.from_buffer(argument, head).header.id = 3
        v.DmaAvailCapability.from_buffer(argument, head).header.next = head + 16
        v.DmaAvailCapability.from_buffer(argument, head).avail = self.limit - len(
            self.areas[0].by_iova
        )
        ranges = v.IovaRangeCapability.from_buffer(argument, head + 16)
        ranges.header.id, ranges.nr_iovas = 1, 2
        for index, (start, end) in enumerate(((0, _MSI[0] - 1), (_MSI[1], _IOVA_END - 1))):
            entry = v.IovaRange.from_buffer(argument, head + 32 + 16 * index)
            entry.start, entry.end = start, end

    def VFIO_IOMMU_MAP_DMA(self, fd: int, argument: v.DmaMap) -> None:
        areas = self.areas[0]
        if len(areas.by_iova) >= self.limit and not areas.touching(argument.iova, argument.size):
            raise OSError(errno.ENOSPC, "")
        areas.add(argument.iova, argument.size, "user", bool(argument.flags & 2))

    def VFIO_IOMMU_UNMAP_DMA(self, fd: int, argument: v.DmaUnmap) -> None:
        compat = 0 not in self.areas
        ioas = (self._compat or 0) if compat else 0
        areas = self.areas[ioas]
        start, size = argument.iova, argument.size
        if argument.flags & 2:
            argument.size = sum(area[0] for area in areas.by_iova.values())
            areas.by_iova.clear()
            return
        if compat:
            if ioas in self._small_pages:
                if not self.cuts:
                    raise OSError(errno.EINVAL, "")
                areas.cut(start + size)
                areas.cut(start)
            removed, number = self._remove(areas, start, size)
            argument.size = removed
            if self.write_back_fails:
                raise OSError(errno.EFAULT, "")
            if number:
                raise OSError(number, "")
            return
        hit = areas.touching(start, size)
        if any(at < start or at + areas.by_iova[at][0] > start + size for at in hit):
            raise OSError(errno.EINVAL, "")
        argument.size = sum(areas.by_iova.pop(at)[0] for at in hit)

    def _remove(self, areas: Areas, start: int, size: int) -> tuple[int, int]:
        """
        As iopt_unmap_iova_range(): stops at the first area that does not go.

        What went before is gone.
        """
        removed = 0
        for at in areas.touching(start, size):
            if at in areas.locked:
                return removed, errno.EBUSY
            if at < start or at + areas.by_iova[at][0] > start + size:
                return removed, errno.ENOENT
            removed += areas.by_iova.pop(at)[0]
        return removed, 0

    # -- iommufd -----------------------------------------------------------------------------------

    def IOMMU_IOAS_ALLOC(self, fd: int, argument: i.IoasAlloc) -> None:
        argument.out_ioas_id = self._next
        self.areas[self._next] = Areas()
        self._next += 1

    def IOMMU_DESTROY(self, fd: int, argument: i.Destroy) -> None:
        del self.areas[argument.id]
        if self._compat == argument.id:
            self._compat = None

    def IOMMU_OPTION(self, fd: int, argument: i.IommuOption) -> None:
        assert (argument.option_id, argument.op, argument.val64) == (1, 0, 0)
        self._small_pages.add(argument.object_id)

    def IOMMU_VFIO_IOAS(self, fd: int, argument: i.VfioIoas) -> None:
        assert argument.op == 1
        assert argument.ioas_id in self.areas
        self._compat = argument.ioas_id

    def IOMMU_IOAS_IOVA_RANGES(self, fd: int, argument: i.IoasIovaRanges) -> None:
        ranges = [(0, _MSI[0] - 1), (_MSI[1], _IOVA_END - 1)]
        # Enough for a second call; nothing of ours goes there.
        ranges += [
            (_IOVA_END + gap, _IOVA_END + gap + PAGE - 1)
            for gap in range(PAGE, 77 * PAGE, 2 * PAGE)
        ]
        room, argument.num_iovas = argument.num_iovas, len(ranges)
        argument.out_iova_alignment = self.iova_alignment
        found = (i.IovaRange * room).from_address(argument.allowed_iovas)
        for index, (start, last) in enumerate(ranges[:room]):
            found[index].start, found[index].last = start, last
        if len(ranges) > room:
            raise OSError(errno.EMSGSIZE, "")

    def IOMMU_IOAS_MAP(self, fd: int, argument: i.IoasMap) -> None:
        self.areas[argument.ioas_id].add(
            argument.iova, argument.length, "user", bool(argument.flags & 2)
        )

    def IOMMU_IOAS_MAP_FILE(self, fd: int, argument: i.IoasMapFile) -> None:
        if not Path(f"/proc/self/fd/{argument.fd}").readlink().name.startswith("memfd:"):
            raise OSError(errno.EINVAL, "")
        self.areas[argument.ioas_id].add(
            argument.iova, argument.length, "file", bool(argument.flags & 2)
        )

    def IOMMU_IOAS_UNMAP(self, fd: int, argument: i.IoasUnmap) -> None:
        areas = self.areas[argument.ioas_id]
        everything = argument.length == (1 << 64) - 1
        removed, number = self._remove(areas, argument.iova, argument.length)
        if self.write_back_fails:
            raise OSError(errno.EFAULT, "")
        if number or not (removed or everything):
            raise OSError(number or errno.ENOENT, "")
        argument.length = removed
