"""The assembler: what it emits, read back by GNU binutils; labels; what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from binutils import disassemble, needs_objdump
from ramblock.errors import UsageError
from ramblock.guest_program.assembler import Assembler, Condition, Register

registers = st.sampled_from(Register)
signed32 = st.integers(-(1 << 31), (1 << 31) - 1)


def hexadecimal(value: int) -> str:
    """Write an immediate as objdump does: 64 bits wide, negative numbers included."""
    return f"{value & (1 << 64) - 1:#x}"


def address(base: Register, displacement: int) -> str:
    sign = "-" if displacement < 0 else "+"
    return f"QWORDPTR[{base.name.lower()}{sign}{abs(displacement):#x}]"


Instruction = tuple[Callable[[Assembler], None], str]


def _two(name: str) -> st.SearchStrategy[Instruction]:
    return st.builds(
        lambda one, other: (
            lambda code: getattr(code, name)(one, other),
            f"{name}{one.name.lower()},{other.name.lower()}",
        ),
        registers,
        registers,
    )


def _immediate(name: str) -> st.SearchStrategy[Instruction]:
    return st.builds(
        lambda to, value: (
            lambda code: getattr(code, f"{name}_immediate")(to, value),
            f"{name}{to.name.lower()},{hexadecimal(value)}",
        ),
        registers,
        signed32,
    )


def _plain(method: str, text: str) -> st.SearchStrategy[Instruction]:
    return st.just((lambda code: getattr(code, method)(), text))


instructions: st.SearchStrategy[Instruction] = st.one_of(
    *(_two(name) for name in ("mov", "add", "cmp")),
    *(_immediate(name) for name in ("add", "and", "cmp")),
    st.builds(
        lambda to, value: (
            lambda code: code.mov_immediate(to, value),
            f"movabs{to.name.lower()},{hexadecimal(value)}",
        ),
        registers,
        st.integers(0, (1 << 64) - 1),
    ),
    st.builds(
        lambda to, base, displacement: (
            lambda code: code.load(to, base, displacement),
            f"mov{to.name.lower()},{address(base, displacement)}",
        ),
        registers,
        registers,
        signed32,
    ),
    st.builds(
        lambda source, base, displacement: (
            lambda code: code.store(base, displacement, source),
            f"mov{address(base, displacement)},{source.name.lower()}",
        ),
        registers,
        registers,
        signed32,
    ),
    st.builds(
        lambda to, bits: (
            lambda code: code.shift_left(to, bits),
            f"shl{to.name.lower()},{bits:#x}",
        ),
        registers,
        st.integers(0, 63),
    ),
    st.builds(lambda to: (lambda code: code.load_cr2(to), f"mov{to.name.lower()},cr2"), registers),
    st.builds(lambda to: (lambda code: code.pop(to), f"pop{to.name.lower()}"), registers),
    st.builds(
        lambda value: (lambda code: code.push_immediate(value), f"push{hexadecimal(value)}"),
        signed32,
    ),
    st.builds(
        lambda port: (lambda code: code.read_port(port), f"ineax,{port:#x}"), st.integers(0, 255)
    ),
    st.builds(
        lambda port: (lambda code: code.write_port(port), f"out{port:#x},eax"), st.integers(0, 255)
    ),
    _plain("vmcall", "vmcall"),
    _plain("vmmcall", "vmmcall"),
)


@needs_objdump
@given(chosen=st.lists(instructions, min_size=1, max_size=200))
def test_binutils_read_what_was_meant(chosen: list[Instruction]) -> None:
    code = Assembler()
    for emit, _ in chosen:
        emit(code)
    expected = [text for _, text in chosen]
    assert disassemble(code.code()) == expected


@needs_objdump
@given(
    before=st.integers(0, 300),
    behind=st.integers(0, 300),
    condition=st.sampled_from([None, *Condition]),
)
def test_jumps_lead_to_their_labels(
    before: int,
    behind: int,
    condition: Condition | None,
) -> None:
    code = Assembler()
    code.label("back")
    for _ in range(before):
        code.vmcall()
    for label in ("back", "forth"):
        if condition is None:
            code.jump(label)
        else:
            code.jump_if(condition, label)
    for _ in range(behind):
        code.vmcall()
    code.label("forth")
    code.vmcall()
    lines = disassemble(code.code())
    jumps = [line for line in lines if line.startswith("j")]
    names = {
        None: "jmp",
        Condition.BELOW: "jb",
        Condition.NOT_BELOW: "jae",
        Condition.EQUAL: "je",
        Condition.NOT_EQUAL: "jne",
    }
    assert jumps == [f"{names[condition]}0x0", f"{names[condition]}{code.offset('forth'):#x}"]


def test_a_label_must_exist_once() -> None:
    code = Assembler()
    code.jump("nowhere")
    with pytest.raises(UsageError, match="'nowhere' is nowhere"):
        code.code()
    code.label("here")
    with pytest.raises(UsageError, match="'here' is there already"):
        code.label("here")


@pytest.mark.parametrize(
    "emit",
    [
        lambda code: code.mov_immediate(Register.RAX, 1 << 64),
        lambda code: code.mov_immediate(Register.RAX, -1),
        lambda code: code.add_immediate(Register.RAX, 1 << 31),
        lambda code: code.cmp_immediate(Register.RAX, -(1 << 31) - 1),
        lambda code: code.load(Register.RAX, Register.RBX, 1 << 31),
        lambda code: code.push_immediate(1 << 31),
        lambda code: code.shift_left(Register.RAX, 64),
        lambda code: code.read_port(256),
        lambda code: code.write_port(-1),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_code(
    emit: Callable[[Assembler], None],
) -> None:
    code = Assembler()
    with pytest.raises(UsageError):
        emit(code)
    assert code.code() == b""
