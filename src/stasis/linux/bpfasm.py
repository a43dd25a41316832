# SPDX-License-Identifier: Apache-2.0
"""An assembler for BPF (Documentation/bpf/standardization/instruction-set.rst), as small as our programs need.

Operands are registers (`R1`) or plain integers; jumps and calls name labels, which may come later.
"""

from __future__ import annotations

import struct
from enum import IntEnum

__all__ = ["R0", "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R9", "R10", "Assembler", "Register"]

INSTRUCTION = struct.Struct("<BBhi")

CLASS_LDX, CLASS_ST, CLASS_STX, CLASS_JMP, CLASS_ALU64 = 0x01, 0x02, 0x03, 0x05, 0x07
MODE_MEM, MODE_ATOMIC = 0x60, 0xC0
SOURCE_REGISTER = 0x08
LD_IMM64, CALL, EXIT, JUMP_ALWAYS = 0x18, 0x85, 0x95, 0x05
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, PSEUDO_CALL = 1, 2, 1

SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
ALU = {"+": 0x00, "-": 0x10, "*": 0x20, "|": 0x40, "&": 0x50, "<<": 0x60, ">>": 0x70, "=": 0xB0}
CONDITIONS = {"==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "<": 0xA0, "<=": 0xB0}
"""Comparisons are unsigned; "&" jumps if a common bit is set."""


class Register(IntEnum):
    """A register; R0 holds results, R1 to R5 arguments, R6 to R9 live through calls, R10 is the frame."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register


class Assembler:
    """Collects instructions; `code` gives the finished program. ValueError for what cannot be encoded."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []
        self._calls: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._instructions)

    def _emit(self, code: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> None:
        if not -(1 << 15) <= offset < 1 << 15:
            raise ValueError(f"offset {offset} does not fit into 16 bits")
        if not -(1 << 31) <= immediate < 1 << 31:
            raise ValueError(f"immediate {immediate} does not fit into 32 bits")
        self._instructions.append((code, source << 4 | target, offset, immediate))

    def label(self, name: str) -> None:
        """The next instruction's name."""
        if name in self._labels:
            raise ValueError(f"label {name} is there already")
        self._labels[name] = len(self)

    def position(self, name: str) -> int:
        """Which instruction has this label."""
        return self._labels[name]

    def alu(self, operation: str, target: Register, operand: int) -> None:
        """64-bit `target operation= operand`; "=" moves."""
        if isinstance(operand, Register):
            self._emit(CLASS_ALU64 | SOURCE_REGISTER | ALU[operation], target, operand)
        else:
            self._emit(CLASS_ALU64 | ALU[operation], target, immediate=operand)

    def move(self, target: Register, operand: int) -> None:
        """target = operand."""
        self.alu("=", target, operand)

    def load(self, size: int, target: Register, base: Register, offset: int = 0) -> None:
        """target = the unsigned integer of `size` bytes at base + offset."""
        self._emit(CLASS_LDX | MODE_MEM | SIZES[size], target, base, offset)

    def store(self, size: int, base: Register, offset: int, operand: int) -> None:
        """`size` bytes at base + offset = operand."""
        if isinstance(operand, Register):
            self._emit(CLASS_STX | MODE_MEM | SIZES[size], base, operand, offset)
        else:
            self._emit(CLASS_ST | MODE_MEM | SIZES[size], base, offset=offset, immediate=operand)

    def atomic_or(self, size: int, base: Register, offset: int, source: Register) -> None:
        """Set bits in 4 or 8 bytes at base + offset, atomically (Linux 5.12)."""
        self._emit(CLASS_STX | MODE_ATOMIC | SIZES[size], base, source, offset, ALU["|"])

    def jump(self, name: str) -> None:
        """Go to a label."""
        self._jumps.append((len(self), name))
        self._emit(JUMP_ALWAYS)

    def jump_if(self, left: Register, condition: str, right: int, name: str) -> None:
        """Go to a label if the unsigned comparison of 64 bits holds."""
        self._jumps.append((len(self), name))
        if isinstance(right, Register):
            self._emit(CLASS_JMP | SOURCE_REGISTER | CONDITIONS[condition], left, right)
        else:
            self._emit(CLASS_JMP | CONDITIONS[condition], left, immediate=right)

    def call_helper(self, number: int) -> None:
        """Call a helper of the kernel (enum bpf_func_id); R1 to R5 are gone afterwards."""
        self._emit(CALL, immediate=number)

    def call(self, name: str) -> None:
        """Call a function of this program by its label."""
        self._calls.append((len(self), name))
        self._emit(CALL, source=PSEUDO_CALL)

    def exit(self) -> None:
        """Return R0."""
        self._emit(EXIT)

    def map(self, target: Register, fd: int) -> None:
        """target = the map of a descriptor."""
        self._emit(LD_IMM64, target, PSEUDO_MAP_FD, immediate=fd)
        self._emit(0)

    def map_value(self, target: Register, fd: int, offset: int = 0) -> None:
        """target = the address within the one value of an array."""
        self._emit(LD_IMM64, target, PSEUDO_MAP_VALUE, immediate=fd)
        self._emit(0, immediate=offset)

    def code(self) -> bytes:
        """The program. KeyError for a label that is nowhere."""
        instructions = list(self._instructions)
        for at, name in self._jumps:
            code, registers, _, immediate = instructions[at]
            instructions[at] = (code, registers, self._labels[name] - at - 1, immediate)
        for at, name in self._calls:
            code, registers, offset, _ = instructions[at]
            instructions[at] = (code, registers, offset, self._labels[name] - at - 1)
        return b"".join(INSTRUCTION.pack(*instruction) for instruction in instructions)
