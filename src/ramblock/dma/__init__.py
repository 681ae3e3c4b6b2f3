# SPDX-License-Identifier: Apache-2.0
"""
DMA targets, and the mapper that drives them.

Targets outside this process are imported when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ramblock.dma.mapper import Mapper
from ramblock.dma.soft import FaultRecord, Mapping, SoftIommu
from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange, MappingPolicy

if TYPE_CHECKING:
    from ramblock.dma.iommufd import IommufdIoas, IommufdMode
    from ramblock.dma.type1 import Type1Container
    from ramblock.dma.vfio_group import VfioGroup
    from ramblock.dma.vfio_user import VfioUserTarget

__all__ = [
    "DmaCapabilities",
    "DmaTarget",
    "FaultRecord",
    "HostRange",
    "IommufdIoas",
    "IommufdMode",
    "Mapper",
    "Mapping",
    "MappingPolicy",
    "SoftIommu",
    "Type1Container",
    "VfioGroup",
    "VfioUserTarget",
]

# They bring the kernel's structures or sockets along, which `ramblock --help` and a software IOMMU
# can do without.
_LATER = {
    "IommufdIoas": "iommufd",
    "IommufdMode": "iommufd",
    "Type1Container": "type1",
    "VfioGroup": "vfio_group",
    "VfioUserTarget": "vfio_user",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
