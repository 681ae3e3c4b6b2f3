import pytest

from ramblock import PageState
from ramblock.dma import HostRange, SoftIommu
from ramblock.testing import GuestModel, pages_of

PAGE = 4096
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


@pytest.fixture
def model() -> GuestModel:
    model = GuestModel()
    model.add_block("low", 4 * PAGE)
    model.add_block("high", 2 * PAGE)
    model.map("low", 16 * PAGE, offset=PAGE, size=2 * PAGE)
    model.map("high", 18 * PAGE)
    return model


def pages(*numbers: int) -> set[int]:
    return {number * PAGE for number in numbers}


def test_everything_begins_private(model: GuestModel) -> None:
    assert model.pages() == model.private() == pages(16, 17, 18, 19)
    assert model.populated() == model.shared() == set()
    assert model.state(17 * PAGE) is PRIVATE


def test_a_conversion_goes_where_the_sections_say(model: GuestModel) -> None:
    model.convert(17 * PAGE, 2 * PAGE, SHARED)
    assert model.populated() == pages(17, 18)
    assert (model.populated_in("low"), model.populated_in("high")) == (pages(2), pages(0))
    model.convert(16 * PAGE, 2 * PAGE, PRIVATE)
    assert model.shared() == pages(18)


def test_ordinary_memory_is_shared(model: GuestModel) -> None:
    model.add_block("rom", PAGE, confidential=False)
    model.map("rom", 0)
    assert model.populated() == pages(0)
    assert model.state(0) is SHARED


def test_virtio_mem_and_other_sources_have_a_say(model: GuestModel) -> None:
    model.convert(16 * PAGE, 2 * PAGE, SHARED)
    model.add_virtio_mem("low")
    assert model.populated() == set()
    model.plug("low", 0, 2 * PAGE)
    assert model.populated() == pages(16)
    assert model.used_privately_in("low") == pages(0)
    model.blocks["low"].sources["balloon"] = pages(0)
    assert model.populated() == set()
    assert model.used_privately_in("low") == pages(0)
    del model.blocks["low"].sources["balloon"]
    model.unplug("low", 0, 2 * PAGE)
    assert model.populated() == model.used_privately_in("low") == set()
    assert model.shared() == pages(16, 17)  # plug state and page state are independent


def test_unmapping_keeps_the_states_of_the_block(model: GuestModel) -> None:
    model.convert(18 * PAGE, PAGE, SHARED)
    model.unmap(18 * PAGE)
    assert model.pages() == pages(16, 17)
    assert model.populated_in("high") == pages(0)
    with pytest.raises(KeyError, match="0x12000"):
        model.state(18 * PAGE)


def test_a_copy_does_not_change_with_the_original(model: GuestModel) -> None:
    before = model.copy()
    model.convert(16 * PAGE, PAGE, SHARED)
    model.unmap(18 * PAGE)
    assert before.populated() == set()
    assert before.pages() == pages(16, 17, 18, 19)
    assert repr(before) == "<GuestModel: 2 sections, 0 pages populated>"


def test_pages_of_mappings() -> None:
    iommu = SoftIommu()
    iommu.map(2 * PAGE, HostRange(None, 0, 0x1000_0000, 2 * PAGE))
    iommu.map(8 * PAGE, HostRange(None, 0, 0x2000_0000, PAGE))
    assert pages_of(iommu.mappings()) == pages(2, 3, 8)
