"""One verdict: text, JSON, HTML and exit code say the same of every audit."""

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ramblock.check.verdict import Verdict, judge, worst
from ramblock.cli import main
from ramblock.trace.audit import Audit
from ramblock.trace.events import Origin
from ramblock.trace.findings import FAILURES, Finding, FindingKind
from ramblock.trace.result import AuditResult, KindCount

_S = 10**9
_REASON = "no map events in this trace"
_ERROR = "x.trace:7: the last line is cut"


class _Case(NamedTuple):
    failures: bool
    notes: bool
    error: bool
    cannot_tell: bool
    strict: bool
    allow_empty: bool

    @property
    def expected(self) -> tuple[Verdict, int]:
        if self.failures or (self.notes and self.strict):
            return Verdict.FOUND, 1
        if self.error:
            return Verdict.UNREADABLE, 3
        if self.cannot_tell:
            return Verdict.CANNOT_TELL, 0 if self.allow_empty else 4
        return Verdict.CLEAN, 0

    @property
    def options(self) -> list[str]:
        return ["--strict"] * self.strict + ["--allow-empty"] * self.allow_empty


_CASES = [_Case(*each) for each in product([False, True], repeat=6)]


def _finding(kind: FindingKind, **fields: object) -> Finding:
    return Finding(
        kind=kind,
        target="iommu0",
        start=0x1000,
        end=0x3000,
        since=102 * _S,
        until=103 * _S,
        opened=Origin("x.trace", 5),
        **fields,  # type: ignore[arg-type]
    )


def _result(*findings: Finding, error: bool = False, cannot_tell: bool = False) -> AuditResult:
    result = Audit().finish()
    result.sources = ["x.trace"]
    result.events, result.began, result.ended = 10, 100 * _S, 112_300_000_000
    result.judged_bytes = 0 if cannot_tell else 64 << 20
    result.cannot_tell = [_REASON] if cannot_tell else []
    result.error = _ERROR if error else None
    result.limits = []
    result.findings = list(findings)
    result.counts = {}
    for each in findings:
        count = result.counts.setdefault(each.kind, KindCount())
        count.count += 1
        count.kept += 1
    return result


def _of_case(case: _Case) -> AuditResult:
    findings = [_finding(FindingKind.STALE)] * case.failures
    findings += [_finding(FindingKind.FAULT, device="0000:01:00.0")] * case.notes
    return _result(*findings, error=case.error, cannot_tell=case.cannot_tell)


class _Shown(NamedTuple):
    code: int
    text: str
    json: dict[str, Any]
    html: dict[str, list[str]]
    page: dict[str, Any]


def _show(
    results: list[AuditResult],
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> _Shown:
    def checked(*_: object) -> Iterator[AuditResult]:
        yield from results

    monkeypatch.setattr("ramblock.cli.check_command._audits", checked)
    page = tmp_path / "x.html"
    report = ["--report", str(page)] if len(results) == 1 else []
    files = [f"{number}.trace" for number in range(len(results))]
    code = main(["check", *files, *options, *report])
    text = capsys.readouterr().out
    assert main(["check", *files, *options, "--json"]) == code
    shown = json.loads(capsys.readouterr().out)
    data: dict[str, Any] = {"summary": []}
    if report:
        found = re.search(r'id="data">(.*?)</script>', page.read_text())
        assert found is not None
        data = json.loads(found[1])
    pairs: dict[str, list[str]] = {}
    for key, value in data["summary"]:
        pairs.setdefault(key, []).append(value)
    return _Shown(code, text, shown, pairs, data)


@pytest.mark.parametrize("case", _CASES)
def test_text_json_and_html_agree(
    case: _Case,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    verdict, code = case.expected
    shown = _show([_of_case(case)], case.options, capsys, monkeypatch, tmp_path)
    (audit,) = shown.json["audits"]
    assert shown.code == shown.json["exit_code"] == audit["exit_code"] == code
    assert shown.json["verdict"] == audit["verdict"] == verdict.value
    assert shown.html["verdict"] == [verdict.value]
    sentence = audit["sentence"]
    assert shown.page["sentence"] == sentence
    assert shown.text.rstrip().rpartition("\n\n")[2].count(sentence) == 1
    assert ("cannot tell" in shown.text.lower()) is (verdict is Verdict.CANNOT_TELL)
    assert ("Nothing found" in shown.text) is (verdict is Verdict.CLEAN)
    if verdict is Verdict.CLEAN:
        assert sentence == "Nothing found in 64 MiB of guest pages over 12.3 s"
    if verdict is Verdict.CANNOT_TELL:
        assert _REASON in shown.text
        assert shown.html["why"] == audit["cannot_tell"] == [_REASON]
    if case.error:
        assert _ERROR in shown.text
        assert shown.html["not read to its end"] == [audit["error"]] == [_ERROR]
    failing = {kind for kind in FindingKind if kind in FAILURES or case.strict}
    assert set(shown.page["failures"]) == {str(kind) for kind in failing}
    listed = {each["kind"] for each in shown.page["findings"]}
    assert listed <= {str(kind) for kind in failing}


def test_of_several_the_worst_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of = {
        1: _result(_finding(FindingKind.STALE)),
        3: _result(error=True),
        4: _result(cannot_tell=True),
        0: _result(),
    }
    for first, second in product(of, of):
        expected = next(code for code in of if code in (first, second))
        shown = _show([of[first], of[second]], [], capsys, monkeypatch, tmp_path)
        assert shown.code == shown.json["exit_code"] == expected
        assert "2 recordings: " in shown.text
    judgements = [judge(of[4], allow_empty=True), judge(of[0])]
    assert worst(judgements).verdict is Verdict.CANNOT_TELL
    assert worst(judgements).exit_code == 0


def test_time_starts_at_one_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two seconds after the first event of the trace, wherever it is told."""
    shown = _show([_result(_finding(FindingKind.STALE))], [], capsys, monkeypatch, tmp_path)
    (audit,) = shown.json["audits"]
    (finding,) = audit["findings"]
    assert (finding["after_s"], finding["lasted_s"], finding["since"]) == (2.0, 1.0, 102 * _S)
    assert audit["epoch"]["began"] == shown.page["began"] == 100 * _S
    assert shown.page["ended"] == 112_300_000_000
    assert re.search(r"^stale +\[0x1000, 0x3000\) +8 KiB +2\.000000 s +1\.0 s ", shown.text, re.M)


def test_a_longer_grace_is_marked_everywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = _result(_finding(FindingKind.STALE, grace=True))
    shown = _show([result], [], capsys, monkeypatch, tmp_path)
    assert "1.0 s *" in shown.text
    assert "* With a longer --grace it may be none." in shown.text
    assert shown.json["audits"][0]["findings"][0]["grace"] is True
    assert shown.page["findings"][0]["grace"] is True


def test_a_storm_of_faults_is_one_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = "6.1 ms after the unmap of line 3 took the page away"
    faults = [
        Finding(
            kind=FindingKind.FAULT,
            target=None,
            device="0000:01:00.0",
            start=page + offset,
            end=page + offset + 4,
            since=101 * _S + offset,
            until=101 * _S + offset,
            opened=Origin("x.trace", 10 + offset),
            note=note,
        )
        for page in (0x200000, 0x201000)
        for offset in range(0, 400, 4)
    ]
    shown = _show([_result(*faults)], [], capsys, monkeypatch, tmp_path)
    assert shown.code == 0
    row = r"^ +100 +0000:01:00\.0 +0x200000 +1\.000000 s +6\.1 ms after .* +line 10 to 406$"
    assert re.search(row, shown.text, re.M), shown.text
    assert shown.text.count("0000:01:00.0") == 2
    groups = shown.page["faults"]
    assert [(each["count"], each["device"], each["note"]) for each in groups] == [
        (100, "0000:01:00.0", note)
    ] * 2
    assert len(shown.json["audits"][0]["findings"]) == 200


def test_a_storm_of_notes_is_one_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = [_finding(FindingKind.INSTANT)] * 700
    shown = _show([_result(*notes)], [], capsys, monkeypatch, tmp_path)
    assert shown.code == 0
    assert shown.text.count("700 instant") == 2  # in the heading, and its row
    (group,) = shown.page["notes"]
    assert (group["count"], group["kind"]) == (700, "instant")
    strict = _show([_result(*notes)], ["--strict"], capsys, monkeypatch, tmp_path)
    assert strict.code == 1
    assert strict.page["notes"] == []
