# SPDX-License-Identifier: Apache-2.0
"""Going through the whole index of a COW file: which blocks have entries, how many, and of what kind.

Nothing here touches an entry in Python where none is set: entries are 8 bytes, and slices with a stride of 8 make one
byte of each. An index of a 1 GiB device takes 1.5 ms, a loop over its entries 20. Little is imported, since
`update-img` does no more than this and some copying.
"""

from __future__ import annotations

import errno
import os
import sys

from stasis.datto.layout import CHANGED, HEADER_AREA, SECTION_BLOCKS, SECTION_SIZE
from stasis.linux.holes import data_extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from stasis.datto.layout import Geometry

__all__ = ["Census", "Run", "census", "runs_of_index"]

Run = tuple[int, int]
"""First block and the block behind the last."""

ENTRY = 8
PIECE_SECTIONS = 8
"""Sections read at a time: what fits a processor's cache."""
_TO_FLAG = b"\0" + b"\1" * 255
_LOW = 0 if sys.byteorder == "little" else ENTRY - 1
"""Which byte of an entry holds CHANGED."""


class Census:
    """What the index holds: entries of any kind, entries that point at data, the lowest and highest of these."""

    __slots__ = ("changed", "highest", "lowest", "pointing")

    def __init__(self) -> None:
        self.changed = self.pointing = self.lowest = self.highest = 0

    def _count(self, data: bytes, flags: bytes, *, may_point: bool) -> None:
        self.changed += flags.count(1)
        slots = list(filter(CHANGED.__lt__, memoryview(data).cast("Q"))) if may_point else []
        if slots:
            self.pointing += len(slots)
            self.lowest = min(self.lowest or slots[0], *slots)
            self.highest = max(self.highest, *slots)


def census(fd: int, geometry: Geometry) -> Census:
    """Count the entries of the file's index. OSError if it cannot be read."""
    counted = Census()
    for _ in runs_of_index(fd, geometry.sections, counted):
        pass
    return counted


def runs_of_index(fd: int, sections: int, counted: Census | None = None) -> Iterator[list[Run]]:
    """Runs of blocks with an entry, ascending, piece by piece; a run may end where the next one begins.

    Entries are counted on the way. Holes of the file are passed over unread. OSError if it cannot be read.
    """
    for number, data in _pieces(fd, sections):
        flags, may_point = _flags(data)
        if counted is not None:
            counted._count(data, flags, may_point=may_point)
        yield _runs(number * SECTION_BLOCKS, flags)


def _pieces(fd: int, sections: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first, contents) of groups of sections that hold data."""
    end = HEADER_AREA + sections * SECTION_SIZE
    behind = 0
    for offset, length, is_data in data_extents(fd, HEADER_AREA, end - HEADER_AREA):
        if not is_data:
            continue
        first = max(behind, (offset - HEADER_AREA) // SECTION_SIZE)
        behind = max(first, -(-(offset + length - HEADER_AREA) // SECTION_SIZE))
        for number in range(first, behind, PIECE_SECTIONS):
            yield number, _read(fd, number, min(PIECE_SECTIONS, behind - number))


def _read(fd: int, number: int, sections: int) -> bytes:
    offset, left = HEADER_AREA + number * SECTION_SIZE, sections * SECTION_SIZE
    parts = []
    while left:
        part = os.pread(fd, left, offset)
        if not part:
            raise OSError(errno.EIO, "the file ends early")
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _flags(data: bytes) -> tuple[bytes, bool]:
    """One byte per entry, 1 where one is set, and whether there may be entries that point at data."""
    planes = [data[byte::ENTRY] for byte in range(ENTRY)]
    empty = bytes(len(planes[0]))
    filled = [plane for plane in planes if plane != empty]
    if not filled:
        return empty, False
    if len(filled) == 1:
        flags = filled[0].translate(_TO_FLAG)
        return flags, flags != planes[_LOW]
    union = 0
    for plane in filled:
        union |= int.from_bytes(plane, "little")
    return union.to_bytes(len(empty), "little").translate(_TO_FLAG), True


def _runs(base: int, flags: bytes) -> list[Run]:
    runs: list[Run] = []
    first = flags.find(1)
    while first >= 0:
        end = flags.find(0, first)
        if end < 0:
            end = len(flags)
        runs.append((base + first, base + end))
        first = flags.find(1, end)
    return runs
