"""Text of strangers, made fit to be shown."""

import json
import os
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile_text import HOSTILE, HOSTILE_NAME, bad_characters
from ramblock.text import encode_for_machines, encode_for_people, printable

_ANY = st.text(st.characters(exclude_categories=()), max_size=20)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 65) | _ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_ANY, inner, max_size=3),
    max_leaves=8,
)


@given(_ANY)
def test_whatever_is_shown_is_plainly_visible(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


def test_visible_text_stays() -> None:
    assert printable("µs, … 内存 ✓ é") == "µs, … 内存 ✓ é"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\t", r"a\x0ab\x09"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("\u202e\u200b", r"\u202e\u200b"),
        ("\U000e0001", r"\U000e0001"),
        (os.fsdecode(b"\xff"), r"\xff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(_VALUES)
def test_json_for_people_shows_no_control(value: Any) -> None:
    def check(part: Any) -> None:
        if isinstance(part, str):
            assert part.isprintable()
        elif isinstance(part, list):
            for each in part:
                check(each)
        elif isinstance(part, dict):
            for each in (*part, *part.values()):
                check(each)

    data = encode_for_people(value).decode()
    assert not bad_characters(data)
    check(json.loads(data))


@given(_VALUES, st.sampled_from([0, 2]))
def test_json_for_machines_keeps_values(value: Any, indent: int) -> None:
    data = encode_for_machines(value, indent=indent).decode()
    assert not bad_characters(data)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return  # with lone surrogates it is not the same, and can be read all the same
    assert json.loads(data) == value


def test_json_of_hostile_names() -> None:
    data = encode_for_machines({HOSTILE: HOSTILE_NAME}).decode()
    assert not bad_characters(data)
    ((key, value),) = json.loads(data).items()
    assert key == HOSTILE
    assert value.endswith(r"\xff\xc3")
