"""The page of an audit: what is in the file, and what a browser makes of it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from browser import Browser
from ramblock.cli import main
from ramblock.errors import UsageError
from ramblock.report.html import require_plotly
from ramblock.report.page import find_segments
from ramblock.report.picture import Shade
from require import require_browser
from trace_samples import DATA


def _report(tmp_path: Path, *arguments: str) -> Path:
    path = tmp_path / "report.html"
    main(["check", *arguments, "--report", str(path)])
    return path


def _data(path: Path) -> Any:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )
    assert match is not None
    return json.loads(match[1])


@pytest.mark.usefixtures("capsys")
def test_data_of_the_page(tmp_path: Path) -> None:
    data = _data(_report(tmp_path, str(DATA / "probe-qemu-exact.jsonl.gz")))
    assert len(data["findings"]) == 64
    assert sum(group["count"] for group in data["notes"]) == 6
    assert data["findings"][0]["kind"] == "stale"
    assert data["findings"][0]["opened"].startswith("line ")
    columns = data["rectangles"]
    assert len(columns) == 5
    assert len({len(column) for column in columns}) == 1
    assert columns[4].count(Shade.STALE) >= 64
    assert len(data["limits"]) >= 1


@pytest.mark.usefixtures("capsys")
def test_names_in_a_trace_cannot_break_out(tmp_path: Path) -> None:
    """A trace is not trusted: whoever wrote it chose the names."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    trace = tmp_path / "evil.jsonl"
    start = {"t": 1, "event": "start", "version": 1, "blocks": [], "targets": {evil: evil}}
    violation = {"t": 2, "event": "violation", "target": evil, "rule": evil, "reason": evil}
    trace.write_text("".join(json.dumps(line) + "\n" for line in (start, violation)))
    path = _report(tmp_path, str(trace))
    assert evil not in path.read_text()
    assert _data(path)["notes"][0]["target"] == evil
    assert evil in _data(path)["notes"][0]["note"]


def test_holes_are_cut_out_of_the_picture() -> None:
    mib = 1 << 20
    drawn = [(0, mib), (8 * mib, 9 * mib), (1 << 44, (1 << 44) + mib)]
    assert find_segments(drawn, []) == [(0, 9 * mib), (1 << 44, (1 << 44) + mib)]
    assert find_segments([], []) == []


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before the audit, not after."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError) as caught:
        require_plotly()
    assert "ramblock[report]" in str(caught.value.expected)
    path = tmp_path / "x.html"
    assert main(["check", str(DATA / "run-soft.jsonl.gz"), "--report", str(path)]) == 2
    assert not path.exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


_RANGES = (
    "const {xaxis, yaxis} = document.getElementById('plot').layout;"
    " return [...xaxis.range, ...yaxis.range]"
)


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the driver's client
@pytest.mark.parametrize(
    ("name", "findings"),
    [
        ("probe-qemu-exact.jsonl.gz", 64),
        ("ftrace-uncoordinated.txt.gz", 50),
        ("ftrace-type1.txt.gz", 0),
        ("qemu-lenient.trace.gz", 0),
    ],
)
@pytest.mark.usefixtures("capsys")
def test_in_a_browser(tmp_path: Path, browser: Browser, name: str, findings: int) -> None:
    browser.open(_report(tmp_path, str(DATA / name)))
    rows = browser.driver.find_elements("css selector", "#findings tbody tr")
    assert len(rows) >= findings
    assert (len(rows) == 0) == (findings == 0)
    assert browser.run("return document.querySelectorAll('#plot .heatmaplayer image').length") == 1
    whole = browser.run(_RANGES)
    if rows:
        rows[0].click()
        browser.wait_for("return document.getElementById('plot').layout.shapes.length")
        left, right, bottom, top = browser.run(_RANGES)
        assert right - left <= whole[1] - whole[0]
        assert top - bottom < whole[3] - whole[2]
        assert rows[0].get_attribute("aria-selected") == "true"
    assert browser.complaints() == []
    assert browser.requests() == {"file"}


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("capsys")
def test_kinds_choose_and_enter_selects(tmp_path: Path, browser: Browser) -> None:
    browser.open(_report(tmp_path, str(DATA / "probe-qemu-exact.jsonl.gz"), "--strict"))
    buttons = browser.driver.find_elements("css selector", "#kinds button")
    assert [button.text for button in buttons] == ["all (70)", "stale (64)", "broken rule (6)"]
    buttons[2].click()
    rows = browser.driver.find_elements("css selector", "#findings tbody tr")
    assert len(rows) == 6
    rows[1].send_keys("\n")
    assert rows[1].get_attribute("aria-selected") == "true"
    browser.wait_for("return document.getElementById('plot').layout.shapes.length")


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("capsys")
def test_notes_and_faults_are_tables_of_their_own(tmp_path: Path, browser: Browser) -> None:
    browser.open(_report(tmp_path, str(DATA / "probe-qemu-exact.jsonl.gz")))
    shown = "return document.querySelectorAll('#{} tbody tr').length"
    data = _data(tmp_path / "report.html")
    assert browser.run(shown.format("notes")) == len(data["notes"]) > 0
    assert browser.run("return document.getElementById('faults-section').hidden") is True
    browser.open(_report(tmp_path, str(DATA / "run-soft.jsonl.gz")))
    data = _data(tmp_path / "report.html")
    assert browser.run(shown.format("faults")) == len(data["faults"]) > 100
    assert browser.run("return document.getElementById('notes-section').hidden") is True
    assert browser.run("return document.getElementById('meaning').textContent") == data["sentence"]
    assert browser.complaints() == []


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("capsys")
def test_a_hundred_thousand_events(tmp_path: Path, browser: Browser) -> None:
    trace = tmp_path / "trace.jsonl"
    assert (
        main(["run", "--memory", "1G", "--conversions", "20000", "-q", "--trace", str(trace)]) == 0
    )
    assert trace.read_bytes().count(b"\n") > 100_000
    browser.open(_report(tmp_path, str(trace)))
    before = browser.run(_RANGES)
    # A zoom by hand: what is seen is painted again, finer.
    browser.run(
        "const plot = document.getElementById('plot');"
        " const {xaxis} = plot.layout;"
        " Plotly.relayout(plot, {'xaxis.range[0]': 0, 'xaxis.range[1]': xaxis.range[1] / 100})"
    )
    step = "const {x} = document.getElementById('plot').data[0]; return x[1] - x[0]"
    coarse = (before[1] - before[0]) / 700
    deadline = monotonic() + 30
    while browser.run(step) > coarse / 50:
        assert monotonic() < deadline
        sleep(0.05)
    assert browser.complaints() == []


@require_browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("capsys")
def test_report_of_a_run_is_the_same_page(tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "run.html"
    options = ["--memory", "256M", "--conversions", "200", "-q", "--uncoordinated"]
    assert main(["run", *options, "--report", str(path)]) == 1
    assert {each["kind"] for each in _data(path)["findings"]} >= {"stale"}
    browser.open(path)
    assert browser.driver.find_elements("css selector", "#findings tbody tr")
    assert browser.complaints() == []
