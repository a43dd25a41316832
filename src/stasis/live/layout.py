# SPDX-License-Identifier: Apache-2.0
"""What the BPF programs and user space share: the table of tracked devices, the bitmaps, and the writes in flight.

The table is one page. A device's bitmaps lie in one array: first that of number 0, then that of number 1, one bit per
tracking block; the table says which is active.
"""

from __future__ import annotations

import struct
from enum import IntFlag

__all__ = ["BITS_PER_ELEMENT", "COUNT", "ELEMENT_SIZE", "EPOCH", "FLIGHT_ENTRIES", "FLIGHT_KEY", "FLIGHT_VALUE",
           "SLOTS", "SLOT_SIZE", "TABLE_SIZE", "Done", "Lost", "Slot", "bitmap_elements", "slot_offset"]

TABLE_SIZE = 4096
COUNT = 0
"""Offset of the number of slots to look at, 32 bits."""
EPOCH = 8
"""Offset of a 64-bit number that is drawn anew before a bitmap or slot is put in place of another; never 0."""
FIRST_SLOT = 64
SLOT_SIZE = 64
SLOTS = 32

ELEMENT_SIZE = 4096
BITS_PER_ELEMENT = ELEMENT_SIZE * 8

FLIGHT_KEY = struct.Struct("<QII")  # address of the bio, device number of the disk, 0
FLIGHT_VALUE = struct.Struct("<QQ")  # sector, sectors
FLIGHT_ENTRIES = 32768


class Done:
    """Offsets within what each processor keeps of the last write that its first program for completions marked."""

    EPOCH = 0  # u64: the table's when marking began; 0 while the others are not valid
    COUNT = 8  # u64: how often this was stored
    QUEUE = 16  # u64: address of the request queue
    SECTOR = 24  # u64
    BYTES = 32  # u64
    SIZE = 40


class Slot:
    """Offsets within a slot. Sectors are of 512 bytes and counted on the whole disk."""

    DEVICE = 0  # u32: major << 20 | minor of the whole disk; 0 for a free slot
    ACTIVE = 4  # u32: number of the active bitmap, 0 or 1
    START = 8  # u64: first sector
    END = 16  # u64: sector behind the last
    SHIFT = 24  # u32: a tracking block is 2^shift sectors
    BIO_BASED = 28  # u32: 1 if the driver takes bios, so that no request will tell of their completion
    ELEMENTS = 32  # u32: elements of the array that one bitmap takes
    LOST = 36  # u32: why the bitmaps cannot be trusted any more (Lost)
    ACTIVITY = 40  # u64: what the kernel had counted of the disk when user space last looked; no program uses it


class Lost(IntFlag):
    """Why changes may have been missed. Bits are set by programs and by user space, and cleared by nobody."""

    OPAQUE = 1  # a command that may have changed anything
    IN_FLIGHT = 2  # no room to note a write in flight
    RANGE = 4  # a range that does not fit into the bitmap
    DISTRUST = 8  # user space said so
    SET_UP = 16  # the disk was set up anew


def slot_offset(index: int) -> int:
    """Where a slot begins in the table."""
    return FIRST_SLOT + index * SLOT_SIZE


def bitmap_elements(blocks: int) -> int:
    """Elements of the array that a bitmap of so many tracking blocks takes."""
    return -(-blocks // BITS_PER_ELEMENT)
