"""The page of a plan: what is in the file, and what a browser makes of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from ramblock.cli import main
from require import require_browser
from trace_samples import DATA

_GUEST = ("--memory", "512M", "--device", "gpu-cc", "--conversions", "300")


def _page(tmp_path: Path, *arguments: str) -> Path:
    path = tmp_path / "plan.html"
    assert main(["plan", *arguments, "--plot", str(path)]) in (0, 1)
    return path


def _data(path: Path) -> Any:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )
    assert match is not None
    return json.loads(match[1])


@pytest.mark.usefixtures("capsys")
def test_a_guest(tmp_path: Path) -> None:
    data = _data(_page(tmp_path, *_GUEST))
    by_page, by_run = data["lines"]
    assert max(by_page["y"]) > 16_384 > max(by_run["y"])
    assert by_page["x"] == sorted(by_page["x"])
    assert {line["value"] for line in data["limits"]} == {65_535, 2_048}
    assert len(data["rows"]) == 10


@pytest.mark.usefixtures("capsys")
def test_a_recording(tmp_path: Path) -> None:
    data = _data(_page(tmp_path, str(DATA / "run-type1.jsonl.gz")))
    by_page, by_run = data["lines"]
    assert (by_page["y"][-1], by_run["y"][-1]) == (3716, 17)
    assert data["xTitle"] == "seconds"


@pytest.mark.usefixtures("capsys")
def test_a_sweep(tmp_path: Path) -> None:
    data = _data(_page(tmp_path, "--sweep", "memory=1G..64G", "--policy", "page"))
    (line,) = data["lines"]
    assert line["name"].split(", ") == [
        f"page on {name}"
        for name in ("iommufd", "iommufd-cutting", "type1", "vfio-user", "vhost-vdpa")
    ]
    assert all(line["x"] == [1, 2, 4, 8, 16, 32, 64] for line in data["lines"])
    assert all(line["y"] == sorted(line["y"]) for line in data["lines"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the driver's client
@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize(
    "arguments",
    [_GUEST, (str(DATA / "run-type1.jsonl.gz"),), ("--sweep", "memory=1G..64G")],
    ids=["guest", "recording", "sweep"],
)
def test_in_a_browser(arguments: tuple[str, ...], browser: Browser, tmp_path: Path) -> None:
    path = _page(tmp_path, *arguments)
    data = _data(path)
    browser.open(path)
    assert browser.complaints() == []
    assert browser.requests() == {"file"}
    shown = browser.run("return document.querySelectorAll('#rows tbody tr').length")
    assert shown == len(data["rows"])
    drawn = browser.run("return document.querySelectorAll('#plot .scatterlayer .trace').length")
    assert drawn == len(data["lines"]) + len(data["limits"])
    axis = "return document.getElementById('plot').layout.yaxis.type"
    assert browser.run(axis) == "log"
    browser.run("document.getElementById('scale').click()")
    browser.wait_for(f"return ({axis[7:]}) === 'linear'")
