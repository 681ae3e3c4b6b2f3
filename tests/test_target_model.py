"""
The software IOMMU beside the naive model that the kernel's targets are compared with in tests/vfio
and in the lab.
"""

from functools import partial

import pytest
from hypothesis import given

from ramblock import RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import IommuFault
from ramblock.units import PAGE_SIZE
from target_model import PAGES, Cutting, Step, TargetModel, play, steps

TARGETS = {
    Cutting.ANYTHING: partial(SoftIommu, cut=True),
    Cutting.WHOLE_MAPPINGS: partial(SoftIommu, cut=False),
    Cutting.ONE_MAPPING: partial(SoftIommu, exact=True),
}


@pytest.mark.parametrize("cutting", Cutting)
@given(todo=steps())
def test_the_software_iommu(cutting: Cutting, todo: list[Step]) -> None:
    iommu = TARGETS[cutting]()

    def reaches(iova: int) -> bool:
        try:
            iommu.write(iova, b"x")
        except IommuFault:
            return False
        return True

    with RamBlock.create("ram", PAGES * PAGE_SIZE) as block:
        play(iommu, TargetModel(cutting), block, todo, 1 << 32, reaches)
        assert iommu.mappings() == []
