"""Which format a trace has."""

import pytest

from ramblock.errors import TraceError
from ramblock.trace.readers.detect import detect
from trace_samples import READERS, sample


@pytest.mark.parametrize("name", sorted(READERS))
def test_samples(name: str) -> None:
    assert detect(sample(name)[:65536]) == name


def test_a_buffer_that_is_empty() -> None:
    assert detect(b"# tracer: nop\n#\n") == "ftrace"


def test_messages_before_the_first_event() -> None:
    noise = b"qemu-system-x86_64: warning: something\n" * 50
    assert detect(noise + sample("qemu")[:20000]) == "qemu"


@pytest.mark.parametrize("head", [b"", b"hello\nworld", b"a console\n" * 10_000])
def test_text_whose_events_may_be_further_behind(head: bytes) -> None:
    assert detect(head) is None


@pytest.mark.parametrize("head", [b"\0\1\2\3" * 100, bytes(4096)])
def test_none_that_is_known(head: bytes) -> None:
    with pytest.raises(TraceError, match="its format is not known; it begins with"):
        detect(head)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"PERFILE2" + bytes(100), "perf's own file.*perf script -i"),
        (b"\x17\x08\x44tracing6\0", "trace-cmd's own file.*trace-cmd report -i"),
        (b"LPKSHHRH" + bytes(8), "systemd journal.*journalctl --file"),
        (b"PK\x03\x04abc", "zip archive.*unzip -p"),
        ("kvm_convert_memory start".encode("utf-16"), "UTF-16.*iconv"),
        ("kvm_convert_memory start".encode("utf-16-be"), "UTF-16.*iconv"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"\x7fELF\x02\x01", "a program or a core dump"),
    ],
)
def test_other_kinds_of_files_are_said_by_name(head: bytes, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        detect(head)
