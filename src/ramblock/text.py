# SPDX-License-Identifier: Apache-2.0
"""
Text of strangers, made fit to be shown.

Names and messages come from traces, guests, peers and file systems. Whatever of them reaches a
terminal or a page goes through here, at the place where it is written.
"""

from __future__ import annotations

from typing import Any

__all__ = ["encode_for_machines", "encode_for_people", "printable"]


def printable(text: str) -> str:
    r"""
    Write each character that is not plainly visible as ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``.

    These are controls (C0 with the line feed, DEL, C1), bidirectional and zero-width ones, lone
    surrogates, and all that Unicode gives no picture. A byte of a file name that is no UTF-8
    (surrogateescape) is shown as that byte.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def encode_for_people(value: object) -> bytes:
    """Encode as JSON that a page or a viewer shows: every string is :func:`printable`."""
    data = _encode(value)
    # Hardly any data has such a character, and C0 is escaped in JSON, with a backslash.
    if data.isascii() and b"\\" not in data and b"\x7f" not in data:
        return data
    import msgspec

    return _encode(_shown(msgspec.to_builtins(value, str_keys=True, enc_hook=_plain)))


def encode_for_machines(value: object, *, indent: int = 0) -> bytes:
    r"""
    Encode as JSON that also a terminal may get.

    Strings stay what they are, since JSON can escape: ``\u202e``. Lone surrogates, which are no
    Unicode, are written as :func:`printable` does.

    :param indent: Spaces a level; 0: in one line.
    """
    import msgspec

    text = _encode(value).decode("utf-8", "surrogatepass")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else _escape_in_json(char) for char in text)
    data = text.encode()
    return msgspec.json.format(data, indent=indent) if indent else data


def _escape_in_json(char: str) -> str:
    # C0 is escaped already, so none of these stands outside of a string.
    if "\ud800" <= char <= "\udfff":
        return f"\\{_escape(char)}"
    units = char.encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _encode(value: object) -> bytes:
    import msgspec

    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (UnicodeEncodeError, OverflowError):
        # A lone surrogate, or a range that ends at 2**64: neither can msgspec encode.
        import json

        plain = msgspec.to_builtins(value, str_keys=True, enc_hook=_plain)
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    # Of the library's own: a size that was given as text is an int.
    for kind in (int, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} in JSON")


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    if isinstance(value, dict):
        return {printable(str(key)): _shown(each) for key, each in value.items()}
    return value
