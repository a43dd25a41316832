# SPDX-License-Identifier: Apache-2.0
"""What in the tasks is not their own just now, and how to put it back: shared with the guardian. Registers of threads,
pages and descriptors of ours, instructions that were changed, signals that wait to be sent again.

Memory shared by the dumper and its guardian. A slot is filled before a thread is touched and freed when it is as it
was; the dumper may die between any two instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

from stasis.errors import StasisError
from stasis.linux.ptrace import Registers

__all__ = ["INSTRUCTION", "Entry", "Journal"]

SLOTS = 4096
MOST_DESCRIPTORS = 4
INSTRUCTION = 8
"""Bytes that are noted of what stood where an instruction was changed."""
FREE, TOUCHED = range(2)


class _Slot(ctypes.Structure):
    _fields_ = [
        ("state", ctypes.c_uint64),
        ("tid", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("held_back", ctypes.c_uint64),
        ("changed", ctypes.c_uint64),
        ("original", ctypes.c_char * INSTRUCTION),
        ("descriptors", ctypes.c_int64 * MOST_DESCRIPTORS),
        ("registers", Registers),
    ]


class Entry(NamedTuple):
    """A thread to put back. `pages`: where our page with the `syscall` instruction is, 0 while there is none;
    `length`: how much of ours is there, or about to be, for the thread whose end takes it out; `place`: a `syscall`
    instruction of the process itself. `descriptors`: of ours, or about to be. `changed`: address of an instruction
    that is to be `original` again, 0 for none. `held_back`: signals to be sent."""

    tid: int
    registers: Registers
    mask: int
    place: int
    pages: int
    length: int
    descriptors: tuple[int, ...]
    changed: int
    original: bytes
    held_back: tuple[int, ...]


class Journal:
    """The slots. Made before the guardian is forked, so that both see them."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOTS * ctypes.sizeof(_Slot))
        self._slots = (_Slot * SLOTS).from_buffer(self._memory)
        self.cookie = int.from_bytes(os.urandom(8), "little")
        """Stands in r15 of a thread while its registers are ours."""

    def enter(self, tid: int, registers: Registers, mask: int, place: int, pages: int) -> int:
        """Note a thread that is about to be touched; the number of its slot."""
        number = next((at for at in range(SLOTS) if self._slots[at].state == FREE), None)
        if number is None:
            raise StasisError(f"more than {SLOTS} threads cannot be dumped at once")
        slot = self._slots[number]
        slot.tid, slot.mask, slot.place, slot.pages, slot.length = tid, mask, place, pages, 0
        slot.held_back = slot.changed = 0
        slot.descriptors[:] = [0] * MOST_DESCRIPTORS
        slot.registers = registers
        slot.state = TOUCHED  # last: from here on the guardian believes it
        return number

    def move(self, number: int, pages: int, length: int) -> None:
        """Our pages are about to be in the process of this thread, or with zeroes: are there no more."""
        slot = self._slots[number]
        slot.length = length
        slot.pages = pages

    def open(self, number: int, fd: int) -> None:
        """The process of this thread is about to get the descriptor `fd` for us."""
        descriptors = self._slots[number].descriptors
        free = next((at for at in range(MOST_DESCRIPTORS) if not descriptors[at]), None)
        if free is None:
            raise StasisError(f"a process cannot have more than {MOST_DESCRIPTORS} descriptors of ours")
        descriptors[free] = fd + 1

    def close(self, number: int, fd: int) -> None:
        """It is closed, or was never opened."""
        descriptors = self._slots[number].descriptors
        for at in range(MOST_DESCRIPTORS):
            if descriptors[at] == fd + 1:
                descriptors[at] = 0

    def change(self, number: int, address: int, original: bytes) -> None:
        """Other instructions are about to stand at `address`; with 0: they are as they were."""
        slot = self._slots[number]
        if address:
            ctypes.memmove(ctypes.addressof(slot) + _Slot.original.offset, original, INSTRUCTION)
        slot.changed = address

    def hold_back(self, number: int, signal: int) -> None:
        """A signal came that the thread is to get again at the end."""
        self._slots[number].held_back |= 1 << signal

    def leave(self, number: int) -> None:
        """The thread is as it was."""
        self._slots[number].state = FREE

    def entries(self) -> Iterator[Entry]:
        """Threads that are not as they were."""
        for slot in self._slots:
            if slot.state != FREE:
                registers = Registers.from_buffer_copy(slot.registers)
                original = ctypes.string_at(ctypes.addressof(slot) + _Slot.original.offset, INSTRUCTION)
                yield Entry(
                    slot.tid, registers, slot.mask, slot.place, slot.pages, slot.length,
                    tuple(fd - 1 for fd in slot.descriptors if fd), slot.changed, original,
                    tuple(number for number in range(64) if slot.held_back >> number & 1),
                )  # fmt: skip
