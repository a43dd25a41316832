# SPDX-License-Identifier: Apache-2.0
"""The BPF programs, made for the running kernel. docs/design/live-tracking.md says why they miss nothing.

Each consists of an entry, which finds out what an event is about, and the functions of `functions.py`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from stasis.linux.bpf import FunctionInfo
from stasis.linux.bpfasm import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10
from stasis.live.functions import FUNCTIONS, MAP_LOOKUP, Functions, Maps
from stasis.live.kerneltypes import OPAQUE, RANGES, READS, KernelTypes
from stasis.live.layout import EPOCH, Done, Lost

__all__ = ["COMPLETIONS", "FUNCTIONS", "PROGRAMS", "Maps", "Source", "assemble"]

# enum bpf_func_id
MAP_UPDATE, MAP_DELETE = 2, 3

OPERATION_MASK = 0xFF  # REQ_OP_MASK, include/linux/blk_types.h
MERGED_DISCARDS = 257
"""Bios of one discard request: NVMe takes 256 ranges, others fewer."""

COMPLETIONS = ("request_1", "request_2", "request_3")
"""One program alone would miss a completion that interrupts it on the same processor; see the design note."""
STORES_IN_ORDER = ("x86_64", "i386", "i486", "i586", "i686")
"""Processors on which nobody sees a flip before the epoch that was drawn ahead of it."""
PROGRAMS = {
    **dict.fromkeys(COMPLETIONS, "block_rq_complete"),
    "bio": "block_bio_complete",
    "queue": "block_bio_queue",
    "remap": "block_bio_remap",
}
"""Name of each program, and the tracepoint it runs at."""


@dataclass(frozen=True)
class Source:
    """A finished program."""

    code: bytes
    functions: list[FunctionInfo]


def assemble(name: str, kernel: KernelTypes, maps: Maps, type_ids: list[int], *,
             machine: str = platform.machine()) -> Source:
    """The program of a name in PROGRAMS; `type_ids` are those of FUNCTIONS.

    Where others may see the stores of one processor in another order, each program for completions does all the work.
    """
    writer = _Writer(kernel, maps)
    event = PROGRAMS[name]
    writer.asm.label("entry")
    argument = kernel.events[event].argument
    if name in COMPLETIONS:
        writer.request(argument, first=name == COMPLETIONS[0], shared=machine in STORES_IN_ORDER)
    else:
        {"queue": writer.queue, "remap": writer.remap, "bio": writer.bio}[name](argument)
    writer.functions()
    places = [writer.asm.position(function.name) for function in FUNCTIONS]
    return Source(writer.asm.code(), [FunctionInfo(*both) for both in zip(places, type_ids, strict=True)])


# Places in the entry's frame.
DEVICE, KEY, VALUE = -8, -24, -40
BYTES, NOTHING, EPOCH_SEEN, CELL = -48, -56, -64, -72


class _Writer(Functions):
    """Writes an entry, and behind it the functions."""

    def __init__(self, kernel: KernelTypes, maps: Maps) -> None:
        super().__init__(maps)
        self.offsets, self.operations, self.traced = kernel.offsets, kernel.operations, kernel.traced_bit

    # r6 is what the event is about, r7 its operation, r8 its sector, r9 its length in sectors.

    def queue(self, argument: int) -> None:
        """A bio is submitted."""
        self._bio(argument)
        self._note_in_flight()
        self._leave()

    def remap(self, argument: int) -> None:
        """A bio goes to another disk. If block_bio_queue was told of it before, it will not be told again."""
        asm = self.asm
        if self.traced is not None:
            asm.load(8, R6, R1, argument * 8)
            asm.load(2, R2, R6, self.offsets["bio.bi_flags"])
            asm.jump_if(R2, "&", 1 << self.traced, "traced")
            asm.jump("leave")
            asm.label("traced")
        self._bio(argument)
        self._note_in_flight()
        self._leave()

    def bio(self, argument: int) -> None:
        """A bio ended that was no part of a request. Drivers change its range, so that its note is what counts."""
        asm = self.asm
        self._bio(argument)
        asm.jump_if(R0, "==", 0, "leave")
        self._find_note("leave")
        asm.map(R1, self.maps.flight)
        asm.move(R2, R10)
        asm.alu("+", R2, KEY)
        asm.call_helper(MAP_DELETE)
        self._leave()

    def request(self, argument: int, *, first: bool, shared: bool) -> None:
        """A request, or a part of one, ended. Only discards that do not adjoin are merged: theirs is a chain.

        The programs for completions do the same one after the other. If work is shared, what the first did is found
        by the others.
        """
        asm = self.asm
        asm.load(8, R6, R1, argument * 8)
        asm.load(4, R7, R6, self.offsets["request.cmd_flags"])
        asm.alu("&", R7, OPERATION_MASK)
        self._leave_if_reading()
        asm.load(4, R9, R1, (argument + 2) * 8)
        asm.load(8, R8, R6, self.offsets["request.__sector"])
        if shared:
            self._find_done()
            if not first:
                self._leave_if_done()
        asm.label("fresh")
        asm.alu(">>", R9, 9)
        asm.load(8, R2, R6, self.offsets["request.q"])
        asm.load(8, R2, R2, self.offsets["request_queue.disk"])
        self._device_of_disk()
        self._record_by_kind()
        if shared and first:
            self._note_done()
        asm.jump_if(R7, "!=", self.operations["REQ_OP_DISCARD"], "leave")
        self._record_chain()
        self._leave()

    def _find_done(self) -> None:
        """Note EPOCH_SEEN, and CELL for a write: what this processor keeps, 0 for other operations."""
        asm = self.asm
        asm.store(8, R10, CELL, 0)
        asm.jump_if(R7, "!=", self.operations["REQ_OP_WRITE"], "fresh")
        asm.store(8, R10, BYTES, R9)
        asm.map_value(R1, self.maps.table)
        asm.load(8, R1, R1, EPOCH)
        asm.store(8, R10, EPOCH_SEEN, R1)
        asm.store(8, R10, NOTHING, 0)
        asm.map(R1, self.maps.done)
        asm.move(R2, R10)
        asm.alu("+", R2, NOTHING)
        asm.call_helper(MAP_LOOKUP)
        asm.jump_if(R0, "==", 0, "fresh")
        asm.store(8, R10, CELL, R0)

    def _leave_if_done(self) -> None:
        """Leave if the first program marked the same range in this epoch: its bits are set in the active bitmap.

        The first program may interrupt the comparison, and be interrupted by it.
        """
        asm = self.asm
        asm.load(8, R5, R0, Done.COUNT)
        asm.load(8, R1, R10, EPOCH_SEEN)
        asm.jump_if(R1, "==", 0, "fresh")
        asm.load(8, R2, R6, self.offsets["request.q"])
        for register, place in ((R1, Done.EPOCH), (R2, Done.QUEUE), (R8, Done.SECTOR), (R9, Done.BYTES),
                                (R5, Done.COUNT)):
            asm.load(8, R3, R0, place)
            asm.jump_if(R3, "!=", register, "fresh")
        asm.jump("leave")

    def _note_done(self) -> None:
        """Keep what was marked. Only the first program does, which never interrupts itself."""
        asm = self.asm
        asm.load(8, R1, R10, CELL)
        asm.jump_if(R1, "==", 0, "unnoted")
        asm.store(8, R1, Done.EPOCH, 0)
        asm.load(8, R2, R1, Done.COUNT)
        asm.alu("+", R2, 1)
        asm.store(8, R1, Done.COUNT, R2)
        asm.load(8, R2, R6, self.offsets["request.q"])
        asm.store(8, R1, Done.QUEUE, R2)
        asm.store(8, R1, Done.SECTOR, R8)
        asm.load(8, R2, R10, BYTES)
        asm.store(8, R1, Done.BYTES, R2)
        asm.load(8, R2, R10, EPOCH_SEEN)
        asm.store(8, R1, Done.EPOCH, R2)
        asm.label("unnoted")

    def _record_chain(self) -> None:
        asm = self.asm
        asm.load(8, R6, R6, self.offsets["request.bio"])
        asm.move(R7, 0)
        asm.label("chain")
        asm.jump_if(R6, "==", 0, "leave")
        asm.load(8, R2, R6, self.offsets["bio.bi_sector"])
        asm.load(4, R3, R6, self.offsets["bio.bi_size"])
        asm.alu(">>", R3, 9)
        asm.load(8, R1, R10, DEVICE)
        asm.call("record")
        asm.load(8, R6, R6, self.offsets["bio.bi_next"])
        asm.alu("+", R7, 1)
        asm.jump_if(R7, "<", MERGED_DISCARDS, "chain")
        self._spoil(Lost.RANGE)

    def _bio(self, argument: int) -> None:
        """Record what a bio is about; r0 then says whether its disk takes bios and is tracked."""
        asm = self.asm
        asm.load(8, R6, R1, argument * 8)
        asm.load(4, R7, R6, self.offsets["bio.bi_opf"])
        asm.alu("&", R7, OPERATION_MASK)
        self._leave_if_reading()
        asm.load(8, R8, R6, self.offsets["bio.bi_sector"])
        asm.load(4, R9, R6, self.offsets["bio.bi_size"])
        asm.alu(">>", R9, 9)
        asm.load(8, R2, R6, self.offsets["bio.bi_bdev"])
        asm.load(8, R2, R2, self.offsets["block_device.bd_disk"])
        self._device_of_disk()
        self._record_by_kind()

    def _leave_if_reading(self) -> None:
        for name in READS:
            self.asm.jump_if(R7, "==", self.operations[name], "leave")

    def _device_of_disk(self) -> None:
        """The frame's DEVICE from the disk in r2."""
        asm = self.asm
        asm.load(4, R3, R2, self.offsets["gendisk.major"])
        asm.load(4, R4, R2, self.offsets["gendisk.first_minor"])
        asm.alu("<<", R3, 20)
        asm.alu("|", R3, R4)
        asm.store(8, R10, DEVICE, R3)

    def _record_by_kind(self) -> None:
        """Record r8, r9 unless the operation has no range of its own: then anything may have changed."""
        asm = self.asm
        asm.jump_if(R7, "==", self.operations["REQ_OP_WRITE"], "ranged")
        for name in OPAQUE:
            if name in self.operations:
                asm.jump_if(R7, "==", self.operations[name], "opaque")
        asm.jump_if(R9, "!=", 0, "ranged")
        for name in RANGES:
            if name in self.operations:
                asm.jump_if(R7, "==", self.operations[name], "ranged")  # an empty flush; or a bio that was advanced
        asm.label("opaque")
        self._spoil(Lost.OPAQUE)
        asm.label("ranged")
        asm.load(8, R1, R10, DEVICE)
        asm.move(R2, R8)
        asm.move(R3, R9)
        asm.call("record")

    def _spoil(self, why: Lost) -> None:
        """Say that the bitmaps of DEVICE cannot be trusted, and leave."""
        asm = self.asm
        asm.load(8, R1, R10, DEVICE)
        asm.move(R2, int(why))
        asm.call("spoil")
        asm.jump("leave")

    def _find_note(self, otherwise: str) -> None:
        """Build KEY, and record what is noted of it; goes to `otherwise` if nothing is."""
        asm = self.asm
        asm.load(8, R1, R10, DEVICE)
        asm.store(8, R10, KEY, R6)
        asm.store(8, R10, KEY + 8, R1)
        asm.map(R1, self.maps.flight)
        asm.move(R2, R10)
        asm.alu("+", R2, KEY)
        asm.call_helper(MAP_LOOKUP)
        asm.jump_if(R0, "==", 0, otherwise)
        asm.load(8, R2, R0, 0)
        asm.load(8, R3, R0, 8)
        asm.load(8, R1, R10, DEVICE)
        asm.call("record")

    def _note_in_flight(self) -> None:
        """For a disk that takes bios (r0): note which range this bio writes. One that is noted already ended unseen."""
        asm = self.asm
        asm.jump_if(R0, "==", 0, "leave")
        asm.jump_if(R9, "==", 0, "leave")
        if "REQ_OP_ZONE_APPEND" in self.operations:
            asm.jump_if(R7, "!=", self.operations["REQ_OP_ZONE_APPEND"], "placed")
            self._spoil(Lost.OPAQUE)  # the device chooses the place
            asm.label("placed")
        self._find_note("unnoted")
        asm.label("unnoted")
        asm.store(8, R10, VALUE, R8)
        asm.store(8, R10, VALUE + 8, R9)
        asm.map(R1, self.maps.flight)
        for register, place in ((R2, KEY), (R3, VALUE)):
            asm.move(register, R10)
            asm.alu("+", register, place)
        asm.move(R4, 0)
        asm.call_helper(MAP_UPDATE)
        asm.jump_if(R0, "==", 0, "leave")
        self._spoil(Lost.IN_FLIGHT)

    def _leave(self) -> None:
        self.asm.label("leave")
        self._return()
