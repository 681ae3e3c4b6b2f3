import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.vfio_user import Capabilities
from ramblock.dma.vfio_user.messages import MalformedError

FIELD = st.integers(0, 2**64 - 1)
SOME = FIELD.filter(bool)
TWIN = st.sampled_from([(False, None), (True, None), (True, 0), (True, 7)])
CAPABILITIES = st.builds(
    lambda twin, *fields: Capabilities(*fields, *twin),
    TWIN, FIELD, SOME, FIELD, SOME, st.booleans(),
)  # fmt: skip


def of(document: Any) -> bytes:
    return json.dumps(document).encode() + b"\0"


@given(CAPABILITIES)
def test_there_and_back(capabilities: Capabilities) -> None:
    assert Capabilities.unpack(capabilities.pack()) == capabilities


@pytest.mark.parametrize("data", [b"", of({}), of({"capabilities": {}}), of({"other": 1})])
def test_a_peer_that_says_nothing(data: bytes) -> None:
    assert Capabilities.unpack(data) == Capabilities(1, 0x10_0000, 65535, 4096)


def test_what_is_not_used_is_ignored() -> None:
    # As QEMU's client writes it, and twin_socket as libvfio-user reads it (lib/tran.c,
    # tran_parse_version_json()).
    members = {
        "max_msg_fds": 8,
        "max_data_xfer_size": 1048576,
        "pgsizes": 4096,
        "max_dma_maps": 65535,
        "migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
        "twin_socket": {"supported": True},
        "write_multiple": True,
    }
    found = Capabilities.unpack(of({"capabilities": members}))
    assert found == Capabilities(8, 0x10_0000, 65535, 4096, write_multiple=True, twin_socket=True)


@pytest.mark.parametrize(("pgsizes", "page_size"), [(4096, 4096), (0x20_1000, 0x1000), (1, 1)])
def test_the_page_size_is_the_smallest(pgsizes: int, page_size: int) -> None:
    assert Capabilities(pgsizes=pgsizes).page_size == page_size


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"{}",
        b"{}\0\0",
        b"\0{}\0",
        b"{\0",
        b"\xff\0",
        b"[]\0",
        b"1\0",
        b'"capabilities"\0',
        of({"capabilities": []}),
        of({"capabilities": None}),
        b"[" * 10_000 + b"\0",
        b'{"capabilities": {"max_msg_fds": ' + b"9" * 10_000 + b"}}\0",
        b" " * 20_000 + b"{}\0",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_version_data(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Capabilities.unpack(data)


@pytest.mark.parametrize("name", ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, True, None, "8", [], {}, float("nan")])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(MalformedError, match=name):
        Capabilities.unpack(of({"capabilities": {name: value}}))


@pytest.mark.parametrize("value", [0, 1, None, "true"])
def test_a_truth_that_is_none(value: Any) -> None:
    with pytest.raises(MalformedError, match="write_multiple"):
        Capabilities.unpack(of({"capabilities": {"write_multiple": value}}))


@pytest.mark.parametrize("name", ["pgsizes", "max_data_xfer_size"])
def test_numbers_that_nobody_can_work_with(name: str) -> None:
    with pytest.raises(MalformedError, match=name):
        Capabilities.unpack(of({"capabilities": {name: 0}}))


@pytest.mark.parametrize(
    "twin", [None, [], True, {"supported": 1}, {"supported": True, "fd_index": -1}]
)
def test_a_twin_socket_that_is_none(twin: Any) -> None:
    with pytest.raises(MalformedError, match="twin_socket"):
        Capabilities.unpack(of({"capabilities": {"twin_socket": twin}}))


@pytest.mark.parametrize("twin", [{}, {"supported": False}, {"supported": False, "fd_index": 0}])
def test_no_twin_socket(twin: Any) -> None:
    assert Capabilities.unpack(of({"capabilities": {"twin_socket": twin}})) == Capabilities()


@given(st.binary(max_size=200))
def test_any_bytes_are_capabilities_or_malformed(data: bytes) -> None:
    with suppress(MalformedError):
        assert isinstance(Capabilities.unpack(data), Capabilities)
