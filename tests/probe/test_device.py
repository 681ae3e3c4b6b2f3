"""What a driver sees: config space, and the engine in BAR 0."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.probe.config_space import CONFIG_SIZE, ConfigSpace
from ramblock.probe.engine import DmaEngine, DmaRefusedError
from ramblock.vfio.probe_registers import (
    BAR_SIZE,
    DATA,
    DATA_SIZE,
    DEVICE,
    VENDOR,
    Command,
    Register,
)


def word(config: ConfigSpace, offset: int) -> int:
    return int.from_bytes(config.read(offset, 4), "little")


def test_ids_and_class_are_read_only() -> None:
    config = ConfigSpace()
    config.write(0, b"\xff" * 4)
    config.write(8, b"\xff" * 4)
    assert word(config, 0) == DEVICE << 16 | VENDOR
    assert word(config, 8) == 0xFF0000_01


def test_the_size_of_the_bar_is_found_as_drivers_do() -> None:
    config = ConfigSpace()
    config.write(0x10, b"\xff" * 4)
    assert ~word(config, 0x10) + 1 & 0xFFFF_FFFF == BAR_SIZE
    for bar in range(0x14, 0x28, 4):
        config.write(bar, b"\xff" * 4)
        assert word(config, bar) == 0
    config.write(0x10, (0xFEBD_1234).to_bytes(4, "little"))
    assert word(config, 0x10) == 0xFEBD_1000


def test_bus_mastering_is_the_drivers_until_a_reset() -> None:
    config = ConfigSpace()
    config.write(4, b"\xff\xff")
    assert config.bus_master
    assert config.read(4, 2) == b"\x06\x00"
    config.reset()
    assert not config.bus_master
    assert word(config, 0) == DEVICE << 16 | VENDOR


@given(st.lists(st.tuples(st.integers(0, CONFIG_SIZE - 1), st.binary(min_size=1, max_size=8))))
def test_writes_to_config_space_change_nothing_but_what_may(
    writes: list[tuple[int, bytes]],
) -> None:
    config, fresh = ConfigSpace(), ConfigSpace()
    for offset, data in writes:
        config.write(offset, data[: CONFIG_SIZE - offset])
    config.reset()
    assert config.read(0, CONFIG_SIZE) == fresh.read(0, CONFIG_SIZE)


class Memory:
    """A page at 0x10000."""

    def __init__(self) -> None:
        self.bytes = bytearray(0x1000)

    def read(self, address: int, size: int) -> bytes:
        if not 0x10000 <= address <= 0x11000 - size:
            raise DmaRefusedError(errno.EFAULT)
        return bytes(self.bytes[address - 0x10000 :][:size])

    def write(self, address: int, data: bytes) -> None:
        self.read(address, len(data))
        self.bytes[address - 0x10000 :][: len(data)] = b""
        self.bytes[address - 0x10000 : address - 0x10000 + len(data)] = data


def run(engine: DmaEngine, address: int, length: int, command: int) -> int:
    engine.write(Register.ADDRESS, struct.pack("<QII", address, length, command))
    return int.from_bytes(engine.read(Register.RESULT, 4), "little")


def test_the_engine_copies_both_ways() -> None:
    memory = Memory()
    engine = DmaEngine(memory)
    memory.bytes[8:13] = b"hello"
    assert run(engine, 0x10008, 5, Command.READ) == 0
    assert engine.read(DATA, 5) == b"hello"
    engine.write(DATA, b"HELLO, WORLD")
    assert run(engine, 0x10100, 12, Command.WRITE) == 0
    assert memory.bytes[0x100:0x10C] == b"HELLO, WORLD"


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_registers_may_be_written_in_pieces(width: int) -> None:
    memory = Memory()
    engine = DmaEngine(memory)
    memory.bytes[:4] = b"data"
    setting = struct.pack("<QII", 0x10000, 4, Command.READ)
    for offset in range(0, len(setting), width):
        engine.write(Register.ADDRESS + offset, setting[offset : offset + width])
    assert engine.read(Register.RESULT, 4) == bytes(4)
    assert engine.read(DATA, 4) == b"data"


@pytest.mark.parametrize(
    ("address", "length", "command", "result"),
    [
        (0, 4, Command.READ, errno.EFAULT),
        (0x10FFE, 4, Command.WRITE, errno.EFAULT),
        (0x10000, 0, Command.READ, errno.EINVAL),
        (0x10000, DATA_SIZE + 1, Command.READ, errno.EINVAL),
        (0x10000, 4, 0, errno.EINVAL),
        (0x10000, 4, 3, errno.EINVAL),
    ],
)
def test_what_the_engine_refuses(address: int, length: int, command: int, result: int) -> None:
    memory = Memory()
    assert run(DmaEngine(memory), address, length, command) == result
    assert not any(memory.bytes)


def test_what_tells_cannot_be_written() -> None:
    engine = DmaEngine(Memory())
    engine.write(0, b"\xff" * 8)
    engine.write(Register.RESULT, b"\xff" * 8)
    assert engine.read(0, 8) == struct.pack("<4sI", b"RBLK", 1)
    assert engine.read(Register.RESULT, 8) == bytes(8)
