"""Which format a trace has."""

import pytest

from ramblock.errors import TraceError
from ramblock.trace.detect import detect
from trace_samples import READERS, sample


@pytest.mark.parametrize("name", sorted(READERS))
def test_samples(name: str) -> None:
    assert detect(sample(name)[:65536]) == name


def test_a_buffer_that_is_empty() -> None:
    assert detect(b"# tracer: nop\n#\n") == "ftrace"


def test_messages_before_the_first_event() -> None:
    noise = b"qemu-system-x86_64: warning: something\n" * 50
    assert detect(noise + sample("qemu")[:20000]) == "qemu"


@pytest.mark.parametrize("head", [b"", b"hello\nworld", b"\0\1\2\3" * 100, b"\x7fELF"])
def test_none_that_is_known(head: bytes) -> None:
    with pytest.raises(TraceError, match="its format is not known; it begins with"):
        detect(head)
