"""The comparison of a table of QEMU's steps with a run: which step differs, and which word."""

from collections.abc import Iterable

__all__ = ["compare_steps"]


def compare_steps(expected: Iterable[str], found: Iterable[str]) -> str | None:
    """Say which step is the first that differs, and which word of it; None: none does."""
    expected, found = list(expected), list(found)
    for number, (left, right) in enumerate(zip(expected, found, strict=False), 1):
        if left == right:
            continue
        words = zip(left.split(), right.split(), strict=False)
        differing = next((pair for pair in words if pair[0] != pair[1]), None)
        what = (
            f"word {differing[0]!r} of the table is {differing[1]!r}"
            if differing
            else "one of them has more words"
        )
        return f"step {number}: {what}\n  table: {left}\n  QEMU:  {right}"
    if len(expected) != len(found):
        number = min(len(expected), len(found)) + 1
        more, rest = ("table", expected) if len(expected) > len(found) else ("QEMU", found)
        return f"step {number}: only {more} has it: {rest[number - 1]}"
    return None
