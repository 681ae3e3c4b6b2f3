"""The documentation quotes real output: each quotation is run, and compared."""

import re
from pathlib import Path

import pytest

from quoted_output import FILES, ROOT, Quotation, abridge, find, run
from ramblock.trace.findings import FAILURES, FindingKind

_FOUND = [
    pytest.param(each, id=f"{name}: {each.command}")
    for name in FILES
    if (path := ROOT / name).is_file()
    for each in find(path.read_text().splitlines())
]


@pytest.mark.skipif(not _FOUND, reason="the documentation is not here: this is not a checkout")
@pytest.mark.parametrize("quotation", _FOUND)
def test_the_documentation_quotes_real_output(quotation: Quotation) -> None:
    """Otherwise ``python tests/quoted_output.py`` writes it anew; read what has changed."""
    assert abridge(run(quotation.command), quotation.output) == quotation.output


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="this is not a checkout")
def test_each_kind_of_finding_is_in_its_table() -> None:
    failures, _, notes = (ROOT / "docs/check.rst").read_text().partition("These are notes.")
    kinds = {str(kind) for kind in FindingKind}
    for text, expected in ((failures, FAILURES), (notes, frozenset(FindingKind) - FAILURES)):
        told = {match[1] for match in re.finditer(r"^``([a-z ]+)`` ", text, re.M)}
        assert told & kinds == {str(kind) for kind in expected}


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="this is not a checkout")
def test_its_lines_have_at_most_100_columns() -> None:
    for name in FILES:
        if name.endswith(".rst"):
            for number, line in enumerate(Path(ROOT / name).read_text().splitlines(), 1):
                assert len(line) <= 100, f"{name}:{number}"
