# SPDX-License-Identifier: Apache-2.0
"""DMA targets, and the mapper that drives them."""

from ramblock.dma.mapper import Mapper
from ramblock.dma.mapping_table import Mapping
from ramblock.dma.soft import FaultRecord, SoftIommu
from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange, MappingPolicy

__all__ = [
    "DmaCapabilities",
    "DmaTarget",
    "FaultRecord",
    "HostRange",
    "Mapper",
    "Mapping",
    "MappingPolicy",
    "SoftIommu",
]
