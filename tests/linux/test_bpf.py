# SPDX-License-Identifier: Apache-2.0
"""The assembler against encodings from the instruction set's description, BTF against hand-made and real types, and
maps against the running kernel."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.linux import bpf, btf
from stasis.linux.bpfasm import R0, R1, R2, R6, R7, R10, Assembler, Register
from stasis.linux.btf import Btf, BtfError, FunctionType

registers = st.sampled_from([R0, R1, R2, R6, R7, R10])
offsets = st.integers(-(1 << 15), (1 << 15) - 1)
immediates = st.integers(-(1 << 31), (1 << 31) - 1)

needs_types = pytest.mark.skipif(not btf.VMLINUX.exists(), reason="this kernel does not describe its types")


# -- assembler ----------------------------------------------------------------------------------------


def test_instructions_are_those_of_the_description() -> None:
    asm = Assembler()
    asm.move(R6, R1)  # documented opcodes: RFC 9669, appendix A
    asm.move(R0, -2)
    asm.load(8, R2, R6, 16)
    asm.store(4, R10, -4, R2)
    asm.store(8, R10, -16, 7)
    asm.atomic_or(8, R2, 0, R1)
    asm.call_helper(1)
    asm.exit()
    assert asm.code().hex(" ", 8) == " ".join([
        "bf16000000000000", "b7000000feffffff", "7962100000000000", "632afcff00000000",
        "7a0af0ff07000000", "db12000040000000", "8500000001000000", "9500000000000000"])


def test_jumps_and_calls_count_from_the_next_instruction() -> None:
    asm = Assembler()
    asm.label("start")
    asm.jump_if(R1, "==", 0, "end")
    asm.map(R2, 5)  # two instructions wide
    asm.call("function")
    asm.jump("start")
    asm.label("end")
    asm.exit()
    asm.label("function")
    asm.exit()
    words = [asm.code()[at : at + 8] for at in range(0, len(asm) * 8, 8)]
    assert struct.unpack("<BBhi", words[0]) == (0x15, 1, 4, 0)
    assert struct.unpack("<BBhi", words[1]) == (0x18, 0x12, 0, 5)
    assert struct.unpack("<BBhi", words[3]) == (0x85, 0x10, 0, 2)
    assert struct.unpack("<BBhi", words[4]) == (0x05, 0, -5, 0)


@given(st.sampled_from([1, 2, 4, 8]), registers, registers, offsets)
def test_loads_keep_their_operands(size: int, target: Register, base: Register, offset: int) -> None:
    asm = Assembler()
    asm.load(size, target, base, offset)
    code, both, where, immediate = struct.unpack("<BBhi", asm.code())
    assert (code & 7, both & 15, both >> 4, where, immediate) == (1, target, base, offset, 0)


@given(registers, immediates)
def test_immediates_keep_their_value(target: Register, value: int) -> None:
    asm = Assembler()
    asm.move(target, value)
    assert struct.unpack("<BBhi", asm.code()) == (0xB7, target, 0, value)


@pytest.mark.parametrize("value", [1 << 31, -(1 << 31) - 1])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Assembler().move(R1, value)
    with pytest.raises(ValueError, match="does not fit"):
        Assembler().load(8, R1, R2, 1 << 15)


# -- types --------------------------------------------------------------------------------------------


def test_functions_that_are_written_are_read_again() -> None:
    data, numbers = btf.write_functions([FunctionType("entry", 1, takes_context=True), FunctionType("mark", 3)])
    types = Btf(data)
    assert [types.name(number) for number in numbers] == ["entry", "mark"]
    assert [types.find(name, btf.FUNC) for name in ("entry", "mark")] == numbers


@given(st.binary(max_size=200))
def test_rubbish_is_no_btf(data: bytes) -> None:
    with pytest.raises(BtfError):
        Btf(data)


@given(st.integers(1, 60), st.integers(0, 255))
def test_damage_is_found_or_harmless(at: int, value: int) -> None:
    """Whatever a byte becomes: BtfError, or types that can be asked for."""
    data = bytearray(btf.write_functions([FunctionType("mark", 3)])[0])
    data[at] = value
    try:
        types = Btf(bytes(data))
        types.parameters(types.find("mark", btf.FUNC))
    except BtfError:
        return


@needs_types
def test_fields_lie_where_the_kernel_has_them() -> None:
    """A structure of the user space interface is laid out as its header says."""
    types = btf.read_vmlinux()
    timespec = types.find("timespec64", btf.STRUCT)
    assert (types.field(timespec, "tv_sec").offset, types.field(timespec, "tv_nsec").offset) == (0, 8)
    with pytest.raises(BtfError, match="has no nothing"):
        types.field(timespec, "nothing")
    with pytest.raises(BtfError, match="nothing is called"):
        types.find("no_such_type_as_this")
    assert types.enumerators("REQ_OP_READ", "REQ_OP_WRITE", "NO_SUCH_THING") == {"REQ_OP_READ": 0, "REQ_OP_WRITE": 1}


# -- maps ---------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_hash_gives_all_its_elements() -> None:
    fd = bpf.create_map(bpf.MAP_TYPE_HASH, 8, 8, 512)
    try:
        assert bpf.lookup_all(fd, 8, 8, 512) == []
        expected = {number.to_bytes(8, "little"): (number * 7).to_bytes(8, "little") for number in range(300)}
        for key, value in expected.items():
            bpf.update(fd, key, value)
        assert dict(bpf.lookup_all(fd, 8, 8, 512)) == expected
        bpf.delete(fd, (5).to_bytes(8, "little"))
        with pytest.raises(FileNotFoundError):
            bpf.delete(fd, (5).to_bytes(8, "little"))
        assert len(bpf.lookup_all(fd, 8, 8, 512)) == 299
    finally:
        os.close(fd)


@pytest.mark.root
def test_a_mapped_array_is_shared() -> None:
    fd = bpf.create_map(bpf.MAP_TYPE_ARRAY, 4, 4096, 2, flags=bpf.F_MMAPABLE)
    memory = bpf.map_memory(fd, 8192)
    try:
        bpf.update(fd, struct.pack("<I", 1), b"x" * 4096)
        assert memory[4095:4098] == b"\0xx"
    finally:
        memory.close()
        os.close(fd)
