"""The documentation quotes real output: each quotation is run, and compared."""

from pathlib import Path

import pytest

from quoted_output import FILES, ROOT, Quotation, abridge, find, run

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
def test_its_lines_have_at_most_100_columns() -> None:
    for name in FILES:
        if name.endswith(".rst"):
            for number, line in enumerate(Path(ROOT / name).read_text().splitlines(), 1):
                assert len(line) <= 100, f"{name}:{number}"
