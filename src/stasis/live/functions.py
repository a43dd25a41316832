# SPDX-License-Identifier: Apache-2.0
"""The functions that all BPF programs of tracking share, as bytecode.

`record` looks for a disk in the table, `mark` goes through the words of a range, `word` sets bits, `spoil` says that
the bitmaps of a disk cannot be trusted. They are global functions: the verifier looks at each once, not at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stasis.linux.bpfasm import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Assembler, Register
from stasis.linux.btf import FunctionType
from stasis.live.layout import COUNT, SLOTS, Lost, Slot, slot_offset

__all__ = ["FUNCTIONS", "MAP_LOOKUP", "Functions", "Maps"]

MAP_LOOKUP = 1  # enum bpf_func_id

WORDS_PER_RANGE = (1 << 32 >> 16 >> 6) + 2
"""A bio has less than 4 GiB, a tracking block at least 64 KiB, a word 64 bits; the ends may lie within words."""

FUNCTIONS = (
    FunctionType("entry", 1, takes_context=True),
    FunctionType("record", 3),
    FunctionType("mark", 3),
    FunctionType("word", 3),
    FunctionType("spoil", 2),
)


@dataclass(frozen=True)
class Maps:
    """Descriptors of the maps that the programs use."""

    table: int
    bitmaps: int
    flight: int
    done: int


class Functions:
    """Writes the functions to the end of a program."""

    def __init__(self, maps: Maps) -> None:
        self.asm, self.maps = Assembler(), maps

    def functions(self) -> None:
        """All of them, in the order of FUNCTIONS, which begins with the program's entry."""
        for write in (self._write_record, self._write_mark, self._write_word, self._write_spoil):
            write()

    def _return(self) -> None:
        self.asm.move(R0, 0)
        self.asm.exit()

    def _write_record(self) -> None:
        """record(device, sector, sectors): mark the range in every slot of a disk. 1 if the disk takes bios."""
        asm = self.asm
        asm.label("record")
        for saved, given in ((R6, R1), (R7, R2), (R8, R3)):
            asm.move(saved, given)
        asm.store(8, R10, -8, 0)
        self._each_slot("record", self._record_slot)
        asm.load(8, R0, R10, -8)
        asm.exit()

    def _record_slot(self) -> None:
        asm = self.asm
        asm.load(4, R3, R1, slot_offset(0) + Slot.BIO_BASED)
        asm.load(8, R2, R10, -8)
        asm.alu("|", R2, R3)
        asm.store(8, R10, -8, R2)
        for argument, value in ((R1, R9), (R2, R7), (R3, R8)):
            asm.move(argument, value)
        asm.call("mark")

    def _write_spoil(self) -> None:
        """spoil(device, why): set sticky bits in every slot of a disk."""
        asm = self.asm
        asm.label("spoil")
        asm.move(R6, R1)
        asm.move(R7, R2)
        self._each_slot("spoil", lambda: asm.atomic_or(4, R1, slot_offset(0) + Slot.LOST, R7))
        self._return()

    def _each_slot(self, name: str, body: Callable[[], None]) -> None:
        """For each slot of the disk in r6: r9 its number, r1 + slot_offset(0) its address."""
        asm = self.asm
        asm.jump_if(R6, "==", 0, f"{name}_end")
        asm.move(R9, 0)
        asm.label(f"{name}_loop")
        asm.map_value(R1, self.maps.table)
        asm.load(4, R2, R1, COUNT)
        asm.jump_if(R9, ">=", R2, f"{name}_end")
        self._add_slot(R1, R9, R2)
        asm.load(4, R3, R1, slot_offset(0) + Slot.DEVICE)
        asm.jump_if(R3, "!=", R6, f"{name}_next")
        body()
        asm.label(f"{name}_next")
        asm.alu("+", R9, 1)
        asm.jump_if(R9, "<", SLOTS, f"{name}_loop")
        asm.label(f"{name}_end")

    def _add_slot(self, base: Register, index: Register, scratch: Register) -> None:
        asm = self.asm
        asm.move(scratch, index)
        asm.alu("<<", scratch, 6)
        asm.alu("+", base, scratch)

    def _write_mark(self) -> None:
        """mark(slot, sector, sectors): the part of a range that lies in a slot, a word of 64 blocks at a time."""
        asm = self.asm
        asm.label("mark")
        asm.jump_if(R1, ">=", SLOTS, "mark_end")
        asm.move(R9, R1)
        self._clip_to_blocks()
        asm.move(R6, 0)
        asm.label("mark_loop")
        asm.jump_if(R7, ">", R8, "mark_end")
        for argument, value in ((R1, R9), (R2, R7), (R3, R8)):
            asm.move(argument, value)
        asm.call("word")
        asm.alu("|", R7, 63)
        asm.alu("+", R7, 1)
        asm.alu("+", R6, 1)
        asm.jump_if(R6, "<", WORDS_PER_RANGE, "mark_loop")
        asm.map_value(R6, self.maps.table, slot_offset(0))
        self._add_slot(R6, R9, R4)
        self._lose_range()
        asm.label("mark_end")
        self._return()

    def _clip_to_blocks(self) -> None:
        """r7 and r8: first and last block of the part of the range r2, r3 that lies in slot r1."""
        asm = self.asm
        asm.map_value(R6, self.maps.table, slot_offset(0))
        self._add_slot(R6, R1, R4)
        asm.move(R7, R2)
        asm.move(R8, R2)
        asm.alu("+", R8, R3)
        asm.load(8, R4, R6, Slot.START)
        asm.load(8, R5, R6, Slot.END)
        asm.jump_if(R7, ">=", R4, "mark_begins")
        asm.move(R7, R4)
        asm.label("mark_begins")
        asm.jump_if(R8, "<=", R5, "mark_ends")
        asm.move(R8, R5)
        asm.label("mark_ends")
        asm.jump_if(R7, ">=", R8, "mark_end")
        asm.load(4, R5, R6, Slot.SHIFT)
        for register in (R7, R8):
            asm.alu("-", register, R4)
        asm.alu("-", R8, 1)
        for register in (R7, R8):
            asm.alu(">>", register, R5)

    def _lose_range(self) -> None:
        self.asm.move(R1, int(Lost.RANGE))
        self.asm.atomic_or(4, R6, Slot.LOST, R1)

    def _write_word(self) -> None:
        """word(slot, first, last): set the bits of blocks first to last, as far as they lie in the word of the first.

        A function of its own, so that the verifier looks at it once and not for every step of the loop.
        """
        asm = self.asm
        asm.label("word")
        asm.jump_if(R1, ">=", SLOTS, "word_end")
        asm.move(R7, R2)
        asm.move(R8, R3)
        asm.store(4, R10, -4, R1)
        asm.map_value(R6, self.maps.table, slot_offset(0))
        self._add_slot(R6, R1, R4)
        self._find_element()
        self._find_word_and_mask()
        asm.load(8, R1, R0)
        asm.alu("&", R1, R2)
        asm.jump_if(R1, "==", R2, "word_end")  # set already: nearly always so, and no cache line need move
        asm.atomic_or(8, R0, 0, R2)
        asm.jump("word_end")
        asm.label("word_lost")
        self._lose_range()
        asm.label("word_end")
        self._return()

    def _find_element(self) -> None:
        """r0: the element of the active bitmap that has block r7 of slot r6, whose number is in the frame."""
        asm = self.asm
        asm.map(R1, self.maps.bitmaps)
        asm.move(R2, R10)
        asm.alu("+", R2, -4)
        asm.call_helper(MAP_LOOKUP)
        asm.jump_if(R0, "==", 0, "word_lost")
        asm.load(4, R1, R6, Slot.ACTIVE)
        asm.load(4, R2, R6, Slot.ELEMENTS)
        asm.alu("*", R1, R2)
        asm.move(R2, R7)
        asm.alu(">>", R2, 15)
        asm.alu("+", R1, R2)
        asm.store(4, R10, -4, R1)
        asm.move(R1, R0)
        asm.move(R2, R10)
        asm.alu("+", R2, -4)
        asm.call_helper(MAP_LOOKUP)
        asm.jump_if(R0, "==", 0, "word_lost")

    def _find_word_and_mask(self) -> None:
        """r0 becomes the address of r7's word, r2 the bits from r7 to the word's end or to r8."""
        asm = self.asm
        asm.move(R1, R7)
        asm.alu(">>", R1, 6)
        asm.alu("&", R1, 511)
        asm.alu("<<", R1, 3)
        asm.alu("+", R0, R1)
        asm.move(R1, R7)
        asm.alu("&", R1, 63)
        asm.move(R2, -1)
        asm.alu("<<", R2, R1)
        asm.alu("|", R7, 63)
        asm.jump_if(R7, "<=", R8, "word_whole")
        asm.alu("-", R7, R8)
        asm.move(R3, -1)
        asm.alu(">>", R3, R7)
        asm.alu("&", R2, R3)
        asm.label("word_whole")
