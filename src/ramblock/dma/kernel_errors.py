# SPDX-License-Identifier: Apache-2.0
"""
Meanings of errnos from VFIO and iommufd, with hints: one table.

An errno alone says little ("Cannot allocate memory" is RLIMIT_MEMLOCK nearly always), so each entry
has the meaning for its calls and, where there is something to do, a hint with values read back from
this host.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ramblock.dma.vfio_facts import group_members, locked_memory, module_parameter
from ramblock.errors import DmaError, describe_range
from ramblock.units import format_size

__all__ = ["TABLE", "Advice", "KernelRefusal", "Refused", "meaning", "refusal"]


class Refused(NamedTuple):
    """A call that the kernel refused."""

    call: str
    """Its name in the kernel's headers, or ``open`` and the opened file's kind."""
    errno: int
    iova: int | None = None
    size: int | None = None
    group: int | None = None
    """The IOMMU group that the call is about."""
    root: Path = Path("/")
    """Where /sys and /proc are."""


class Advice(NamedTuple):
    """The meaning of *errno* for *calls*."""

    calls: tuple[str, ...]
    errno: int
    meaning: str
    hint: Callable[[Refused], str | None] | None = None


class KernelRefusal(DmaError):
    """
    The kernel refused a call of VFIO or iommufd.

    :ivar call: Its name in the kernel's headers, or ``open`` and the opened file's kind.
    :ivar hint: None where none is known.
    """

    def __init__(
        self,
        number: int,
        text: str,
        *,
        call: str,
        hint: str | None,
        iova: int | None,
        size: int | None,
        in_doubt: bool,
    ) -> None:
        super().__init__(number, text, iova=iova, size=size, in_doubt=in_doubt)
        self.call = call
        self.hint = hint


def _memlock(refused: Refused) -> str | None:
    limit, locked, pinned, exempt = locked_memory(root=refused.root)
    if exempt:
        return (
            "RLIMIT_MEMLOCK does not count with CAP_IPC_LOCK:"
            " look at the memory limit of the control group"
        )
    if limit is None:
        return None
    held = locked if refused.call == "VFIO_IOMMU_MAP_DMA" else pinned
    needed = "" if refused.size is None else f", at least {format_size(held + refused.size)} needed"
    return (
        f"RLIMIT_MEMLOCK is {format_size(limit)}, {format_size(held)} of it in use{needed}: "
        "raise it (ulimit -l, LimitMEMLOCK=) or grant CAP_IPC_LOCK"
    )


def _entry_limit(refused: Refused) -> str:
    now = module_parameter("vfio_iommu_type1", "dma_entry_limit", root=refused.root)
    return (
        f"vfio_iommu_type1.dma_entry_limit is {now or 'not readable'} now;"
        " a container keeps the value that its first group found: "
        "raise it and open a new one, or use iommufd, which has no limit"
    )


def _unsafe_interrupts(refused: Refused) -> str:
    module = "iommufd" if refused.call == "VFIO_DEVICE_BIND_IOMMUFD" else "vfio_iommu_type1"
    now = module_parameter(module, "allow_unsafe_interrupts", root=refused.root)
    return (
        f"{module}.allow_unsafe_interrupts is {now or 'not readable'};"
        " without interrupt remapping it has to be Y" + _members(refused, "; ")
    )


def _members(refused: Refused, prefix: str = "") -> str:
    if refused.group is None:
        return ""
    members = ", ".join(map(str, group_members(refused.group, root=refused.root)))
    return f"{prefix}IOMMU group {refused.group} has {members or 'no devices'}"


def _viability(refused: Refused) -> str:
    return "each device of the group has to be without a driver or with a VFIO one" + _members(
        refused, "; "
    )


def _text(hint: str) -> Callable[[Refused], str]:
    return lambda _: hint


_MAP = ("VFIO_IOMMU_MAP_DMA", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE")
_UNMAP = ("VFIO_IOMMU_UNMAP_DMA", "IOMMU_IOAS_UNMAP")
_ATTACH = ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU")
_CONTAINER, _IOMMUFD = ("open /dev/vfio/vfio",), ("open /dev/iommu",)
_GROUP, _CDEV = ("open VFIO group",), ("open VFIO device",)

# Sources: drivers/vfio/vfio_iommu_type1.c, vfio_dma_do_map() and vfio_dma_do_unmap();
# drivers/iommu/iommufd/io_pagetable.c, iopt_check_iova(), iopt_area_split(),
# iopt_unmap_iova_range(); pages.c, incr_user_locked_vm(); device.c, iommufd_bind_iommu();
# drivers/iommu/iommu.c, iommu_group_claim_dma_owner(); drivers/vfio/group.c, container.c,
# device_cdev.c.
TABLE = (
    Advice(_MAP, errno.ENOMEM, "the memory cannot be pinned", _memlock),
    Advice(_ATTACH, errno.ENOMEM, "existing mappings cannot be pinned", _memlock),
    Advice(_MAP, errno.ENOSPC, "all mappings of the container are in use", _entry_limit),
    Advice(_MAP, errno.EEXIST, "a part of it is mapped already"),
    Advice(_MAP, errno.EINVAL, "not aligned to the IOMMU's pages, or outside the usable addresses"),
    Advice(_MAP, errno.EFAULT, "the host memory is not mapped, or read-only"),
    Advice(_MAP, errno.EOVERFLOW, "it goes past the last address"),
    Advice(
        _UNMAP[:1], errno.EINVAL, "it is not aligned, or would cut a mapping, or no group is there"
    ),
    Advice(_UNMAP, errno.ENOENT, "nothing is mapped there, or it would cut a mapping"),
    Advice(_UNMAP, errno.EBUSY, "a mapping is locked, or is being changed by somebody else"),
    Advice(_UNMAP, errno.EDEADLK, "a user in the kernel does not let go of it"),
    Advice(_UNMAP, errno.ENOMEM, "no memory for the rest of a mapping that would be cut"),
    Advice(
        ("VFIO_SET_IOMMU", "VFIO_DEVICE_BIND_IOMMUFD"),
        errno.EPERM,
        "interrupts of the device cannot be isolated, or the group belongs to somebody else",
        _unsafe_interrupts,
    ),
    Advice(
        ("VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_BIND_IOMMUFD"),
        errno.EBUSY,
        "a device of the group is in use by the kernel or by another process",
        _viability,
    ),
    Advice(
        ("VFIO_GROUP_SET_CONTAINER",),
        errno.EPERM,
        "the group belongs to somebody else already",
        _viability,
    ),
    Advice(
        ("VFIO_GROUP_GET_STATUS",), errno.EBUSY, "the group is not viable", _viability
    ),  # our own answer to a status without VFIO_GROUP_FLAGS_VIABLE
    Advice(
        ("VFIO_SET_IOMMU",), errno.ENODEV, "no IOMMU driver takes the group",
        _text("type1 needs the module vfio_iommu_type1 and an IOMMU"),
    ),
    Advice(
        ("VFIO_GROUP_GET_DEVICE_FD",), errno.ENODEV, "the device is not in this group with VFIO",
        _text("bind it to vfio-pci first (ramblock.vfio.bind_to_vfio)"),
    ),
    Advice(
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT",), errno.EADDRINUSE,
        "something is mapped at addresses that the device cannot use",
    ),
    Advice(
        ("VFIO_DEVICE_BIND_IOMMUFD",), errno.EINVAL,
        "it is bound already, or its IOMMU does not keep caches coherent",
    ),
    Advice(
        ("IOMMU_OPTION",), errno.EINVAL,
        "large pages cannot be switched off once something is mapped",
    ),
    Advice(
        _CONTAINER, errno.ENOENT, "there is no VFIO container",
        _text("the kernel needs CONFIG_VFIO_CONTAINER, and the module vfio loaded"),
    ),
    Advice(
        _IOMMUFD, errno.ENOENT, "there is no iommufd",
        _text("the kernel needs CONFIG_IOMMUFD, and the module iommufd loaded"),
    ),
    Advice(
        _GROUP, errno.ENOENT, "no device of the group is bound to a VFIO driver", _viability
    ),
    Advice(
        _CDEV, errno.ENOENT, "the device has no character device of its own",
        _text("bind it to vfio-pci; the kernel needs CONFIG_VFIO_DEVICE_CDEV"),
    ),
    Advice(
        _GROUP, errno.EBUSY,
        "the group is open already, or one of its devices is through its character device",
    ),
    Advice(_CDEV + _GROUP, errno.ENODEV, "the device has just been unbound from VFIO"),
    Advice(
        _CONTAINER + _IOMMUFD + _GROUP + _CDEV, errno.EACCES, "this user may not open it",
        _text("give the user access to the device file (udev rule), or be root"),
    ),
)  # fmt: skip

_BY_CALL = {(call, advice.errno): advice for advice in TABLE for call in advice.calls}


def meaning(call: str, number: int) -> str:
    """
    Return the meaning of an errno for a call, without the values of this host.

    :raises KeyError: The table has none.
    """
    return _BY_CALL[call, number].meaning


def refusal(
    refused: Refused, *, detail: str | None = None, in_doubt: bool = False
) -> KernelRefusal:
    """
    Build the error for a refused call: call, range in hex, errno, meaning, hint.

    :param detail: Facts of the caller beyond the table, for instance the usable addresses.
    :param in_doubt: Whether the call may have done a part of its work.
    """
    call, number, iova, size = refused[:4]
    where = "" if iova is None or size is None else f" {describe_range(iova, size)}"
    advice = _BY_CALL.get((call, number))
    hint = advice.hint(refused) if advice is not None and advice.hint is not None else None
    parts = (advice.meaning if advice is not None else None, detail, hint)
    text = "; ".join([os.strerror(number), *filter(None, parts)])
    return KernelRefusal(
        number,
        f"{call}{where}: {text}",
        call=call,
        hint=hint or None,
        iova=iova,
        size=size,
        in_doubt=in_doubt,
    )
