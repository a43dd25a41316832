# SPDX-License-Identifier: Apache-2.0
"""Which threads have registers that are not their own just now, and what to put back: shared with the guardian.

Memory shared by the dumper and its guardian. A slot is filled before a thread is touched and freed when it is as it
was; the dumper may die between any two instructions.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import NamedTuple

from stasis.errors import StasisError
from stasis.linux.ptrace import Registers

__all__ = ["Entry", "Journal"]

SLOTS = 4096
FREE, TOUCHED, LEAVING = range(3)


class _Slot(ctypes.Structure):
    _fields_ = [
        ("state", ctypes.c_uint64),
        ("tid", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("registers", Registers),
    ]


class Entry(NamedTuple):
    """A thread to put back. `pages`: where our page with the `syscall` instruction is, 0 while there is none;
    `length`: how much of ours follows there, for the thread whose end takes it out; `place`: a `syscall` instruction of
    the process itself. `leaving`: it may have its own registers again."""

    tid: int
    registers: Registers
    mask: int
    place: int
    pages: int
    length: int
    leaving: bool


class Journal:
    """The slots. Made before the guardian is forked, so that both see them."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOTS * ctypes.sizeof(_Slot))
        self._slots = (_Slot * SLOTS).from_buffer(self._memory)

    def enter(self, tid: int, registers: Registers, mask: int, place: int, pages: int) -> int:
        """Note a thread that is about to be touched; the number of its slot."""
        number = next((at for at in range(SLOTS) if self._slots[at].state == FREE), None)
        if number is None:
            raise StasisError(f"more than {SLOTS} threads cannot be dumped at once")
        slot = self._slots[number]
        slot.tid, slot.mask, slot.place, slot.pages, slot.length = tid, mask, place, pages, 0
        slot.registers = registers
        slot.state = TOUCHED  # last: from here on the guardian believes it
        return number

    def move(self, number: int, pages: int, length: int) -> None:
        """Our pages are in the process of this thread, or with zeroes: no more."""
        slot = self._slots[number]
        slot.length = length
        slot.pages = pages

    def leaving(self, number: int) -> None:
        """The thread is about to be put back."""
        self._slots[number].state = LEAVING

    def leave(self, number: int) -> None:
        """The thread is as it was."""
        self._slots[number].state = FREE

    def entries(self) -> Iterator[Entry]:
        """Threads that are not as they were."""
        for slot in self._slots:
            if slot.state != FREE:
                registers = Registers.from_buffer_copy(slot.registers)
                leaving = slot.state == LEAVING
                yield Entry(slot.tid, registers, slot.mask, slot.place, slot.pages, slot.length, leaving)
