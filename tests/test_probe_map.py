"""The picture of guest memory that `ramblock probe` draws."""

from ramblock.cli.probe_map import STALE, areas, draw
from ramblock.probe import Window

M = 1 << 20


def _window(address: int, size: int, *, stale: bool = False) -> Window:
    window = Window(address, size, writable=True, readable=True, file=None, offset=0)
    if stale:
        window.refused_unmap = (address, size)
    return window


def test_windows_near_each_other_are_one_area() -> None:
    windows = [_window(0, M), _window(3 * M, M), _window(1 << 30, M)]
    found = areas(windows)

    assert [(area.address, area.end) for area in found] == [(0, 4 * M), (1 << 30, (1 << 30) + M)]
    assert [area.mapped for area in found] == [2 * M, M]
    assert [window for area in found for window in area.windows] == windows


def test_what_begins_at_4_gib_is_an_area_of_its_own() -> None:
    found = areas([_window((1 << 32) - M, M), _window(1 << 32, M)])

    assert [area.size for area in found] == [M, M]


def test_cells_show_how_much_of_each_is_mapped() -> None:
    (area,) = areas([_window(0, 4 * M), _window(9 * M, M), _window(15 * M, M)])

    assert draw(area, 4) == "█ ░░"
    assert draw(area, 2) == "▒░"
    assert draw(area, 16) == "████     █     █"


def test_a_whole_area_is_full_at_any_width() -> None:
    (area,) = areas([_window(n * M, M) for n in range(7)])

    for cells in range(1, 100):
        assert draw(area, cells) == "█" * cells


def test_stale_windows_are_seen_however_small_they_are() -> None:
    windows = [_window(n * M, M) for n in range(1000)]
    windows[500].refused_unmap = (500 * M, M)
    (area,) = areas(windows)
    row = draw(area, 10)

    assert row == "█████!████"
    assert row.count(STALE) == 1


def test_no_windows_no_areas() -> None:
    assert areas([]) == []
