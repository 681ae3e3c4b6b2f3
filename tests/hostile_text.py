"""Names that a stranger may have chosen, and the characters that no sink may let through."""

import os

__all__ = ["HOSTILE", "HOSTILE_NAME", "bad_characters"]

#: C0 with the line feed, DEL, C1, bidirectional and zero-width controls, a line separator, a tag.
HOSTILE = (
    "a\x1b]0;x\x07\x1b[2Jb\nc\rd\te\x00f\x7fg\x85h\x9b31mi\u202ej\u2066k\u200b"
    "l\ufeffm\u2028n\u061co\U000e0001"
)
#: As a file name: no NUL, no slash, and two bytes that are no UTF-8.
HOSTILE_NAME = HOSTILE.replace("\x00", "") + os.fsdecode(b"\xff\xc3")


def bad_characters(shown: str) -> set[str]:
    """Return the characters of a text that should not be there; lines of ours may end."""
    return {char for char in shown if not char.isprintable() and char != "\n"}
