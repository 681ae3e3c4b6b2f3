# SPDX-License-Identifier: Apache-2.0
"""The table of a sweep, as CSV or as Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TextIO

from ramblock.errors import UsageError
from ramblock.plan.sweep import COLUMNS, Value

__all__ = ["check_table", "write_csv", "write_table"]


def check_table(path: Path) -> None:
    """
    Check that a table can be written there, before the work is done.

    :raises UsageError: Neither CSV nor Parquet, the extra ``parquet`` is not installed, or there is
        no such folder.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise UsageError(f"--table {path}", value=str(path), expected="a name in .csv or .parquet")
    if not path.parent.is_dir():
        raise UsageError(f"--table {path}: there is no folder {path.parent}", value=str(path))
    if path.is_dir():
        raise UsageError(f"--table {path}: it is a folder", value=str(path))
    if path.suffix == ".parquet":
        _require_pyarrow(path)


def write_table(stream: IO[bytes], suffix: str, rows: Sequence[dict[str, Value]]) -> None:
    """
    Write the rows.

    :param suffix: ``.csv`` or ``.parquet``.
    :raises OSError: They cannot be written.
    """
    if suffix == ".csv":
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        write_csv(text, rows)
        text.detach()
        return
    import pyarrow
    from pyarrow import parquet

    columns = {name: [each[name] for each in rows] for name in COLUMNS}
    parquet.write_table(pyarrow.table(columns), stream)


def write_csv(file: TextIO, rows: Sequence[dict[str, Value]]) -> None:
    """Write the rows, with their names in the first line; a missing value is empty."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            f"--table {path} needs pyarrow", expected="pip install 'ramblock[parquet]'"
        ) from None
